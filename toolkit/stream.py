"""Checkpoint to data file, tensor by tensor: read rows, encode, write in place.

The layout is computed before any byte is read, so pieces can be done in any order, by several
threads, and memory stays at a few buffers whatever the model's size.
"""

import ctypes
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from toolkit import fileio
from toolkit.checkpoint import PIECE_WEIGHTS, Checkpoint, to_float32
from toolkit.errors import CheckpointError, PhishipError
from toolkit.progress import Advance

TASK_WEIGHTS = 1 << 23
# Parameters of mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 23  # the largest buffer of a piece
LOOK_UP_S = 1.0  # On Windows Ctrl-C is noticed only between two waits.


class Encoder(Protocol):
    """Turns rows of a tensor into bytes of the data file; several threads use it at once."""

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Encode raw [rows, columns] whose first row is `row` of the output; write it in place.

        `offsets` are where the outputs of row 0 lie. ValueError names a weight that cannot be held.
        """


@dataclass(frozen=True)
class Fold:
    """What is done to weights before they are encoded: a mean taken away, then a scale.

    `mean` is that of each row, or that of each column over all rows of its tensor.
    """

    mean: Literal["none", "rows", "columns"] = "none"
    scale: float = 1.0

    def apply(self, checkpoint: Checkpoint, tensor: str, raw: NDArray[Any]) -> NDArray[Any]:
        """Rows of a tensor, raw, as float32 [rows, columns]."""
        weights = to_float32(raw)
        if self.mean == "rows":
            weights = weights - weights.mean(axis=1, keepdims=True, dtype=np.float64)
        elif self.mean == "columns":
            weights = weights - checkpoint.read_column_means(tensor)
        folded: NDArray[Any] = (weights * np.float32(self.scale)).astype(np.float32, copy=False)
        return folded


@dataclass(frozen=True)
class Piece:
    """Rows of one tensor and where their encoding goes.

    Output row `first` is tensor row `start`; with a `step` those between are another piece's. With
    `woven`, another tensor, its rows come each behind the same row of the first, twice as many.
    """

    tensor: str
    start: int
    rows: int
    columns: int
    encoder: Encoder
    offsets: tuple[int, ...]
    first: int = 0
    step: int = 1
    woven: str = ""
    fold: Fold | None = None

    @property
    def weights(self) -> int:
        """How many weights the piece covers."""
        return self.rows * self.columns * len(self.sources)

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors that it has rows of."""
        return (self.tensor, self.woven) if self.woven else (self.tensor,)


@dataclass(frozen=True)
class Constant:
    """A small array that is computed, not read: `make` runs when it is written."""

    offset: int
    make: Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class DataFile:
    """The layout of an artifact's one large file; offsets count from the end of its header.

    With `others` it is cut into files: each one's name and the offset at which it begins, in
    order. A piece lies in one file; only a file that is whole has a header.
    """

    name: str
    size_bytes: int
    pieces: tuple[Piece, ...]
    constants: tuple[Constant, ...] = ()
    others: tuple[tuple[str, int], ...] = ()

    @property
    def spans(self) -> list[tuple[str, int, int]]:
        """The name of each file, the offset at which it begins, and its size in bytes."""
        names, starts = zip((self.name, 0), *self.others, strict=True)
        ends = (*starts[1:], self.size_bytes)
        return [(n, a, b - a) for n, a, b in zip(names, starts, ends, strict=True)]

    @property
    def weights(self) -> int:
        """How many weights are read and encoded."""
        return sum(piece.weights for piece in self.pieces)


