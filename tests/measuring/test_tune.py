"""`phiship tune`: what it tries, what it keeps, and what it must never keep."""

import itertools
import json
from collections.abc import Callable, Sequence
from copy import deepcopy as copy_deeply
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cli.commands import events, run
from toolkit.artifact import Smoke
from toolkit.console import Console
from toolkit.errors import RunnerError, SettingsError, SmokeError
from toolkit.measuring import space
from toolkit.measuring.result import Result, convert_result
from toolkit.measuring.tune import LARGEST, Wish, tune
from toolkit.place import LocalPlace, Place
from toolkit.runner.settings import read_settings

FEW = ("--prompt-tokens", "8,40", "--new-tokens", "8", "--repeat", "1")


SETTINGS = ("context-tokens", "threads", "kv-bits", "batch-tokens")
TEMPLATES: dict[str, dict[str, Any]] = {}


class Steered(LocalPlace):
    """An artifact's folder whose measurements a test steers, to see what the search makes of them.

    One measurement of each artifact is real; the others are that one with other settings.
    """

    def __init__(self, artifact: Path, change: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(artifact)
        self.change = change
        self.asked: list[Sequence[str]] = []

    def run(self, arguments: Sequence[str], stdin: str = "", **options: Any) -> dict[str, Any]:
        if arguments[0] != "bench":
            return super().run(arguments, stdin, **options)
        self.asked.append(arguments)
        if self.name not in TEMPLATES:
            TEMPLATES[self.name] = super().run(arguments, stdin, **options)
            assert TEMPLATES[self.name]["judged"]
        found = copy_deeply(TEMPLATES[self.name])
        words = dict(itertools.pairwise(arguments))
        for name in SETTINGS:
            value = words.get(f"--{name}")
            found["settings"][name.replace("-", "_")] = int(value) if value else None
        if "--ask" not in arguments:
            found["judged"] = None
        self.change(found)
        return found


def set_rates(found: dict[str, Any], rate: float) -> None:
    for length in found["lengths"]:
        length["tokens_per_second"] = {"median": rate, "least": rate, "most": rate}
        length["prompt_tokens_per_second"] = {"median": rate, "least": rate, "most": rate}


def search(place: Place, **wish: Any) -> None:
    few = {"prompt_tokens": (8, 40), "new_tokens": 6, "repeat": 1}
    tune(place, Wish(**{**few, **wish}), Console())


def kept(artifact: Path) -> dict[str, Any]:
    path = artifact / "settings.json"
    return json.loads(path.read_text())["settings"] if path.exists() else {}


def test_the_line_tries_everything_and_keeps_the_winner(copy: Callable[[str], Path]) -> None:
    artifact = copy("onnx")
    done = run("tune", str(artifact), *FEW, "--json")
    assert done.returncode == 0, done.stderr
    found = events(done)
    spaces = next(event for event in found if event["event"] == "space")
    assert set(spaces) == {"event", "place", "threads"}
    tries = [event for event in found if event["event"] == "try"]
    assert len(tries) >= 2
    assert all(one["tokens_per_second"] > 0 for one in tries)
    tuned = found[-1]
    assert tuned["event"] == "tuned"
    assert kept(artifact) == tuned["settings"]
    # What is kept holds from then on, and goes when asked.
    after = events(run("bench", str(artifact), *FEW, "--json"))[-1]
    assert {n: v for n, v in after["settings"].items() if v} == {
        "context_tokens": 512, **tuned["settings"],
    }  # fmt: skip
    assert run("tune", str(artifact), "--reset").returncode == 0
    assert not (artifact / "settings.json").exists()


def test_a_dry_run_shows_the_space_and_measures_nothing(copy: Callable[[str], Path]) -> None:
    artifact = copy("gguf")
    done = run("tune", str(artifact), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "kv_bits" in done.stdout
    assert "tokens/s" not in done.stdout
    assert not (artifact / "settings.json").exists()


def test_on_a_device_the_release_keeps_them(board: dict[str, str]) -> None:
    done = run("tune", "embedded", *FEW, "--json", **board)
    assert done.returncode == 0, done.stderr
    settings = events(done)[-1]["settings"]
    files = list(Path(board["PHISHIP_EMBEDDED_ROOT"]).rglob("settings.json"))
    stored = json.loads(files[0].read_text())["settings"] if files else {}
    assert stored == settings
    assert len(files) <= 1


def test_the_fastest_is_kept_and_the_slow_are_not_measured_to_the_end(
    copy: Callable[[str], Path],
) -> None:
    artifact = copy("gguf")

    def change(found: dict[str, Any]) -> None:
        settings = found["settings"]
        set_rates(found, 100 * (2 if settings["threads"] == 1 else 1))

    place = Steered(artifact, change)
    search(place)
    assert kept(artifact) == {"threads": 1}
    floors = [words[words.index("--floor") + 1] for words in place.asked if words[0] == "bench"]
    assert float(floors[0]) == 0
    assert float(floors[1]) == pytest.approx(100 * space.CLEARLY_WORSE)
    assert all("--fresh" in words for words in place.asked if words[0] == "bench")


def test_luck_is_not_kept(copy: Callable[[str], Path]) -> None:
    """What was best once and does not win again: the engine's own settings stay."""
    artifact = copy("gguf")
    count = 0

    def change(found: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        set_rates(found, 150 if count == 3 else 100)

    search(Steered(artifact, change))
    assert kept(artifact) == {}


def test_a_cache_that_changes_tokens_is_not_kept(copy: Callable[[str], Path]) -> None:
    artifact = copy("gguf")

    def change(found: dict[str, Any]) -> None:
        small = found["settings"]["kv_bits"] == 8
        set_rates(found, 500 if small else 100)
        if small and found["judged"]:
            ids = found["judged"]["next_ids"]
            found["judged"]["next_ids"] = [-7] * 3 + ids[3:]  # 3 of 24 differ: less than 90 %

    search(Steered(artifact, change))
    assert kept(artifact) == {}


def test_a_cache_that_is_faster_and_harmless_is_kept(copy: Callable[[str], Path]) -> None:
    artifact = copy("gguf")
    search(Steered(artifact, lambda f: set_rates(f, 500 if f["settings"]["kv_bits"] == 8 else 100)))
    assert kept(artifact) == {"kv_bits": 8}
    measured = json.loads((artifact / "settings.json").read_text())["measured"]
    assert measured["agreement"] >= space.AGREEMENT


def test_a_winner_with_a_wrong_answer_is_not_kept(copy: Callable[[str], Path]) -> None:
    artifact = copy("gguf")

    def change(found: dict[str, Any]) -> None:
        set_rates(found, 200 if found["settings"]["threads"] == 1 else 100)
        if found["judged"] and found["settings"]["threads"] == 1:
            found["judged"]["text"] = "It is Rome."

    search(Steered(artifact, change))
    assert kept(artifact) == {}


def test_wrong_from_the_start(copy: Callable[[str], Path]) -> None:
    artifact = copy("gguf")
    (artifact / "settings.json").write_text('{"settings": {"threads": 1}, "measured": {}}')
    smoke = Smoke(prompt="What is the capital of France?", expect="Rome")
    with pytest.raises(SmokeError, match="expected 'Rome'"):
        search(LocalPlace(artifact), smoke=smoke)
    assert kept(artifact) == {"threads": 1}  # what was kept before stays


class Crashing(Steered):
    """The processes with one thread die."""

    def run(self, arguments: Sequence[str], stdin: str = "", **options: Any) -> dict[str, Any]:
        if "--threads 1" in " ".join(arguments):
            raise RunnerError("the runner was killed by SIGKILL")
        return super().run(arguments, stdin, **options)


def test_a_crash_costs_one_try(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = copy("onnx")

    def change(found: dict[str, Any]) -> None:
        set_rates(found, 200 if found["settings"]["batch_tokens"] == 128 else 100)

    search(Crashing(artifact, change), goal="balanced")
    assert kept(artifact) == {"batch_tokens": 128}
    assert "SIGKILL" in capsys.readouterr().out


def test_an_engine_that_offers_nothing(
    copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    class Offering(Steered):
        def run(self, arguments: Sequence[str], stdin: str = "", **options: Any) -> dict[str, Any]:
            found = super().run(arguments, stdin, **options)
            return {**found, "offered": {}} if arguments[0] == "info" else found

    artifact = copy("onnx")
    search(Offering(artifact, lambda _: None))
    assert kept(artifact) == {}
    assert "offers nothing" in capsys.readouterr().err


class Longer(Steered):
    """An artifact that would be valid beyond its own context."""

    def __init__(self, artifact: Path, change: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(artifact, change)
        self.manifest = msgspec.structs.replace(self.manifest, context_length=100)


def test_the_largest_context_that_fits(copy: Callable[[str], Path]) -> None:
    """Where 4 MB a token are seen, and 1 GB is free, 512 and 256 tokens are too many."""
    artifact = copy("onnx")

    def change(found: dict[str, Any]) -> None:
        set_rates(found, 100)
        for length, peak in zip(found["lengths"], (500_000_000, 628_000_000), strict=True):
            length["peak_memory_bytes"] = peak  # 8 and 40 tokens
        found["available_memory_bytes"] = 1_000_000_000

    search(Longer(artifact, change), context_tokens=LARGEST)
    assert kept(artifact) == {"context_tokens": 256}

    def change_less(found: dict[str, Any]) -> None:
        change(found)
        found["available_memory_bytes"] = 100_000_000

    search(Longer(artifact, change_less), context_tokens=LARGEST)
    assert kept(artifact) == {}


def test_a_longer_context_is_really_loaded(copy: Callable[[str], Path]) -> None:
    artifact = copy("gguf")
    manifest = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps({**manifest, "context_length": 128}))
    done = run("tune", str(artifact), *FEW, "--for", "prompt", "--context", "largest", "--json")
    assert done.returncode == 0, done.stderr
    found = events(done)
    spaces = next(event for event in found if event["event"] == "space")
    assert spaces["context_tokens"] == [512, 256]
    # This machine has memory for 512 tokens of the tiny model.
    assert kept(artifact)["context_tokens"] == 512


def test_a_context_that_could_not_be_kept_is_refused_at_once(artifacts: dict[str, Path]) -> None:
    done = run("tune", str(artifacts["gguf"]), "--context", "513")
    assert done.returncode == SettingsError.exit_code
    assert "1 to 512" in done.stderr
    assert "tokens/s" not in done.stdout


def test_a_context_that_was_asked_for_is_kept(copy: Callable[[str], Path]) -> None:
    artifact = copy("onnx")
    search(Steered(artifact, lambda found: set_rates(found, 100)), context_tokens=256)
    assert kept(artifact) == {"context_tokens": 256}
    assert read_settings(artifact, 512).context_tokens == 256


@pytest.mark.parametrize(
    ("cpu_count", "threads"),
    [
        (1, (1,)),
        (2, (2, 1)),
        (4, (4, 3, 2, 1)),
        (16, (16, 13, 10, 7, 4)),
        (64, (64, 52, 39, 26, 13)),
    ],
)
def test_numbers_of_threads(cpu_count: int, threads: tuple[int, ...]) -> None:
    assert space.choose_threads(cpu_count) == threads


def test_knobs_are_what_the_goal_and_the_engine_have() -> None:
    offered: dict[str, Sequence[int]] = {"threads": (), "kv_bits": (4, 8, 16), "other": ()}
    names = [(knob.name, knob.values) for knob in space.list_knobs("decode", offered, 2, 512)]
    assert names == [("threads", (2, 1)), ("kv_bits", (16, 8, 4))]
    assert space.list_knobs("prompt", {"batch_tokens": ()}, 2, 200)[0].values == (64, 128)
    assert space.list_knobs("balanced", {}, 2, 512) == []
    assert all(goal in space.KNOBS for goal in space.GOALS)


def test_contexts_halve_down_to_the_own() -> None:
    assert space.list_contexts(4096, 131_072) == [131_072, 65_536, 32_768, 16_384, 8192, 4096]
    assert space.list_contexts(512, 512) == [512]


@pytest.fixture(scope="module")
def result(artifacts: dict[str, Path]) -> Result:
    words = ["bench", "--json", "--prompt-tokens", "8,40", "--new-tokens", "4", "--repeat", "1"]
    return convert_result(LocalPlace(artifacts["gguf"]).run(words), "here")


def test_scores(result: Result) -> None:
    found = json.loads(msgspec.json.encode(result))
    for length, rate in zip(found["lengths"], (20.0, 80.0), strict=True):
        length["tokens_per_second"]["median"] = rate
        length["prompt_tokens_per_second"]["median"] = 10 * rate
    found["peak_memory_bytes"] = 2_000_000_000
    made = convert_result(found, "here")
    assert space.score(made, "decode") == pytest.approx(40)
    assert space.score(made, "prompt") == pytest.approx(400)
    assert space.score(made, "balanced") == pytest.approx((40 * 400) ** 0.5)
    assert space.score(made, "memory") == pytest.approx(0.5)
    for length in found["lengths"]:
        length["tokens_per_second"] = None  # answers of one token
    assert space.score(convert_result(found, "here"), "decode") == 0


def test_unknown_memory_is_not_guessed(result: Result) -> None:
    unknown = msgspec.structs.replace(result, available_memory_bytes=None)
    assert space.estimate_free_bytes(unknown, 512) is None
    one = msgspec.structs.replace(result, lengths=result.lengths[:1])
    assert space.estimate_free_bytes(one, 512) is None
