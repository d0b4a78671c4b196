"""Where an artifact grows: a hidden folder beside its final path, published by one rename.

However a build ends, the folder goes, but for one case: the process is killed. Then the next build
of the same plan and source takes the folder over and goes on after the tasks its journal names.
What a killed process wrote is in the system's cache, so this holds within one boot only; after a
power cut the folder is thrown away.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

from toolkit import artifact, fileio
from toolkit.artifact import Manifest
from toolkit.console import Console, format_bytes
from toolkit.errors import BuildError

JOURNAL = ".journal"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass
class Staging:
    """The folder of one build; `done` are the tasks that a killed build finished in it."""

    folder: Path
    final: Path
    done: frozenset[int] = frozenset()
    _journal: int = field(default=-1, repr=False)

    @property
    def is_resumed(self) -> bool:
        """True when a killed build's work is gone on with."""
        return bool(self.done)

    def record(self, tasks: Sequence[int]) -> None:
        """Note finished tasks, all or none of them, for the case that this process is killed."""
        os.write(self._journal, "".join(f"{task}\n" for task in tasks).encode())

    def discard(self) -> None:
        """Remove the folder, unless it was published."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, manifest: Manifest, console: Console) -> Manifest:
        """Make everything durable, write the manifest last, move the folder to its final path."""
        (self.folder / JOURNAL).unlink()
        paths = artifact.content_paths(self.folder)
        with console.progress("seal", sum(path.stat().st_size for path in paths)) as advance:
            for path in paths:
                fileio.sync(path)
            files = artifact.list_files(self.folder, advance)
        sealed = msgspec.structs.replace(manifest, files=files)
        artifact.write_manifest(self.folder, sealed)
        fileio.sync_folder(self.folder)
        self._move()
        return sealed

    def _move(self) -> None:
        """One rename; an artifact to replace steps aside first."""
        aside = self.final.with_name(f".{self.final.name}.{os.getpid()}.old.partial")
        if self.final.exists():
            self.final.rename(aside)
        self.folder.rename(self.final)
        fileio.sync_folder(self.final.parent)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def stage(out: Path, name: str, key: str) -> Iterator[Staging]:
    """A folder to build `out`/`name` in, gone again however the block ends.

    `key` says what is built: a dead build's folder of the same name and key is taken over, others
    are removed. OSErrors of the block become BuildErrors.
    """
    folder = out / f".{name}.{os.getpid()}.partial"
    key = f"{key} {_boot_id()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        done = _take_over(out, name, key, folder)
        journal = os.open(folder / JOURNAL, os.O_WRONLY | os.O_APPEND)
        try:
            yield Staging(folder, out / name, done, journal)
        finally:
            os.close(journal)
    except OSError as error:
        raise fileio.explain_write_error(error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free_disk(out: Path, size_bytes: int) -> None:
    """BuildError when `out`, an existing folder, cannot hold what is to be built."""
    free_bytes = shutil.disk_usage(out).free
    if free_bytes < size_bytes:
        raise BuildError(
            f"{out}: {format_bytes(free_bytes)} free; to be written: {format_bytes(size_bytes)}",
            advice="free space or choose another --out",
        )


def _take_over(out: Path, name: str, key: str, folder: Path) -> frozenset[int]:
    """Make `folder`, of a dead build's when one fits; returns the tasks it finished."""
    done: frozenset[int] = frozenset()
    for stale in out.glob(f".{name}.*.partial"):
        pid = stale.name.split(".")[-2]
        if pid.isdigit() and psutil.pid_exists(int(pid)):
            continue
        found = _read_journal(stale / JOURNAL, key)
        if found and not folder.exists():
            stale.rename(folder)
            done = found
        else:
            shutil.rmtree(stale, ignore_errors=True)
    if not done:
        folder.mkdir()
    _write_journal(folder / JOURNAL, key, done)
    return done


def _write_journal(path: Path, key: str, done: frozenset[int]) -> None:
    lines = [json.dumps(key), *map(str, sorted(done))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_journal(path: Path, key: str) -> frozenset[int]:
    """Tasks that were finished for this key; a last line without its end does not count."""
    try:
        first, *lines = path.read_text("utf-8").split("\n")[:-1]
    except (OSError, ValueError):
        return frozenset()
    if first != json.dumps(key):
        return frozenset()
    return frozenset(int(line) for line in lines if line.isdigit())


def _boot_id() -> str:
    """The same for as long as the machine runs."""
    try:
        return BOOT_ID.read_text("utf-8").strip()
    except OSError:
        return str(round(psutil.boot_time(), -1))