def read_piece(
    checkpoint: Checkpoint, piece: Piece, most_weights: int = PIECE_WEIGHTS
) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield (output row, raw rows) of a piece, folded, about `most_weights` at a time."""
    if piece.fold and piece.fold.mean == "columns":
        checkpoint.read_column_means(piece.tensor)  # first, for rows are read one loop at a time
    for row, raw in _read_rows(checkpoint, piece, most_weights):
        yield row, piece.fold.apply(checkpoint, piece.tensor, raw) if piece.fold else raw


def _read_rows(
    checkpoint: Checkpoint, piece: Piece, most_weights: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    step, columns = piece.step * len(piece.sources), piece.columns
    if step == 1:
        for row, raw in checkpoint.read_rows(piece.tensor, piece.start, piece.rows, most_weights):
            yield piece.first + row - piece.start, raw
        return
    each = max(1, most_weights // (columns * step))
    for done in range(0, piece.rows, each):
        count = min(each, piece.rows - done)
        start, span = piece.start + done * piece.step, (count - 1) * piece.step + 1
        parts = []
        for name in piece.sources:
            # Copies, for a checkpoint may read each piece into the same buffer.
            rows = [raw.copy() for _, raw in checkpoint.read_rows(name, start, span)]
            parts.append(np.concatenate(rows)[:: piece.step])
        if len({part.dtype for part in parts}) > 1:  # bf16 comes as bits
            parts = [to_float32(part) for part in parts]
        woven = np.stack(parts, axis=1).reshape(-1, columns)
        yield (piece.first + done) * len(parts), woven


def write_rows(descriptor: int, rows: NDArray[Any], row: int, offset: int) -> None:
    """Write a contiguous [rows, ...] array whose first row is `row` of a region at `offset`."""
    view = fileio.as_bytes(rows)
    fileio.write_at(descriptor, view, offset + row * (len(view) // len(rows)))


def _forget(_: Sequence[int]) -> None:
    """Keeps no journal."""


@dataclass(frozen=True)
class Output:
    """A data file to fill: already at its full size, `base` is the length of its header.

    `done` holds the numbers of the tasks that an earlier, killed run finished; `record` is told the
    numbers of those that are finished now, together where they belong together.
    """

    data: DataFile
    path: Path
    base: int = 0
    done: Container[int] = ()
    record: Callable[[Sequence[int]], None] = _forget


def open_output(
    data: DataFile, folder: Path, header: bytes, done: Container[int] = (),
    record: Callable[[Sequence[int]], None] = _forget, *, is_resumed: bool = False,
) -> Output:  # fmt: skip
    """The data file in `folder` with its header written, at its full size.

    BuildError when the disk is full, or when a file is there already and nothing is resumed.
    """
    path = folder / data.name
    for name, start, size_bytes in () if is_resumed else data.spans:
        fileio.reserve(folder / name, size_bytes + (0 if start else len(header)))
    fileio.write_start(path, header)
    return Output(data, path, len(header), done, record)


def stream(
    checkpoint: Checkpoint, outputs: Sequence[Output], workers: int, advance: Advance
) -> dict[int, PhishipError]:
    """Fill every output in one pass over the checkpoint; returns the errors by output's index.

    Rows are taken in the checkpoint's order and go to all outputs one after the other, so that the
    disk is read once. An output whose weights cannot be held, or whose disk is full, is given up
    alone; when none is left its error is raised. `advance` is told the bytes read for each; it and
    the outputs' `record` are called from the workers' threads, one call at a time. No thread is
    left on any way out.
    """
    _keep_freed_memory()
    for output in outputs:
        _write_constants(output)
    work = _Work(outputs, advance, iter(_order_tasks(checkpoint, outputs)))
    with ThreadPoolExecutor(max(1, workers)) as pool, work:
        pending = {pool.submit(_serve, checkpoint, work) for _ in range(max(1, workers))}
        while pending:
            done, pending = wait(pending, LOOK_UP_S, return_when=FIRST_EXCEPTION)
            for worker in done:
                worker.result()
    if len(work.errors) == len(outputs):
        raise next(iter(work.errors.values()))
    return work.errors


def _write_constants(output: Output) -> None:
    with _Target(output) as target:
        for constant in output.data.constants:
            view = fileio.as_bytes(constant.make())
            descriptor, (offset,) = target.find((output.base + constant.offset,))
            fileio.write_at(descriptor, view, offset)


class _Target:
    """The files of an output, open to be written in place."""

    def __init__(self, output: Output) -> None:
        self._starts = [start for _, start, _ in output.data.spans]
        self._paths = [output.path.with_name(name) for name, *_ in output.data.spans]
        self._paths[0] = output.path
        self._descriptors: list[int] = []

    def __enter__(self) -> "_Target":
        self._descriptors = [fileio.open_to_write(path) for path in self._paths]
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def find(self, offsets: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """The file that offsets lie in, and where they lie in it."""
        place = bisect_right(self._starts, offsets[0]) - 1
        start = self._starts[place]
        return self._descriptors[place], tuple(offset - start for offset in offsets)


@dataclass(frozen=True)
class Task:
    """A part of a piece, for one output; `number` counts the output's tasks in its own order."""

    output: int
    number: int
    piece: Piece


