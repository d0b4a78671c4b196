"""The device's own probes on recorded boards: every fact is right, and damage does no harm."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from tests.boards.board import NAMES, load_board
from tests.boards.record import record
from toolkit.device import EngineFacts, Facts
from toolkit.runner.agent import child
from toolkit.runner.agent.facts import read_facts
from toolkit.runner.agent.layout import open_layout
from toolkit.runner.agent.probes.accelerators import read_cuda
from toolkit.runner.agent.probes.reading import run_command

# Child processes cost most of a probe: 10 to 30 ms each on a Raspberry Pi.
MOST_COMMANDS = {"Darwin": 4, "Linux": 1}


@pytest.mark.parametrize("name", NAMES)
def test_every_fact_of_a_recorded_board(name: str, tmp_path: Path) -> None:
    board = load_board(name)
    board.lay_out(tmp_path)
    found = board.read(tmp_path)
    assert found == board.facts
    # The agent adds these two.
    more = {"engine", "service_memory_bytes"}
    assert msgspec.to_builtins(msgspec.convert(found, Facts)).keys() - more == found.keys()
    assert board.source
    assert "recorded by" in board.source or "not a recording" in board.source


@pytest.mark.parametrize("name", NAMES)
def test_few_programs_are_started_and_all_that_are_recorded(name: str, tmp_path: Path) -> None:
    board = load_board(name)
    board.lay_out(tmp_path)
    facts = msgspec.convert(board.read(tmp_path), Facts)
    assert set(board.commands) <= set(board.asked)
    assert len(board.asked) <= (2 if facts.is_termux else MOST_COMMANDS[facts.system])


@pytest.mark.parametrize("name", NAMES)
def test_a_board_without_programs_and_with_damaged_files_is_still_described(
    name: str, tmp_path: Path
) -> None:
    noise = random.Random(name)
    for number in range(8):
        board, root = load_board(name), tmp_path / str(number)
        board.lay_out(root)
        for path in [path for path in root.rglob("*") if path.is_file()]:
            path.write_bytes(_damage(path.read_bytes(), noise))
        for words, text in board.commands.items():
            board.commands[words] = _damage(text.encode(), noise).decode("utf-8", "replace")
        msgspec.convert(board.read(root), Facts)


def _damage(content: bytes, noise: random.Random) -> bytes:
    """Change up to seven bytes and cut the end off."""
    damaged = bytearray(content)
    for _ in range(noise.randrange(8) if content else 0):
        damaged[noise.randrange(len(damaged))] = noise.randrange(256)
    return bytes(damaged[: noise.randrange(len(damaged) + 1)])


def test_what_is_not_there_is_none_and_never_a_guess(tmp_path: Path) -> None:
    board = load_board("pi-5")
    found = board.read(tmp_path)
    told = {key for key, value in found.items() if value not in (None, "", [])}
    by_python = {
        *("system", "machine", "word_bits", "python", "python_path", "has_venv", "is_termux"),
        *("libc", "cpu_count", "root", "disk_free_bytes", "disk_is_writable", "clock_s"),
        "systemd_user",
    }
    assert told == by_python


def test_a_recording_of_this_machine_is_replayed(tmp_path: Path) -> None:
    board = record("this machine", "recorded by a test")
    copy = json.loads(json.dumps(board.facts))
    board.lay_out(tmp_path)
    assert board.read(tmp_path) == copy
    here = read_facts(open_layout(str(tmp_path / "root")))
    steady = ("machine", "libc", "cpu_features", "memory_total_bytes", "board", "cuda", "python")
    assert {key: copy[key] for key in steady} == {key: here[key] for key in steady}


def test_facts_are_plain_json_and_name_no_host(tmp_path: Path) -> None:
    import socket

    text = json.dumps(read_facts(open_layout(str(tmp_path))))
    assert f'"{socket.gethostname()}"' not in text


def test_a_program_that_is_missing_hangs_or_says_nothing_is_none(tmp_path: Path) -> None:
    assert run_command(["phiship-no-such-program"]) is None
    assert run_command([sys.executable, "-c", ""]) is None
    started_s = time.monotonic()
    assert (
        run_command([sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"])
        is None
    )
    assert time.monotonic() - started_s < 30


def test_a_program_that_answers_and_then_fails_has_answered() -> None:
    program = "import sys; print('NV Power Mode: 15W'); sys.exit(1)"
    assert run_command([sys.executable, "-c", program]) == "NV Power Mode: 15W\n"


def test_a_program_cannot_read_the_requests_of_the_agent() -> None:
    program = """
