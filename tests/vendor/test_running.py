"""Running a vendor's command: its log, its cost, and every way it can end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from toolkit.console import Console
from toolkit.errors import BuildError
from toolkit.vendor import Command, python_of
from toolkit.vendor.environment import Environment
from toolkit.vendor.running import read_tail, run


def command(environment: Environment, *arguments: object) -> Command:
    """The tiny vendor, asked to do something."""
    python = str(python_of(environment.folder))
    return Command("tiny", (python, "-m", "tinyvendor", *map(str, arguments)))


def test_its_cost_is_measured(environment: Environment, tmp_path: Path) -> None:
    held_bytes = 150 << 20
    cost = run(command(environment, "hold", held_bytes), tmp_path / "log", Console())
    # A bare Python is 8 to 20 MB; the upper bound says that nothing was counted twice.
    assert held_bytes < cost.peak_memory_bytes < held_bytes + (100 << 20)
    assert 0.3 <= cost.cpu_s <= cost.wall_s + 1  # the exporter burns 0.3 s of CPU
    again = cost + cost
    assert again.cpu_s == 2 * cost.cpu_s
    assert again.peak_memory_bytes == cost.peak_memory_bytes


def test_the_log_has_the_command_and_what_it_said(environment: Environment, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for size in (1, 2):  # a second command appends
        run(command(environment, "hold", size), log, Console())
    text = log.read_text()
    assert text.count("about to hold") == 2
    assert "-m tinyvendor hold 2" in text


def test_a_failure_ends_with_the_last_lines(environment: Environment, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        run(command(environment, "fail"), tmp_path / "log", Console(), advice="try another")
    assert "exit code 1" in str(caught.value)
    assert "no such architecture" in str(caught.value)
    assert "try another" in caught.value.advice
    assert str(tmp_path / "log") in caught.value.advice


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGKILL")
def test_a_kill_is_explained_as_out_of_memory(environment: Environment, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        run(command(environment, "kill"), tmp_path / "log", Console(), memory_bytes=23_700_000_000)
    assert "run out of memory" in str(caught.value)
    assert "23.7 GB" in str(caught.value)
    assert "about to kill" in str(caught.value)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"tiny: .*nothing: No such file"):
        run(Command("tiny", (str(tmp_path / "nothing"),)), tmp_path / "log", Console())


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
def test_an_interrupt_ends_all_it_started(environment: Environment, tmp_path: Path) -> None:
    started = tmp_path / "pid"
    code = (
        "import sys; from pathlib import Path; from toolkit.console import Console;"
        "from toolkit.vendor import Command; from toolkit.vendor.running import run;"
        "run(Command('tiny', tuple(sys.argv[2:])), Path(sys.argv[1]), Console())"
    )
    words = command(environment, "hang", started).argv
    ours = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "log"), *words], stderr=subprocess.DEVNULL
    )
    _wait_until(lambda: started.is_file() and started.read_text() != "")
    family = [p.pid for p in psutil.Process(ours.pid).children(recursive=True)]
    assert int(started.read_text()) in family
    ours.send_signal(signal.SIGINT)
    ours.wait(timeout=30)
    _wait_until(lambda: not any(map(_runs, family)))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_until(holds: "object") -> None:
    deadline_s = time.monotonic() + 30
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_secrets_and_our_own_python_stay_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    show = "import os; print(sorted({'HF_TOKEN', 'PYTHONPATH', 'ADDED'} & set(os.environ)))"
    run(Command("show", (sys.executable, "-c", show), {"ADDED": "1"}), tmp_path / "log", Console())
    assert read_tail(tmp_path / "log", 1) == ["['ADDED']"]


def test_of_a_progress_bar_only_its_end_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"start\n 1%|#\r 50%|##\r100%|####\n\n  \nlast\n")
    assert read_tail(log) == ["start", "100%|####", "last"]
    log.write_bytes(b"x" * 100_000 + b"\nlast \xff\n")
    assert read_tail(log, 1) == ["last \ufffd"]