def _order_tasks(checkpoint: Checkpoint, outputs: Sequence[Output]) -> list[Task]:
    """Everything still to do, in the order in which the checkpoint's files hold it."""
    places = {name: (info.file, info.offset) for name, info in checkpoint.tensors.items()}
    tasks = [
        Task(index, number, piece)
        for index, output in enumerate(outputs)
        for number, piece in list_tasks(output)
        if number not in output.done
    ]
    return sorted(tasks, key=lambda task: (places[task.piece.tensor], task.piece.start))


def list_tasks(output: Output) -> Iterator[tuple[int, Piece]]:
    """Every task of an output by its number, done or not: parts of pieces, offsets in the file."""
    return enumerate(_split(output.data.pieces, output.base))


def _split(pieces: Sequence[Piece], base: int) -> Iterator[Piece]:
    """Cut pieces into tasks of about TASK_WEIGHTS and add the header's length to offsets."""
    for piece in pieces:
        most = max(1, TASK_WEIGHTS // (piece.columns * piece.step * len(piece.sources)))
        offsets = tuple(base + offset for offset in piece.offsets)
        for row in range(0, piece.rows, most):
            start, first = piece.start + row * piece.step, piece.first + row
            rows = min(most, piece.rows - row)
            yield replace(piece, start=start, rows=rows, first=first, offsets=offsets)


@dataclass
class _Work:
    """What the workers share: tasks to take, and what became of them. Closed at its end."""

    outputs: Sequence[Output]
    advance: Advance
    tasks: Iterator[Task]
    errors: dict[int, PhishipError] = field(default_factory=dict)
    is_closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> "_Work":
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True

    def take(self) -> Iterator[Task]:
        """Hand out tasks, but for those of an output that was given up meanwhile."""
        while not self.is_closed:
            with self._lock:
                task = next((t for t in self.tasks if t.output not in self.errors), None)
            if task is None:
                return
            yield task

    def finish(self, task: Task, read_bytes: int) -> None:
        """Note that a task is done."""
        with self._lock:
            self.outputs[task.output].record([task.number])
            self.advance(read_bytes)

    def give_up(self, task: Task, error: PhishipError) -> None:
        """Leave the task's output as it is; its first error counts."""
        with self._lock:
            self.errors.setdefault(task.output, error)


@cache
def _keep_freed_memory() -> None:
    """Have malloc (glibc's) keep what is freed for the next piece.

    Otherwise every piece's buffers go back to the system and are cleared page by page when they
    come again, which took a quarter of a conversion's CPU time.
    """
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(M_TRIM_THRESHOLD, 4 * KEPT_BYTES)


def _serve(source: Checkpoint, work: _Work) -> None:
    """Worker: do tasks until there are no more, with open files and buffers of its own."""
    with ExitStack() as files:
        checkpoint = files.enter_context(closing(source.reopen()))
        targets = [files.enter_context(_Target(output)) for output in work.outputs]
        for task in work.take():
            _do(task, checkpoint, targets[task.output], work)


def _do(task: Task, checkpoint: Checkpoint, target: _Target, work: _Work) -> None:
    """Read, encode and write one task part by part; leave it when all is to end."""
    piece, read_bytes = task.piece, 0
    descriptor, offsets = target.find(piece.offsets)
    try:
        for row, raw in read_piece(checkpoint, piece):
            if work.is_closed:
                return
            piece.encoder.write(descriptor, raw, row, offsets)
            read_bytes += raw.size * checkpoint.tensors[piece.tensor].item_bytes
    except PhishipError as error:
        work.give_up(task, error)
    except ValueError as error:
        work.give_up(task, CheckpointError(f"{checkpoint.folder}: {piece.tensor}: {error}"))
    else:
        work.finish(task, read_bytes)
