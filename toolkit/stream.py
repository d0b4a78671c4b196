"""Checkpoint to data file, tensor by tensor: read rows, encode, write in place.

The layout is computed before any byte is read, so pieces can be done in any order, by several
processes, and memory stays at a few buffers whatever the model's size.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from toolkit import fileio
from toolkit.checkpoint import Checkpoint
from toolkit.errors import BuildError, CheckpointError, PhishipError
from toolkit.progress import Advance

TASK_WEIGHTS = 1 << 23
ALONE_BELOW_WEIGHTS = 1 << 25
# What a worker answers: the bytes read, or the error as (class, message, advice).
Answer = int | tuple[type[PhishipError], str, str]


class Encoder(Protocol):
    """Turns rows of a tensor into bytes of the data file; picklable."""

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Encode raw [rows, columns] whose first row is `row` of the output; write it in place.

        `offsets` are where the outputs of row 0 lie. ValueError names a weight that cannot be held.
        """


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor and where their encoding goes: output row 0 is tensor row `start`."""

    tensor: str
    start: int
    rows: int
    columns: int
    encoder: Encoder
    offsets: tuple[int, ...]
    first: int = 0

    @property
    def weights(self) -> int:
        """How many weights the piece covers."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Constant:
    """A small array that is computed, not read: `make` runs when it is written."""

    offset: int
    make: Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class DataFile:
    """The layout of an artifact's one large file; offsets count from the end of its header."""

    name: str
    size_bytes: int
    pieces: tuple[Piece, ...]
    constants: tuple[Constant, ...] = ()

    @property
    def weights(self) -> int:
        """How many weights are read and encoded."""
        return sum(piece.weights for piece in self.pieces)


def write_rows(descriptor: int, rows: NDArray[Any], row: int, offset: int) -> None:
    """Write a contiguous [rows, ...] array whose first row is `row` of a region at `offset`."""
    view = fileio.as_bytes(rows)
    fileio.write_at(descriptor, view, offset + row * (len(view) // len(rows)))


def stream(
    checkpoint: Checkpoint, data: DataFile, path: Path, base: int, workers: int, advance: Advance
) -> None:
    """Fill `path` (already at its full size) from the checkpoint; `base` is the header's length.

    `advance` is told the bytes read. Raises what a worker raised; BuildError when one died.
    """
    descriptor = fileio.open_to_write(path)
    try:
        for constant in data.constants:
            fileio.write_at(descriptor, fileio.as_bytes(constant.make()), base + constant.offset)
    finally:
        os.close(descriptor)
    tasks = list(_split(data.pieces, base))
    if workers <= 1 or data.weights < ALONE_BELOW_WEIGHTS:
        with _Work(checkpoint.folder, path) as work:
            for task in tasks:
                advance(work.run(task))
    else:
        _run_in_processes(partial(_serve, checkpoint.folder, path), tasks, workers, advance)


def _split(pieces: Sequence[Piece], base: int) -> Iterator[Piece]:
    """Cut pieces into tasks of about TASK_WEIGHTS and add the header's length to offsets."""
    for piece in pieces:
        step = max(1, TASK_WEIGHTS // piece.columns)
        offsets = tuple(base + offset for offset in piece.offsets)
        for row in range(0, piece.rows, step):
            rows = min(step, piece.rows - row)
            yield replace(piece, start=piece.start + row, rows=rows, first=row, offsets=offsets)


class _Work:
    """The two open ends of a worker: checkpoint and data file."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.descriptor = fileio.open_to_write(path)

    def __enter__(self) -> "_Work":
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()
        os.close(self.descriptor)

    def run(self, task: Piece) -> int:
        """Do one task; returns the bytes read."""
        read_bytes = 0
        for row, raw in self.checkpoint.read_rows(task.tensor, task.start, task.rows):
            try:
                output_row = task.first + row - task.start
                task.encoder.write(self.descriptor, raw, output_row, task.offsets)
            except ValueError as error:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {task.tensor}: {error}"
                ) from error
            read_bytes += raw.nbytes
        return read_bytes


def _serve(folder: Path, path: Path, parent: Connection) -> None:
    """Worker process: answer each task with the bytes read, or with the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with _Work(folder, path) as work, suppress(EOFError, BrokenPipeError):  # The parent is gone.
        while (task := parent.recv()) is not None:
            try:
                answer: Answer = work.run(task)
            except PhishipError as error:
                answer = (type(error), str(error), error.advice)
            parent.send(answer)


def _run_in_processes(
    serve: Callable[[Connection], None], tasks: list[Piece], workers: int, advance: Advance
) -> None:
    """Hand tasks to spawned processes as they become free; stop all of them on any way out."""
    context = multiprocessing.get_context("spawn")
    workers_by_end: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(min(workers, len(tasks))):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            with _interrupt_held_back():
                process.start()
                workers_by_end[ours] = process
            theirs.close()
        _feed(workers_by_end, iter(tasks), advance)
        for worker in workers_by_end.values():
            worker.join()
    finally:
        for end, worker in workers_by_end.items():
            worker.kill()
            worker.join()
            end.close()


@contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Let Ctrl-C wait while a process is being started; half started it could not be ended.

    The child inherits the mask, so it prints no traceback of its own while it imports. The mask is
    this thread's alone, so the parent needs the handler as well; only the main thread may set one.
    """
    caught: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda *_: caught.append(1)) if is_main else None
    has_mask = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if has_mask else None
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, handler)
        if caught:
            signal.raise_signal(signal.SIGINT)


def _feed(
    workers_by_end: Mapping[Connection, BaseProcess], queue: Iterator[Piece], advance: Advance
) -> None:
    open_ends = list(workers_by_end)
    for end in open_ends:
        _hand_over(end, workers_by_end[end], next(queue, None))
    while open_ends:
        for end in cast("list[Connection]", wait(open_ends)):
            try:
                answer: Answer = end.recv()
            except (EOFError, OSError):
                raise _explain_death(workers_by_end[end]) from None
            if isinstance(answer, tuple):
                kind, message, advice = answer
                raise kind(message, advice=advice)
            advance(answer)
            task = next(queue, None)
            _hand_over(end, workers_by_end[end], task)
            if task is None:
                open_ends.remove(end)


def _hand_over(end: Connection, process: BaseProcess, task: Piece | None) -> None:
    try:
        end.send(task)
    except OSError:
        raise _explain_death(process) from None


def _explain_death(process: BaseProcess) -> BuildError:
    process.join(timeout=5)
    code = process.exitcode or 0
    if code >= 0:
        return BuildError(f"a worker process failed with exit code {code}; its error stands above")
    names = {known.value: known.name for known in signal.Signals}
    return BuildError(
        f"a worker process was killed by {names.get(-code, f'signal {-code}')}",
        advice="SIGKILL most likely means that memory ran out: give fewer --workers",
    )
