"""`phiship bench` as its users run it, on this machine and on a device."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cli.commands import events, run
from toolkit.errors import MissingExtraError, RunnerError, SettingsError
from toolkit.measuring import bench
from toolkit.measuring.plot import check_plot, plot
from toolkit.measuring.result import Result, State, convert_result, read_result

FEW = ("--prompt-tokens", "8,32,9999", "--new-tokens", "8", "--repeat", "2")


@pytest.fixture(scope="module")
def file(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result that was measured and written."""
    path = tmp_path_factory.mktemp("results") / "gguf.json"
    done = run("bench", str(artifacts["gguf"]), *FEW, "--out", str(path))
    assert done.returncode == 0, done.stderr
    for words in ("tokens/s", "peak memory", "xllamacpp", "not 9999", "context_tokens 512"):
        assert words in done.stdout
    return path


def test_the_file_holds_what_scripts_get(file: Path, artifacts: dict[str, Path]) -> None:
    result = read_result(file)
    assert [length.prompt_tokens for length in result.lengths] == [8, 32]
    assert [skipped.prompt_tokens for skipped in result.skipped] == [9999]
    done = run("bench", str(artifacts["gguf"]), *FEW, "--threads", "1", "--json")
    found = events(done)
    assert {event["event"] for event in found} <= {"waiting", "bench"}
    fields = {name: value for name, value in found[-1].items() if name != "event"}
    assert msgspec.convert(fields, Result).settings["threads"] == 1
    assert set(fields) == set(json.loads(file.read_text()))


def test_results_side_by_side_and_their_picture(file: Path, artifacts: dict[str, Path]) -> None:
    picture = file.with_name("both.svg")
    done = run("bench", str(artifacts["onnx"]), *FEW, "--with", str(file), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert "A: tiny-phi3-gguf" in done.stdout
    assert "B: tiny-phi3-onnx" in done.stdout
    assert ET.parse(picture).getroot().tag.endswith("svg")


def test_a_result_is_shown_again(file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "again.svg"
    done = run("bench", str(file), "--with", str(file), "--plot", str(picture))
    assert done.returncode == 0, done.stderr
    assert "B: tiny-phi3-gguf" in done.stdout
    assert picture.is_file()
    missing = run("bench", str(tmp_path / "missing.json"))
    assert missing.returncode == SettingsError.exit_code


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_pictures_of_other_kinds(file: Path, tmp_path: Path, ending: str, magic: bytes) -> None:
    result = read_result(file)
    longer = msgspec.structs.replace(result, lengths=result.lengths[:1])
    path = tmp_path / f"picture.{ending}"
    plot([result, longer], path)  # one has a length that the other lacks
    assert path.read_bytes().startswith(magic)


def test_what_cannot_be_drawn_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"\.svg, \.png, \.pdf"):
        check_plot(tmp_path / "picture.gif")


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.delitem(__import__("sys").modules, "matplotlib.figure", raising=False)
    with pytest.raises(MissingExtraError) as error:
        check_plot(tmp_path / "picture.svg")
    assert "phiship[plot]" in error.value.advice


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"schema": 1, "name": 3}', "ä".encode("latin-1")]
)
def test_files_that_are_no_results(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match="no result of a bench"):
        read_result(path)


def test_a_result_of_another_schema(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(file.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(SettingsError, match="schema 2"):
        read_result(path)


def test_a_runner_of_another_version(file: Path) -> None:
    found = json.loads(file.read_text())
    del found["lengths"]
    with pytest.raises(RunnerError, match="another version"):
        convert_result(found, "pi5")


@pytest.mark.parametrize(
    "words", [["--prompt-tokens", "8,x"], ["--prompt-tokens", "0"], ["--repeat", "0"]]
)
def test_wrong_usage(words: list[str]) -> None:
    assert run("bench", "somewhere", *words).returncode == 2


def test_too_long_for_the_context_says_what_fits(artifacts: dict[str, Path]) -> None:
    done = run("bench", str(artifacts["gguf"]), "--prompt-tokens", "5000")
    assert done.returncode == RunnerError.exit_code
    assert "context of 512" in done.stderr


def test_bench_on_a_device(board: dict[str, str]) -> None:
    done = run("bench", "embedded", *FEW, "--json", **board)
    assert done.returncode == 0, done.stderr
    result = events(done)[-1]
    assert result["place"] == "embedded"
    assert [length["prompt_tokens"] for length in result["lengths"]] == [8, 32]


def test_only_what_the_machine_tells_is_shown() -> None:
    silent = State(
        temperature_celsius=None, throttled_now=None, throttled_before=None, clock_hertz=None
    )
    assert bench.describe_states(silent, silent) == []
    cool = State(
        temperature_celsius=48.3, throttled_now=(), throttled_before=(), clock_hertz=2_400_000_000
    )
    hot = State(
        temperature_celsius=81.0, throttled_now=("throttled",), throttled_before=(),
        clock_hertz=1_500_000_000,
    )  # fmt: skip
    assert dict(bench.describe_states(cool, hot)) == {
        "temperature": "48 to 81 °C",
        "clock": "2.40 to 1.50 GHz",
        "throttled": "before: no; after: throttled",
    }


def test_an_early_end_is_said(file: Path) -> None:
    result = read_result(file)
    rows: dict[str, Any] = dict(bench.describe(result))
    assert "ended early" not in rows
    rows = dict(bench.describe(msgspec.structs.replace(result, new_tokens=9)))
    assert "after 8 tokens the engine made only 8" in rows["ended early"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (5.04, "5.0 s"), (75, "1:15"), (3725, "1:02:05")],
)
def test_durations(seconds: float, text: str) -> None:
    assert bench.format_time(seconds) == text


def test_progress_in_words() -> None:
    told = {"done": 2, "of": 6, "words": "512 tokens, 1 of 3", "seconds_left": 90.0}
    assert bench.describe_progress(told) == "3/6, 512 tokens, 1 of 3, 1:30 left"
    assert bench.describe_progress({}) == "1/1, "
