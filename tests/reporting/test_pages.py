"""What all pages share: characters that show themselves, files that are whole."""

from pathlib import Path

import pytest

from tests.reporting.samples import HOSTILE
from toolkit.errors import BuildError
from toolkit.fileio import write_whole
from toolkit.pages import make_visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc\r", "a↵b⇥c⟨U+000D⟩"),
        ("\x00\x1b[31m\x85", "⟨U+0000⟩⟨U+001B⟩[31m⟨U+0085⟩"),
        ("\ud83d\ufffe\ufdd0\U0001ffff", "\ufffd" * 4),
        ("\u202eevil\u2066\u200b\u00ad", "⟨U+202E⟩evil⟨U+2066⟩⟨U+200B⟩⟨U+00AD⟩"),
        ("\u2028\u2029\U000e0041", "⟨U+2028⟩⟨U+2029⟩⟨U+E0041⟩"),
        ("שלום, 👩\u200d🔬 \ufffd", "שלום, 👩\u200d🔬 \ufffd"),
        ("<b>&", "<b>&"),
    ],
)
def test_every_character_shows_itself(text: str, shown: str) -> None:
    assert make_visible(text) == shown
    shown.encode()


def test_what_is_to_be_kept_is_kept() -> None:
    assert make_visible("a\nb\r", keep="\n") == "a\nb⟨U+000D⟩"
    assert all("\n" not in make_visible(text) for text in HOSTILE)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_whole("one\n", path)
    write_whole("two\n", path)
    assert path.read_bytes() == b"two\n"
    with pytest.raises(UnicodeEncodeError):
        write_whole("three \ud800", path)
    assert path.read_bytes() == b"two\n"
    with pytest.raises(BuildError, match="cannot be written"):
        write_whole("x", tmp_path / "missing" / "page.html")
    with pytest.raises(BuildError, match="cannot be written"):
        write_whole("x", tmp_path)  # a folder
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]


def test_a_page_can_be_read_by_whom_new_files_can(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_whole("x", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_mode == (tmp_path / "usual").stat().st_mode
