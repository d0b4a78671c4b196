"""Run a vendor's command: its output to a log, its cost measured, its end explained."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from toolkit.console import Console, format_bytes
from toolkit.errors import BuildError
from toolkit.vendor import Command

POLL_S = 0.2
TAIL_LINES = 12
TAIL_BYTES = 1 << 14
# The kernel counts a process's peak in KiB, macOS in bytes.
MAXRSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
# What would make the vendor's Python another one, and what no exporter needs to know.
DROPPED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@dataclass(frozen=True)
class Cost:
    """What commands took; `peak_memory_bytes` is that of the largest process, 0 on Windows;
    on Linux it is looked at five times a second."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_memory_bytes: int = 0

    def __add__(self, later: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(
            self.wall_s + later.wall_s,
            self.cpu_s + later.cpu_s,
            max(self.peak_memory_bytes, later.peak_memory_bytes),
        )


def run(
    command: Command, log: Path, console: Console, *, memory_bytes: int = 0, advice: str = ""
) -> Cost:
    """Run a command to its end, its output appended to `log`, and return what it took.

    BuildError when it cannot start, fails, or is killed; the error carries the log's last lines.
    `memory_bytes`, the predicted need, is named when the command was killed. An interrupt ends the
    command and every process it started.
    """
    started_s = time.monotonic()
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command.argv)}\n".encode())
        output.flush()
        try:
            process = subprocess.Popen(
                command.argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                env=_environment(command.variables), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BuildError(f"{command.name}: {command.argv[0]}: {error.strerror}") from error
    cpu_s, peak_bytes = _wait(process, command.name, log, console)
    if process.returncode:
        raise _explain(command, process.returncode, log, memory_bytes, advice)
    return Cost(time.monotonic() - started_s, cpu_s, peak_bytes)


def read_tail(log: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log; of a progress bar what it shows in the end."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL_BYTES))
        text = stream.read().decode("utf-8", "replace")
    shown = [line.split("\r")[-1].rstrip() for line in text.rstrip("\r\n ").split("\n")]
    return [line for line in shown if line][-lines:]


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
    return {**kept, "PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1", **variables}


def _wait(
    process: "subprocess.Popen[bytes]", name: str, log: Path, console: Console
) -> tuple[float, int]:
    """Wait for the end; CPU seconds and peak memory of the process and those it waited for."""
    peak_bytes = 0
    try:
        with console.waiting(name) as tell:
            while True:
                if sys.platform == "win32":
                    if process.poll() is not None:
                        return 0.0, 0
                else:
                    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                    if pid:
                        process.returncode = os.waitstatus_to_exitcode(status)
                        cpu_s = usage.ru_utime + usage.ru_stime
                        return cpu_s, peak_bytes or usage.ru_maxrss * MAXRSS_UNIT_BYTES
                peak_bytes = max(peak_bytes, _read_peak(process.pid))
                time.sleep(POLL_S)
                tell("".join(read_tail(log, 1)))
    except BaseException:
        _kill(process)
        raise


def _read_peak(pid: int) -> int:
    """Peak memory of the largest process of a tree so far; 0 where there is no /proc.

    What wait4 gives counts the memory of this process as well, which the child had until its exec.
    """
    largest = 0
    with suppress(psutil.Error):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
                found = re.search(r"VmHWM:\s+(\d+) kB", status)
                largest = max(largest, int(found[1]) << 10 if found else 0)
    return largest


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all it started; they are a group of their own."""
    if process.returncode is not None:
        return
    if sys.platform == "win32":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _explain(
    command: Command, status: int, log: Path, memory_bytes: int, advice: str
) -> BuildError:
    last = "\n  ".join(read_tail(log))
    if status == -getattr(signal, "SIGKILL", 9):
        need = f"; it was predicted to take {format_bytes(memory_bytes)}" if memory_bytes else ""
        return BuildError(
            f"{command.name} was killed from outside, which is what a system does that has run out "
            f"of memory{need}. Its last lines:\n  {last}",
            advice=f"{advice or 'free memory and try again'}; the whole log: {log}",
        )
    how = f"signal {-status}" if status < 0 else f"exit code {status}"
    return BuildError(
        f"{command.name} ended with {how}. Its last lines:\n  {last}",
        advice="; ".join(filter(None, [advice, f"the whole log: {log}"])),
    )
