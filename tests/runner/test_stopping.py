"""Stop texts, however they are cut into pieces."""

import itertools

import pytest

from toolkit.runner.stopping import StopTexts


def feed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    """Return what is shown of the pieces, and whether a stop was found."""
    stopping = StopTexts(stops)
    shown = ""
    for piece in pieces:
        shown += stopping.push(piece)
        if stopping.is_found:
            return shown, True
    return shown + stopping.flush(), False


def cut(text: str) -> list[list[str]]:
    """All ways of cutting a text into pieces."""
    ways = []
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        pieces = [text[0]]
        for character, is_cut in zip(text[1:], cuts, strict=True):
            if is_cut:
                pieces.append(character)
            else:
                pieces[-1] += character
        ways.append(pieces)
    return ways


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["ab"], "xxabyy", ("xx", True)),
        (["aab"], "xaaaby", ("xa", True)),
        (["abc", "bd"], "xabdy", ("xa", True)),
        (["abc", "b"], "xabcy", ("xa", True)),
        (["yy"], "xxyxxy", ("xxyxxy", False)),
        ([""], "xyz", ("xyz", False)),
        ([], "xyz", ("xyz", False)),
    ],
)
def test_a_stop_ends_the_text_however_it_is_cut(
    stops: list[str], text: str, expected: tuple[str, bool]
) -> None:
    found = {feed(stops, pieces) for pieces in cut(text)}
    if stops == ["abc", "b"]:  # in one piece the longer one begins earlier
        assert found <= {("xa", True), ("x", True)}
    else:
        assert found == {expected}


def test_text_is_shown_as_soon_as_it_begins_no_stop() -> None:
    stopping = StopTexts(["<|end|>"])
    assert stopping.push("a <") == "a "
    assert stopping.push("b") == "<b"
    assert stopping.push("<|en") == ""
    assert stopping.push("d|>c") == ""
    assert stopping.is_found