import sys
from toolkit.runner.agent.probes.reading import run_command
assert run_command([sys.executable, "-c", "import sys; print(len(sys.stdin.read()))"]) == "0\\n"
print(sys.stdin.read())
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="a request",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "a request\n"


def test_a_feature_that_only_some_processors_have_does_not_count(tmp_path: Path) -> None:
    board = load_board("pi-5")
    board.files["proc/cpuinfo"] = board.files["proc/cpuinfo"].replace(" asimddp", "", 1)
    board.lay_out(tmp_path)
    assert board.read(tmp_path)["cpu_features"] == ["asimd", "aes"]


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ({}, None),
        ({"usr/local/cuda/version.txt": "CUDA Version 10.2.300\n"}, "10.2.300"),
        ({"usr/local/cuda-12.6/lib64/libcudart.so.12.6.68": ""}, "12.6.68"),
        ({"usr/lib/x86_64-linux-gnu/libcudart.so.12": ""}, "12"),
        ({"usr/local/cuda/version.json": '{"cuda_cudart": {"version": "1"}}'}, None),
    ],
)
def test_cuda_by_its_files(files: dict[str, str], version: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    assert read_cuda(tmp_path) == version


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root)",
    ],
)
def test_driver_of_a_graphics_card(line: str, tmp_path: Path) -> None:
    board = load_board("nuc-12")
    board.files["proc/driver/nvidia/version"] = line + "\nGCC version:  gcc version 12.3.0\n"
    board.lay_out(tmp_path)
    found = board.read(tmp_path)
    card = {"kind": "nvidia", "name": "driver 580.95.05", "is_accessible": True}
    assert found["accelerators"] == [*board.facts["accelerators"], card]
    assert found["jetson"] is None


@pytest.mark.parametrize(
    ("zones", "celsius"),
    [(["-256000"], None), (["-256000", "-1000"], -1.0), (["999000", "61000"], 61.0), (["x"], None)],
)
def test_sensors_that_measure_nothing(
    zones: list[str], celsius: float | None, tmp_path: Path
) -> None:
    board = load_board("nuc-12")
    for number, text in enumerate(zones):
        board.files[f"sys/class/thermal/thermal_zone{number}/temp"] = text + "\n"
    if len(zones) == 1:
        del board.files["sys/class/thermal/thermal_zone1/temp"]
    board.lay_out(tmp_path)
    assert board.read(tmp_path)["temperature_celsius"] == celsius


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("__version__ = '1.2'", {"importable": True, "is_installed": True, "version": "1.2"}),
        ("print('hello')\nprint('{x}')", {"importable": True, "is_installed": True, "version": ""}),
        ("raise ImportError('libgomp.so.1: cannot open')",
         {"importable": False, "is_installed": True,
          "error": "ImportError: libgomp.so.1: cannot open"}),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)",
         {"importable": False, "is_installed": True, "signal": "SIGILL"}),
        ("import os; print('{', flush=True); os._exit(0)",
         {"importable": False, "is_installed": True}),
        ("import time; time.sleep(60)",
         {"importable": False, "is_installed": True, "error": "not done within 1 s"}),
        (None, {"importable": False, "is_installed": False, "signal": None}),
    ],
)  # fmt: skip
def test_how_the_import_of_an_engine_ends(
    program: str | None,
    expected: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(child, "IMPORT_TIMEOUT_S", 1 if program and "time" in program else 60)
    if program is not None:
        (tmp_path / "engine_under_test.py").write_text(program)
    found = child.import_engine("engine_under_test")
    assert expected.items() <= found.items(), found
    msgspec.convert({"package": "engine", **found}, EngineFacts)
