"""Checkpoint to data file, tensor by tensor: read rows, encode, write in place.

The layout is computed before any byte is read, so pieces can be done in any order, by several
processes, and memory stays at a few buffers whatever the model's size.
"""

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from toolkit import fileio
from toolkit.checkpoint import Checkpoint
from toolkit.errors import BuildError, CheckpointError, PhishipError
from toolkit.progress import Advance, ignore

TASK_WEIGHTS = 1 << 23
ALONE_BELOW_WEIGHTS = 1 << 25
# Parameters of mallopt (malloc.h), and the largest threshold that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 25


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


@dataclass(frozen=True)
class Output:
    """A data file to fill: already at its full size, `base` is the length of its header.

    `done` holds the numbers of the tasks that an earlier, killed run finished; `record` is told the
    number of each that is finished now.
    """

    data: DataFile
    path: Path
    base: int = 0
    done: Container[int] = ()
    record: Advance = ignore


def stream(
    checkpoint: Checkpoint, outputs: Sequence[Output], workers: int, advance: Advance
) -> dict[int, PhishipError]:
    """Fill every output in one pass over the checkpoint; returns the errors by output's index.

    Rows are taken in the checkpoint's order and go to all outputs one after the other, so that the
    disk is read once. An output whose weights cannot be held, or whose disk is full, is given up
    alone; when none is left its error is raised. `advance` is told the bytes read for each.
    BuildError when a worker died.
    """
    for output in outputs:
        _write_constants(output)
    tasks = list(_list_tasks(checkpoint, outputs))
    progress = _Progress(outputs, advance)
    paths = [output.path for output in outputs]
    weights = sum(output.data.weights for output in outputs)
    if workers <= 1 or weights < ALONE_BELOW_WEIGHTS:
        with _Work(checkpoint.folder, paths) as work:
            for task in progress.filter(tasks):
                progress.take(work.run(task))
    else:
        _run_in_processes(partial(_serve, checkpoint.folder, paths), tasks, workers, progress)
    if len(progress.errors) == len(outputs):
        raise next(iter(progress.errors.values()))
    return progress.errors


def _write_constants(output: Output) -> None:
    descriptor = fileio.open_to_write(output.path)
    try:
        for constant in output.data.constants:
            view = fileio.as_bytes(constant.make())
            fileio.write_at(descriptor, view, output.base + constant.offset)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Task:
    """A part of a piece, for one output; `number` counts the output's tasks in its own order."""

    output: int
    number: int
    piece: Piece


def _list_tasks(checkpoint: Checkpoint, outputs: Sequence[Output]) -> list[Task]:
    """Everything still to do, in the order in which the checkpoint's files hold it."""
    places = {name: (info.file, info.offset) for name, info in checkpoint.tensors.items()}
    tasks = [
        Task(index, number, piece)
        for index, output in enumerate(outputs)
        for number, piece in enumerate(_split(output.data.pieces, output.base))
        if number not in output.done
    ]
    return sorted(tasks, key=lambda task: (places[task.piece.tensor], task.piece.start))


@dataclass
class _Progress:
    """What has been done, and what went wrong, by output."""

    outputs: Sequence[Output]
    advance: Advance
    errors: dict[int, PhishipError] = field(default_factory=dict)

    def filter(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Leave out what belongs to an output that was given up meanwhile."""
        return (task for task in tasks if task.output not in self.errors)

    def take(self, answer: "Answer") -> None:
        """Note a finished task, or the error that gives its output up."""
        if answer.error is None:
            self.outputs[answer.output].record(answer.number)
            self.advance(answer.read_bytes)
        elif answer.output not in self.errors:
            kind, message, advice = answer.error
            self.errors[answer.output] = kind(message, advice=advice)


@dataclass(frozen=True)
class Answer:
    """What became of a task; an error travels as (class, message, advice)."""

    output: int
    number: int
    read_bytes: int = 0
    error: tuple[type[PhishipError], str, str] | None = None


def _split(pieces: Sequence[Piece], base: int) -> Iterator[Piece]:
    """Cut pieces into tasks of about TASK_WEIGHTS and add the header's length to offsets."""
    for piece in pieces:
        step = max(1, TASK_WEIGHTS // piece.columns)
        offsets = tuple(base + offset for offset in piece.offsets)
        for row in range(0, piece.rows, step):
            rows = min(step, piece.rows - row)
            yield replace(piece, start=piece.start + row, rows=rows, first=row, offsets=offsets)


class _Work:
    """The open ends of a worker: checkpoint and data files."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.descriptors = [fileio.open_to_write(path) for path in paths]

    def __enter__(self) -> "_Work":
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoint.close()
        for descriptor in self.descriptors:
            os.close(descriptor)

    def run(self, task: Task) -> Answer:
        """Do one task."""
        try:
            read_bytes = self._copy(task.piece, self.descriptors[task.output])
        except PhishipError as error:
            kept = (type(error), str(error), error.advice)
            return Answer(task.output, task.number, error=kept)
        return Answer(task.output, task.number, read_bytes)

    def _copy(self, piece: Piece, descriptor: int) -> int:
        read_bytes = 0
        for row, raw in self.checkpoint.read_rows(piece.tensor, piece.start, piece.rows):
            try:
                piece.encoder.write(descriptor, raw, piece.first + row - piece.start, piece.offsets)
            except ValueError as error:
                where = f"{self.checkpoint.folder}: {piece.tensor}"
                raise CheckpointError(f"{where}: {error}") from error
            read_bytes += raw.nbytes
        return read_bytes


def _keep_freed_memory() -> None:
    """Have malloc (glibc's) keep what is freed for the next piece.

    Otherwise every piece's buffers go back to the system and are cleared page by page when they
    come again, which took a quarter of a conversion's CPU time.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, 4 * KEPT_BYTES)


def _serve(folder: Path, paths: Sequence[Path], parent: Connection) -> None:
    """Worker process: do tasks until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _keep_freed_memory()
    with _Work(folder, paths) as work, suppress(EOFError, BrokenPipeError):  # The parent is gone.
        while (task := parent.recv()) is not None:
            parent.send(work.run(task))


def _run_in_processes(
    serve: Callable[[Connection], None], tasks: list[Task], workers: int, progress: _Progress
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
        _feed(workers_by_end, progress.filter(tasks), progress)
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
    workers_by_end: Mapping[Connection, BaseProcess], queue: Iterator[Task], progress: _Progress
) -> None:
    open_ends = list(workers_by_end)
    for end in open_ends:
        _hand_over(end, workers_by_end[end], next(queue, None))
    while open_ends:
        for end in cast("list[Connection]", wait(open_ends)):
            try:
                progress.take(end.recv())
            except (EOFError, OSError):
                raise _explain_death(workers_by_end[end]) from None
            task = next(queue, None)
            _hand_over(end, workers_by_end[end], task)
            if task is None:
                open_ends.remove(end)


def _hand_over(end: Connection, process: BaseProcess, task: Task | None) -> None:
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
