"""Run commands and measure them from outside, as whole process trees (Linux and macOS)."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from resource import struct_rusage

import psutil

SAMPLES_PER_S = 5
# The kernel counts the peak of a process in KiB, macOS in bytes.
MAXRSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


class CommandError(Exception):
    """A measured command failed; the text names it and ends with the last lines it printed."""


@dataclass(frozen=True)
class Cost:
    """What a run took.

    `largest_process_bytes` is the peak resident memory of its biggest process, `tree_bytes` that of
    all its processes together; both count mapped file pages, and the second counts shared ones
    once for each process. `others_cpu_s` is what the rest of the machine computed meanwhile.
    """

    wall_s: float
    cpu_s: float
    largest_process_bytes: int
    tree_bytes: int
    folder_bytes: int
    others_cpu_s: float

    def __add__(self, later: "Cost") -> "Cost":
        return Cost(
            wall_s=self.wall_s + later.wall_s,
            cpu_s=self.cpu_s + later.cpu_s,
            largest_process_bytes=max(self.largest_process_bytes, later.largest_process_bytes),
            tree_bytes=max(self.tree_bytes, later.tree_bytes),
            folder_bytes=max(self.folder_bytes, later.folder_bytes),
            others_cpu_s=self.others_cpu_s + later.others_cpu_s,
        )


class _Sampler:
    """Watches a process tree and a folder from a thread and keeps the largest sizes seen."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.tree_bytes = 0
        self.folder_bytes = 0
        self._pid, self._folder = pid, folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "_Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.folder_bytes = max(self.folder_bytes, measure_bytes(self._folder))

    def _watch(self) -> None:
        while not self._stop.wait(1 / SAMPLES_PER_S):
            self.tree_bytes = max(self.tree_bytes, _measure_tree_bytes(self._pid))
            self.folder_bytes = max(self.folder_bytes, measure_bytes(self._folder))


def measure_command(
    command: Sequence[str], *, log: Path, folder: Path, environment: Mapping[str, str]
) -> Cost:
    """Run `command` to its end and return its cost; `folder` is where it may write.

    What it prints goes to `log`. Raises CommandError when it does not exit with 0.
    """
    start_s, busy_s = time.perf_counter(), _measure_busy_s()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        except OSError as error:
            raise CommandError(f"{command[0]}: {error.strerror}") from error
    with _Sampler(process.pid, folder) as sampler:
        status, usage = _wait(process)
    wall_s, cpu_s = time.perf_counter() - start_s, usage.ru_utime + usage.ru_stime
    if status != 0:
        raise CommandError(f"{' '.join(command)}\nended with {status}:\n{_tail(log)}")
    return Cost(
        wall_s=wall_s,
        cpu_s=cpu_s,
        largest_process_bytes=usage.ru_maxrss * MAXRSS_UNIT_BYTES,
        tree_bytes=sampler.tree_bytes,
        folder_bytes=sampler.folder_bytes,
        others_cpu_s=max(0.0, _measure_busy_s() - busy_s - cpu_s),
    )


def measure_bytes(path: Path) -> int:
    """Return the summed size of a file, or of all files below a folder; 0 when it is missing."""
    if path.is_file():
        return path.stat().st_size
    return sum(_stat_bytes(file) for file in path.rglob("*"))


def read_through(folder: Path) -> None:
    """Read every file of `folder` once, so that each run starts with the same page cache."""
    buffer = bytearray(1 << 22)
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _wait(process: "subprocess.Popen[bytes]") -> tuple[int, struct_rusage]:
    """Wait for the process; its resource usage holds that of every descendant it waited for."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage


def _stat_bytes(file: Path) -> int:
    try:
        return 0 if file.is_dir() else file.stat().st_size
    except OSError:  # gone since it was listed
        return 0


def _measure_tree_bytes(pid: int) -> int:
    try:
        root = psutil.Process(pid)
        return sum(_rss_bytes(process) for process in [root, *root.children(recursive=True)])
    except psutil.Error:
        return 0


def _rss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # ended since it was listed
        return 0


def _measure_busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-lines:])
