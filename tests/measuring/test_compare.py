"""`phiship compare`: artifacts, a device and endpoints, asked the same and held side by side."""

import html.parser
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import events, run
from tests.measuring.chat_server import Asked, Said, reply, serving
from toolkit.console import Console
from toolkit.endpoint import Endpoint, Reply
from toolkit.errors import PhishipError, RunnerError, SettingsError, UnreachableError
from toolkit.measuring.agreement import match, measure, split_differences
from toolkit.measuring.compare import Asking, Comparison, compare, list_events, show_comparison
from toolkit.measuring.page import render_page
from toolkit.measuring.prompts import BUNDLED, Prompt, choose_prompts, make_prompt, read_prompts
from toolkit.measuring.sides import Answer, Side, make_sides

CAPITAL = "What is the capital of France?"
KEY = "sk-very-secret-0123456789"


def ask(*texts: str, prompts: tuple[str, ...] = (CAPITAL,)) -> Comparison:
    made = tuple(make_prompt(text) for text in prompts)
    return compare(make_sides(texts, ()), made, Asking(timeout_s=20), Console())


def test_artifact_device_and_endpoint(
    artifacts: dict[str, Path], board: dict[str, str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    with serving(lambda _: reply("The capital of France is Paris", usage=(9, 6))) as server:
        done = run(
            "compare", str(artifacts["onnx"]), "embedded", f"{server.base_url}#big/model",
            *("--prompt", CAPITAL, "--max-tokens", "24", "--html", str(page), "--json"), **board,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    found = events(done)
    answers = {e["side"]: e for e in found if e["event"] == "answer"}
    assert answers["A"]["text"].strip() == answers["B"]["text"].strip()
    assert "Paris" in answers["A"]["text"]
    assert (answers["C"]["completion_tokens"], answers["C"]["finish_reason"]) == (6, "stop")
    assert server.asked[0].body["messages"] == [{"role": "user", "content": CAPITAL}]
    pairs = {(e["first"], e["second"]): e for e in found if e["event"] == "agreement"}
    assert pairs["A", "B"]["exact_rate"] == 1
    assert pairs["A", "C"]["exact_rate"] == 0  # a full stop is missing
    assert pairs["A", "C"]["first_difference"] == 6
    sides = {e["side"]: e for e in found if e["event"] == "side"}
    assert sides["C"]["title"] == "big/model at 127.0.0.1"
    assert sides["C"]["tokens"] == 6
    assert "Paris" in page.read_text("utf-8")


def test_people_see_tables(artifacts: dict[str, Path]) -> None:
    with serving(lambda _: reply("\x1b[31mLyon\x1b[0m [bold]x[/]", usage=None)) as server:
        done = run(
            "compare", str(artifacts["gguf"]), f"{server.base_url}#m", "--prompt", CAPITAL,
            COLUMNS="120",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for words in ("Paris", "[bold]x[/]", "not told", "A and B", "0% of 1", "similarity"):
        assert words in done.stdout
    assert "\x1b[31m" not in done.stdout


def test_a_side_that_fails_does_not_keep_the_others_from_answering() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = f"http://127.0.0.1:{gone.getsockname()[1]}/v1#m"
    with serving(lambda _: reply("Paris.")) as server:
        done = run("compare", nobody, f"{server.base_url}#m", "--prompt", CAPITAL, "--json")
    assert done.returncode == UnreachableError.exit_code
    found = events(done)
    sides = {e["side"]: e for e in found if e["event"] == "side"}
    assert "cannot be reached" in sides["A"]["error"]
    assert sides["B"]["answers"] == 1
    assert found[-1]["event"] == "error"


def test_an_artifact_that_is_none_is_a_side_that_fails(tmp_path: Path) -> None:
    with serving(lambda _: reply("Paris.")) as server:
        comparison = ask(str(tmp_path / "nothing"), f"{server.base_url}#m")
    assert comparison.sides[0].error is not None
    assert comparison.sides[1].replies
    with pytest.raises(PhishipError):
        comparison.raise_failure()


def test_one_refused_prompt_is_one_missing_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # so that no cell is folded

    def answer(asked: Asked) -> Said:
        if "filtered" in asked.body["messages"][0]["content"]:
            return Said.json({"error": {"message": "content filter"}}, 400)
        return reply("Paris.")

    with serving(answer) as server:
        address = f"{server.base_url}#m"
        comparison = ask(address, address, prompts=("filtered", CAPITAL))
    show_comparison(comparison, Console())
    shown = capsys.readouterr().out
    assert "content filter" in shown
    assert "stop 1, failed 1" in shown
    assert [len(side.replies) for side in comparison.sides] == [1, 1]
    assert comparison.agreements[0].prompts == 1
    with pytest.raises(RunnerError, match="2 answers are missing"):
        comparison.raise_failure()


def test_how_it_is_asked() -> None:
    with serving(lambda _: reply("x")) as server:
        side = f"{server.base_url}#m"
        done = run(
            "compare", side, side, "--prompt", "a", "--prompt", "b", "--max-tokens", "7",
            *("--temperature", "0.5", "--seed", "3"),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(server.asked) == 4
    body = server.asked[0].body
    assert (body["max_tokens"], body["temperature"], body["seed"]) == (7, 0.5, 3)


def test_keys_go_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PHISHIP_API_KEY", raising=False)
    for name in ("ONE", "TWO"):
        monkeypatch.setenv(name, f"{KEY}-{name}")
    github, nvidia = (
        "https://models.github.ai/inference#a/b",
        "https://integrate.api.nvidia.com/v1#c",
    )
    local, other = "http://127.0.0.1:1/v1#m", "http://server.example/v1#m"

    def keys(texts: list[str], *variables: str) -> list[str | None]:
        sides = make_sides(texts, variables)
        assert KEY not in repr(sides)
        return [side.endpoint.key if side.endpoint else None for side in sides]

    assert keys([github, local]) == [None, None]
    assert keys([github, "folder", local], "ONE") == [f"{KEY}-ONE", None, None]
    assert keys([github, nvidia], "A=ONE", "B=TWO") == [f"{KEY}-ONE", f"{KEY}-TWO"]
    assert keys([local, github], "A=TWO", "ONE") == [f"{KEY}-TWO", f"{KEY}-ONE"]
    assert keys([github, other], "ONE") == [f"{KEY}-ONE", None]
    monkeypatch.setenv("PHISHIP_API_KEY", KEY)
    assert keys([github, local, other]) == [KEY, None, None]
    with pytest.raises(SettingsError, match="several servers"):
        keys([github, nvidia])
    with pytest.raises(SettingsError, match="plain text"):
        keys([github, other], "B=ONE")
    with pytest.raises(SettingsError, match="no side with an address"):
        keys([github, "folder"], "B=ONE")
    with pytest.raises(SettingsError, match="MISSING"):
        keys([github, local], "A=MISSING")


def test_the_key_reaches_the_server_and_no_output(tmp_path: Path) -> None:
    page = tmp_path / "page.html"

    def answer(asked: Asked) -> Said:
        return Said.json({"error": {"message": f"{asked.headers['Authorization']} is wrong"}}, 401)

    with serving(answer) as server:
        side = f"{server.base_url}#m"
        done = run(
            "compare", side, side, "--key-env", "A=SOME", "--key-env", "B=SOME", "--html",
            str(page), "--json", SOME=KEY,
        )  # fmt: skip
    assert done.returncode == UnreachableError.exit_code
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in done.stdout + done.stderr + page.read_text("utf-8")


@pytest.mark.parametrize("texts", [["A"], [f"s{n}" for n in range(11)], ["http://x", "y"]])
def test_sides_that_cannot_be(texts: list[str]) -> None:
    with pytest.raises(SettingsError):
        make_sides(texts, ())


def test_prompts_of_files(tmp_path: Path) -> None:
    plain = tmp_path / "questions.txt"
    plain.write_text("One?\n\n  Zwei größer?  \n", "utf-8")
    assert [p.title for p in read_prompts(plain)] == ["One?", "Zwei größer?"]
    rich = tmp_path / "questions.jsonl"
    rich.write_text(
        '{"prompt": "One?"}\n\n{"messages": [{"role": "system", "content": "Short."}, '
        '{"role": "user", "content": "Two?"}], "id": 7}\n[{"role": "user", "content": "Three?"}]\n'
    )
    assert [p.title for p in read_prompts(rich)] == [
        "One?", "system: Short.\nuser: Two?", "Three?"
    ]  # fmt: skip
    assert [p.title for p in choose_prompts(["Zero?"], plain)][:2] == ["Zero?", "One?"]
    assert len(choose_prompts([], None)) == len(BUNDLED)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{', "a.jsonl:2"),
        ("a.jsonl", b'{"prompt": 3}', "a.jsonl:1"),
        ("a.jsonl", b'{"text": "x"}', "a.jsonl:1"),
        ("a.jsonl", b'{"messages": []}', "a.jsonl:1"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "a.jsonl:1"),
        ("a.jsonl", b'"x"', "a.jsonl:1"),
        ("a.txt", b"\n \n", "no prompt"),
        ("a.txt", b"\xff\xfe", "no UTF-8"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=words):
        read_prompts(path)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_prompts(tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("one", "other", "similarity", "first"),
    [
        ("a b c d", "a b c d", 1.0, None),
        ("a b\n c d", "a  b c d ", 1.0, None),
        ("a b c d", "a b x d", 6 / 8, 3),
        ("a b", "a b c d", 4 / 6, 3),
        ("a b", "b a", 2 / 4, 1),
        ("", "a", 0.0, 1),
        ("", "", 1.0, None),
        ("A b", "a b", 2 / 4, 1),
    ],
)
def test_matches(one: str, other: str, similarity: float, first: int | None) -> None:
    found = match(one, other)
    assert (found.similarity, found.first_difference) == (pytest.approx(similarity), first)
    assert found.is_exact == (first is None)


def test_agreement_over_prompts() -> None:
    found = measure("A", "B", [("a b", "a b"), ("a b c d", "a b x d"), ("a", "x y z")])
    assert found is not None
    assert found.exact_rate == pytest.approx(1 / 3)
    assert found.similarity == pytest.approx((1 + 0.75 + 0) / 3)
    assert found.first_difference == 2  # the median of 3 and 1
    assert found.length_ratio == pytest.approx(9 / 7)
    assert measure("A", "B", []) is None
    empty = measure("A", "B", [("", "")])
    assert empty is not None
    assert empty.length_ratio is None


def test_differences_lose_nothing() -> None:
    text, other = "Sun light is\n  blue today.", "Sun light was blue."
    segments = split_differences(text, other)
    assert "".join(piece for piece, _ in segments) == text
    assert [piece.split() for piece, differs in segments if differs] == [["is"], ["today."]] or [
        word for piece, differs in segments if differs for word in piece.split()
    ] == ["is", "blue", "today."]
    assert split_differences("", other) == []
    assert split_differences(text, text) == [(text, False)]


def make_comparison() -> Comparison:
    """Two sides with hostile words, and one that failed."""
    prompts = (
        make_prompt("<img src=x onerror=alert(1)>"),
        Prompt(({"role": "user", "content": "b"},)),
    )
    endpoint = Endpoint("https://host.example/v1?code=hidden", "<b>m</b>", KEY)
    one, two, three = Side("A", "/some/where/model"), Side("B", "x", endpoint), Side("C", "pi5")
    words = "Hi <script>alert(1)</script> & {{ 7 * 7 }}"
    one.answers = [
        Answer(Reply(words, "stop", 1, 4, 0.5)),
        Answer(Reply("same", "length", 1, 1, 1)),
    ]
    two.answers = [Answer(Reply("Hi <i>you</i>", "", None, None, 0.5)), Answer(failure="<u>no</u>")]
    three.answers = [Answer(), Answer()]
    three.error = UnreachableError("pi5: <s>gone</s>")
    return Comparison(prompts, (one, two, three), Asking())


class Tags(html.parser.HTMLParser):
    """Which elements a page opens and closes."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.opened.append(tag)
        assert not any(name in ("src", "href", "onerror") for name, _ in attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_is_whole_and_shows_words_as_words() -> None:
    page = render_page(make_comparison())
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {"script", "img", "b", "i", "u", "s", "link"} & set(tags.opened)
    text = "".join(tags.texts)
    for words in ("alert(1)</script> & {{ 7 * 7 }}", "<u>no</u>", "pi5: <s>gone</s>", "not told"):
        assert words in text
    assert KEY not in page
    assert "hidden" not in page
    assert "url(" not in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_events_say_everything_but_the_key() -> None:
    text = str(list_events(make_comparison()))
    assert KEY not in text
    assert "<s>gone</s>" in text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(render_page(make_comparison()), "utf-8")
    browser = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=500",
    ]
    done = subprocess.run(
        [*browser, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.count("<section") == 6
    assert "&lt;script&gt;" in done.stdout
