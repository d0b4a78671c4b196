"""What people and scripts see: results on stdout, the rest on stderr, JSON one event a line."""

import json
from typing import Any

import pytest

from toolkit.console import Console, format_bytes
from toolkit.errors import CheckpointError
from toolkit.report import Report

Capture = pytest.CaptureFixture[str]


def events(capsys: Capture) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return [json.loads(line) for line in captured.out.splitlines()]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (2_720_000_000, "2.72 GB"),
        (123_400_000_000, "123 GB"),
        (-1500, "-1.5 kB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize("count", [10**power - 1 for power in range(4, 16)])
def test_bytes_are_never_in_powers(count: int) -> None:
    assert "e+" not in format_bytes(count)


def test_results_and_notes_are_apart(capsys: Capture) -> None:
    console = Console()
    console.result("the answer")
    console.note("by the way")
    console.event("unseen", value=1)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("the answer\n", "by the way\n")


@pytest.mark.parametrize(
    "text",
    [
        "[red]no markup[/red]",
        "a\\[b]",
        "[/closed] [",
        # rich takes :100: for an emoji, and with it every error in line 100.
        "recipes/x.yaml:100: key",
    ],
)
def test_text_is_never_markup(text: str, capsys: Capture) -> None:
    console = Console()
    console.result(text)
    console.note(text)
    console.error(CheckpointError(text, advice=text))
    console.table(text, ["column"], [[text]])
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{text}\n")
    assert f"error: {text}\n  {text}\n" in captured.err


def test_long_results_are_one_line(capsys: Capture) -> None:
    """Scripts cut and paste them: paths, digests, commands."""
    Console().result("x" * 500)
    Console().error(CheckpointError("y" * 500))
    captured = capsys.readouterr()
    assert captured.out == "x" * 500 + "\n"
    assert captured.err == f"error: {'y' * 500}\n"


def test_json_is_one_event_a_line(capsys: Capture) -> None:
    console = Console(as_json=True)
    console.result("for people")
    console.note("for people")
    console.table("for people", ["a"], [["b"]])
    console.event("built", path="x", size_bytes=3)
    console.error(CheckpointError("it broke", advice="mend it"))
    assert events(capsys) == [
        {"event": "built", "path": "x", "size_bytes": 3},
        {
            "event": "error",
            "kind": "CheckpointError",
            "message": "it broke",
            "advice": "mend it",
        },
    ]


def test_error_with_its_next_step(capsys: Capture) -> None:
    Console().error(CheckpointError("it broke", advice="mend it"))
    assert capsys.readouterr().err == "error: it broke\n  mend it\n"


def make_report() -> Report:
    report = Report("a build")
    with report.step("convert", limit="1 s") as step:
        step.measured = "10 MB"
    with pytest.raises(ValueError, match="broken"), report.step("check"):
        raise ValueError("broken")
    return report


def test_report_for_people(capsys: Capture) -> None:
    Console().report(make_report())
    lines = capsys.readouterr().out.splitlines()
    assert "a build" in lines[0]
    assert any("ok" in line and "convert" in line and "10 MB" in line for line in lines)
    assert any("FAILED" in line and "check" in line for line in lines)


def test_report_for_scripts(capsys: Capture) -> None:
    Console(as_json=True).report(make_report())
    first, second, last = events(capsys)
    assert (first["name"], first["ok"], first["measured"]) == ("convert", True, "10 MB")
    assert (second["name"], second["ok"], second["limit"]) == ("check", False, "")
    assert last == {"event": "report", "title": "a build", "ok": False}


def test_progress_for_scripts(capsys: Capture) -> None:
    with Console(as_json=True).progress("load", 1000) as advance:
        for _ in range(1000):
            advance(1)
    seen = events(capsys)
    assert len(seen) == 101  # One for each percent, not one for each piece.
    assert seen[-1] == {
        "event": "progress",
        "label": "load",
        "done_bytes": 1000,
        "total_bytes": 1000,
    }


def test_progress_of_nothing(capsys: Capture) -> None:
    with Console(as_json=True).progress("load", 0) as advance:
        advance(0)
    assert events(capsys)[-1]["total_bytes"] == 0


def test_progress_is_silent_without_a_terminal(capsys: Capture) -> None:
    with Console().progress("load", 1000) as advance:
        advance(1000)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Console().progress("load [x]", 2_000_000) as advance:
        advance(1_000_000)
        advance(1_000_000)
    shown = capsys.readouterr().err
    assert "load [x]" in shown and "2.0/2.0 MB" in shown
