"""The runner's side: what is measured of real engines, and settings that are kept."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.runner import benching
from toolkit.runner.answer import encode_chat
from toolkit.runner.benching import Work, bench, make_prompt, summarize
from toolkit.runner.failure import Failure
from toolkit.runner.loading import loading
from toolkit.runner.manifest import read_manifest
from toolkit.runner.memory import read_peak_memory_bytes
from toolkit.runner.settings import Settings, read_settings
from toolkit.runner.tuning import PREFIXES, judge, store_settings

WORK = Work((8, 40, 200), 12, 2)


def measure(artifact: Path, work: Work = WORK, **given: int) -> dict[str, Any]:
    return bench(artifact, work, given, lambda _: None)


@pytest.mark.parametrize("kind", ["onnx", "gguf", "openvino"])
def test_everything_asked_for_is_measured(artifacts: dict[str, Path], kind: str) -> None:
    found = measure(artifacts[kind])
    json.dumps(found)
    assert [length["prompt_tokens"] for length in found["lengths"]] == [8, 40, 200]
    for length in found["lengths"]:
        assert len(length["runs"]) == WORK.repeat
        for run in length["runs"]:
            assert run["new_tokens"] == WORK.new_tokens
            # No cache of an earlier prompt has helped.
            assert run["reused_tokens"] in (0, None)
            rate = length["prompt_tokens"] / run["first_token_seconds"]
            assert run["prompt_tokens_per_second"] == pytest.approx(rate)
        for name in ("first_token_seconds", "prompt_tokens_per_second", "tokens_per_second"):
            spread, values = length[name], [run[name] for run in length["runs"]]
            assert (spread["least"], spread["most"]) == (min(values), max(values))
            assert spread["median"] == pytest.approx(sum(values) / 2)
    # More than loading, less than the machine's; the peak is this process's, after other tests.
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < found["loaded_memory_bytes"] <= found["peak_memory_bytes"] < total_bytes
    assert found["load_seconds"] > 0
    assert found["engine"].split()[0] in ("onnxruntime-genai", "xllamacpp", "openvino-genai")
    assert found["machine"]["cpu_count"] >= 1
    assert set(found["before"]) == set(found["after"]) == {
        "temperature_celsius", "throttled_now", "throttled_before", "clock_hertz",
    }  # fmt: skip


def test_prompts_have_exact_lengths_and_begin_differently(artifacts: dict[str, Path]) -> None:
    ids = [5, 6, 5, 7, 8]
    assert make_prompt(ids, 7, 0) == [5, 6, 5, 7, 8, 5, 6]
    assert [make_prompt(ids, 1, number) for number in range(4)] == [[5], [6], [7], [8]]
    artifact = artifacts["gguf"]
    with loading(artifact, read_settings(artifact, 512)) as loaded:
        text_ids = loaded.model.encode(benching.PROBE_TEXT)
    prompts = [make_prompt(text_ids, 300, number) for number in range(60)]
    assert {len(prompt) for prompt in prompts} == {300}
    assert len({prompt[0] for prompt in prompts}) == 60


def test_lengths_that_do_not_fit_are_named(artifacts: dict[str, Path]) -> None:
    found = measure(artifacts["gguf"], Work((500, 16, 501, 90_000), 12, 1))
    assert [length["prompt_tokens"] for length in found["lengths"]] == [16, 500]
    assert [skipped["prompt_tokens"] for skipped in found["skipped"]] == [501, 90_000]
    assert "512" in found["skipped"][0]["reason"]
    shorter = measure(artifacts["gguf"], Work((100, 16), 12, 1), context_tokens=64)
    assert [length["prompt_tokens"] for length in shorter["lengths"]] == [16]
    with pytest.raises(Failure, match="no prompt length fits"):
        measure(artifacts["gguf"], Work((600,), 12, 1))


@pytest.mark.parametrize(
    "work", [Work((0,), 1, 1), Work((), 1, 1), Work((1,), 0, 1), Work((1,), 1, 0)]
)
def test_nonsense_is_refused(artifacts: dict[str, Path], work: Work) -> None:
    with pytest.raises(Failure, match="whole numbers"):
        measure(artifacts["gguf"], work)


def test_progress_counts_to_the_end(artifacts: dict[str, Path]) -> None:
    told: list[dict[str, Any]] = []
    bench(artifacts["gguf"], WORK, {}, told.append)
    assert [one["done"] for one in told] == list(range(6))
    assert {one["of"] for one in told} == {6}
    assert "seconds_left" not in told[0]
    assert all(one["seconds_left"] > 0 for one in told[1:])


def test_what_is_clearly_too_slow_ends_after_one_round(artifacts: dict[str, Path]) -> None:
    found = measure(artifacts["gguf"], Work((8, 40), 12, 3, floor=(1e9, 0.0)))
    assert [len(length["runs"]) for length in found["lengths"]] == [1, 1]
    found = measure(artifacts["gguf"], Work((8, 40), 12, 3, floor=(1e-9, 1e-9)))
    assert [len(length["runs"]) for length in found["lengths"]] == [3, 3]


def test_an_answer_of_one_token_has_no_rate() -> None:
    run = {"first_token_seconds": 2.0, "prompt_tokens_per_second": 4.0, "tokens_per_second": None}
    found = summarize(8, [{**run, "new_tokens": 1}], 1)
    assert found["tokens_per_second"] is None
    assert found["first_token_seconds"] == {"median": 2.0, "least": 2.0, "most": 2.0}


@pytest.mark.parametrize("kind", ["onnx", "gguf"])
def test_judging_sees_the_answer_and_the_next_tokens(artifacts: dict[str, Path], kind: str) -> None:
    artifact = artifacts[kind]
    found = measure(artifact, Work((8,), 2, 1, ("What is the capital of France?", 24)))["judged"]
    assert "Paris" in found["text"]
    assert len(found["next_ids"]) == PREFIXES
    assert (
        len(set(found["next_ids"])) > 3
    )  # a text whose next token is always the same shows nothing
    with loading(artifact, Settings(512)) as loaded:
        assert judge(loaded, "What is the capital of France?", 24) == found


def test_settings_are_kept_beside_the_manifest(copy: Callable[[str], Path]) -> None:
    artifact = copy("gguf")
    asked = {"settings": {"threads": 1, "kv_bits": 8, "batch_tokens": None}, "measured": {"x": 1}}
    kept = store_settings(artifact, json.dumps(asked))
    assert kept == {"settings": {"threads": 1, "kv_bits": 8}, "measured": {"x": 1}}
    assert read_settings(artifact, 512) == Settings(512, threads=1, kv_bits=8)
    assert measure(artifact, Work((8,), 2, 1))["settings"]["kv_bits"] == 8
    fresh = measure(artifact, Work((8,), 2, 1, is_fresh=True), threads=2)["settings"]
    assert (fresh["kv_bits"], fresh["threads"]) == (None, 2)
    store_settings(artifact, '{"settings": {}, "measured": {}}')
    assert not (artifact / "settings.json").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"colour": 1}, "colour is no setting"),
        ({"threads": 0}, "whole numbers from 1"),
        ({"threads": True}, "whole numbers from 1"),
        ({"threads": "2"}, "whole numbers from 1"),
        ({"kv_bits": 7}, "kv_bits is 7"),
        ({"context_tokens": 100_000}, "allows 1 to 512"),
    ],
)
def test_settings_that_cannot_be_are_not_kept(
    artifacts: dict[str, Path], settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(Failure, match=words):
        store_settings(artifacts["gguf"], json.dumps({"settings": settings, "measured": {}}))
    assert not (artifacts["gguf"] / "settings.json").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"settings": 3, "measured": {}}', '{"settings": {}}'])
def test_damaged_orders_are_refused(artifacts: dict[str, Path], text: str) -> None:
    with pytest.raises(Failure, match="damaged"):
        store_settings(artifacts["gguf"], text)


def run_line(artifact: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "toolkit.runner", "bench", "--artifact", str(artifact), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_line_prints_progress_then_the_result(artifacts: dict[str, Path]) -> None:
    words = ("--prompt-tokens", "8,16", "--new-tokens", "4", "--repeat", "1")
    done = run_line(artifacts["gguf"], *words, "--json", "--threads", "1")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(line) for line in lines[:-1]] == [{"progress"}] * 2
    assert lines[-1]["settings"]["threads"] == 1
    shown = run_line(artifacts["gguf"], *words)
    assert "tokens/s" in shown.stdout
    assert read_manifest(artifacts["gguf"]).engine in shown.stdout.replace("xllamacpp", "llama_cpp")
    bad = run_line(artifacts["gguf"], "--json", "--prompt-tokens", "8,x")
    assert bad.returncode == 1
    assert "8,x" in json.loads(bad.stdout)["error"]["message"]


def test_answers_that_end_early_are_asked_again_with_another_prompt(
    artifacts: dict[str, Path],
) -> None:
    """A question is answered with some seven tokens; a text goes on."""
    with loading(artifacts["onnx"], Settings(512)) as loaded:
        question = encode_chat(loaded, [("user", "What is the capital of France?")])
        text = loaded.model.encode(benching.PROBE_TEXT)

        def count(*prompts: list[int]) -> int:
            return int(benching._measure_whole(loaded, iter(prompts), 32)["new_tokens"])

        short = count(question)
        assert 1 < short < 32
        assert count(question, text) == 32
        assert count(question, question, question, text) == short  # enough is enough


def test_what_a_board_tells_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files as a Raspberry Pi 5 has them; its vcgencmd is not here, so the kernel's file counts."""
    for name, text in {
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/meminfo": "MemTotal:        8245312 kB\n",
        "sys/class/thermal/thermal_zone0/temp": "78300\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1500000\n",
        "sys/devices/system/cpu/cpu3/cpufreq/scaling_cur_freq": "2400000\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "50004\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(benching, "ROOT", tmp_path)
    assert benching.read_state() == {
        "temperature_celsius": 78.3,
        "throttled_now": ["throttled"],
        "throttled_before": ["under-voltage", "throttled"],
        "clock_hertz": 2_400_000_000,
    }
    machine = benching.read_machine()
    assert machine["board"] == "Raspberry Pi 5 Model B Rev 1.0"
    assert machine["memory_total_bytes"] == 8245312 * 1024


def test_memory_of_an_engine_that_is_a_program_of_its_own_counts() -> None:
    before = read_peak_memory_bytes()
    program = "held = bytearray(b'x') * 90_000_000; print(flush=True); input()"
    shell = ["sh", "-c", f'"{sys.executable}" -c "{program}"; true']
    with subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        child.stdout.readline()
        # The child's own 90 MB; ours may have grown a little meanwhile.
        assert 90_000_000 < read_peak_memory_bytes() - before < 150_000_000
    assert read_peak_memory_bytes() - before < 90_000_000
