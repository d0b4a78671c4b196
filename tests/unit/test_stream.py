"""The streaming engine: the same bytes from any number of workers, and a clean end of any kind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.checkpoints import write_random_checkpoint
from toolkit import fileio, stream
from toolkit.checkpoint import Checkpoint
from toolkit.errors import CheckpointError

HEADER_BYTES = 100
SMALL_TASK_WEIGHTS = 1 << 14
# Waiting for what must happen; a machine that needs longer than this is not busy but broken.
PATIENCE_S = 60


@dataclass(frozen=True)
class Copy:
    """Writes the raw weights as they are."""

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        stream.write_rows(descriptor, raw, row, offsets[0])


@dataclass(frozen=True)
class Halves:
    """Writes the lower and the upper byte of each weight to two places."""

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        pairs = raw.view(np.uint8).reshape(len(raw), -1, 2)
        for half, offset in enumerate(offsets):
            stream.write_rows(descriptor, np.ascontiguousarray(pairs[:, :, half]), row, offset)


@dataclass(frozen=True)
class Refuse:
    """Cannot hold any weight."""

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        raise ValueError(f"row {row} holds NaN")


@dataclass(frozen=True)
class Break:
    """Has a mistake in it."""

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        raise RuntimeError("a mistake")


@dataclass(frozen=True)
class Wait:
    """Says that it works, and takes its time."""

    seconds: float

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        os.write(1, b"waiting\n")  # one call, for two threads share the pipe
        time.sleep(self.seconds)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small checkpoint of bf16."""
    return Checkpoint.open(write_random_checkpoint(tmp_path_factory.mktemp("ck"), "mha"))


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make many tasks of a small checkpoint."""
    monkeypatch.setattr(stream, "TASK_WEIGHTS", SMALL_TASK_WEIGHTS)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """However a test ends."""
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def lay_out(checkpoint: Checkpoint, encoder: stream.Encoder) -> stream.DataFile:
    """Every tensor one after the other, as the raw bytes would lie."""
    pieces: list[stream.Piece] = []
    offset = 0
    for name, info in checkpoint.tensors.items():
        columns = info.shape[-1]
        rows = int(np.prod(info.shape[:-1]))
        places = (offset, offset + info.nbytes // 2) if isinstance(encoder, Halves) else (offset,)
        pieces.append(stream.Piece(name, 0, rows, columns, encoder, places))
        offset += info.nbytes
    return stream.DataFile("data", offset, tuple(pieces))


def write(
    checkpoint: Checkpoint, data: stream.DataFile, folder: Path, workers: int
) -> tuple[bytes, int]:
    """Write the data file behind a header; returns its bytes and how many `advance` was told."""
    path = folder / f"data-{workers}"
    fileio.reserve(path, HEADER_BYTES + data.size_bytes)
    told: list[int] = []
    stream.stream(checkpoint, [stream.Output(data, path, HEADER_BYTES)], workers, told.append)
    return path.read_bytes(), sum(told)


def source_bytes(checkpoint: Checkpoint) -> bytes:
    """The raw data of the checkpoint's one file, in its own order."""
    content = (checkpoint.folder / "model.safetensors").read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers_writes_the_same(
    checkpoint: Checkpoint, tmp_path: Path, workers: int
) -> None:
    content, told_bytes = write(checkpoint, lay_out(checkpoint, Copy()), tmp_path, workers)
    assert content[HEADER_BYTES:] == source_bytes(checkpoint)
    assert content[:HEADER_BYTES] == bytes(HEADER_BYTES)
    assert told_bytes == len(source_bytes(checkpoint))


@pytest.mark.parametrize("workers", [1, 2])
def test_encoder_with_two_outputs(checkpoint: Checkpoint, tmp_path: Path, workers: int) -> None:
    data = lay_out(checkpoint, Halves())
    content, _ = write(checkpoint, data, tmp_path, workers)
    for piece in data.pieces:
        raw = np.concatenate([part.copy() for _, part in checkpoint.read_rows(piece.tensor)])
        for half, offset in enumerate(piece.offsets):
            found = content[HEADER_BYTES + offset :][: raw.size]
            assert found == raw.view(np.uint8)[:, half::2].tobytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_in_pieces_and_constants(checkpoint: Checkpoint, tmp_path: Path, workers: int) -> None:
    """As a fused projection is split: queries to one place, keys and values to another."""
    name, split = "model.layers.0.self_attn.qkv_proj.weight", 300
    rows, columns = checkpoint.tensors[name].shape
    row_bytes = 2 * columns
    second = (rows - split) * row_bytes
    pieces = (
        stream.Piece(name, 0, split, columns, Copy(), (second,)),
        stream.Piece(name, split, rows - split, columns, Copy(), (0,)),
    )
    answer = np.array([42.0], np.float32)
    constant = stream.Constant(rows * row_bytes, partial(np.copy, answer))
    data = stream.DataFile("data", rows * row_bytes + 4, pieces, (constant,))
    content = write(checkpoint, data, tmp_path, workers)[0][HEADER_BYTES:]
    raw = b"".join(part.tobytes() for _, part in checkpoint.read_rows(name))
    assert content == raw[split * row_bytes :] + raw[: split * row_bytes] + answer.tobytes()


def test_without_pread(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker has files of its own, so that one's seek does not move another's."""
    monkeypatch.setattr(fileio, "HAS_POSITIONAL", False)
    content, _ = write(checkpoint, lay_out(checkpoint, Copy()), tmp_path, 3)
    assert content[HEADER_BYTES:] == source_bytes(checkpoint)


@pytest.mark.parametrize("workers", [1, 2])
def test_weight_that_cannot_be_held_is_named(
    checkpoint: Checkpoint, tmp_path: Path, workers: int
) -> None:
    data = lay_out(checkpoint, Refuse())
    first = data.pieces[0].tensor
    says = rf"{checkpoint.folder}: {first if workers == 1 else '.*'}: row \d+ holds NaN"
    with pytest.raises(CheckpointError, match=says):
        write(checkpoint, data, tmp_path, workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_in_one_worker_ends_all(
    checkpoint: Checkpoint, tmp_path: Path, workers: int
) -> None:
    slow = lay_out(checkpoint, Wait(0.01))
    first, *others = slow.pieces
    data = replace(slow, pieces=(replace(first, encoder=Break()), *others))
    fileio.reserve(tmp_path / "data", data.size_bytes)
    recorded: list[int] = []
    output = stream.Output(data, tmp_path / "data", record=recorded.extend)
    with pytest.raises(RuntimeError, match="a mistake"):
        stream.stream(checkpoint, [output], workers, lambda _: None)
    assert len(recorded) < data.weights // SMALL_TASK_WEIGHTS / 2


def test_a_task_that_cannot_be_recorded_ends_all(checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = lay_out(checkpoint, Copy())
    told: list[int] = []

    def record(numbers: Sequence[int]) -> None:
        told.extend(numbers)
        raise OSError("no space for the journal")

    fileio.reserve(tmp_path / "data", data.size_bytes)
    output = stream.Output(data, tmp_path / "data", record=record)
    with pytest.raises(OSError, match="no space for the journal"):
        stream.stream(checkpoint, [output], 2, lambda _: None)
    assert len(told) <= 2


def test_one_worker_tells_at_a_time(checkpoint: Checkpoint, tmp_path: Path) -> None:
    data = lay_out(checkpoint, Copy())
    inside: list[str] = []
    most: list[int] = []

    def tell(_: object) -> None:
        inside.append("here")
        time.sleep(0.001)  # hands over to another thread
        most.append(len(inside))
        inside.pop()

    fileio.reserve(tmp_path / "data", data.size_bytes)
    output = stream.Output(data, tmp_path / "data", record=tell)
    stream.stream(checkpoint, [output], 3, tell)
    assert max(most) == 1


def main(folder: str, out: str, kind: str, workers: str, limit_bytes: str) -> None:
    """Body of a process that the tests interrupt, kill or starve of disk."""
    stream.TASK_WEIGHTS = SMALL_TASK_WEIGHTS
    checkpoint = Checkpoint.open(Path(folder))
    encoders: dict[str, stream.Encoder] = {"slow": Wait(0.2), "copy": Copy()}
    data = lay_out(checkpoint, encoders[kind])
    fileio.reserve(Path(out), data.size_bytes)
    if int(limit_bytes):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit_bytes), int(limit_bytes)))
    stream.stream(checkpoint, [stream.Output(data, Path(out))], int(workers), lambda _: None)


Process: TypeAlias = "subprocess.Popen[str]"
Start: TypeAlias = Callable[..., Process]


@pytest.fixture
def start(checkpoint: Checkpoint, tmp_path: Path) -> Iterator[Start]:
    """Run `main` in a process group of its own, as a shell runs a command; gone after the test."""
    started: list[Process] = []

    def start_one(kind: str, workers: int, limit_bytes: int = 0) -> Process:
        out = tmp_path / f"out-{len(started)}"
        arguments = [str(checkpoint.folder), str(out), kind, str(workers), str(limit_bytes)]
        started.append(start_process(f"from {__name__} import main; main(*{arguments!r})"))
        return started[-1]

    yield start_one
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def start_process(script: str) -> Process:
    return subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__': exec({script!r})"],
        cwd=Path(__file__).parent.parent.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # A shell in the background leaves SIGINT ignored; Ctrl-C at a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupt_ends_everything(checkpoint: Checkpoint, start: Start, workers: int) -> None:
    process = start("slow", workers)
    assert process.stdout
    for _ in range(workers):
        assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    told, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1 and errors.endswith("KeyboardInterrupt\n")
    tasks = lay_out(checkpoint, Copy()).weights // SMALL_TASK_WEIGHTS
    assert told.count("waiting") < tasks / 2


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk(start: Start, workers: int) -> None:
    # A limit on the size of files gives the same refusal in the middle of writing.
    process = start("copy", workers, limit_bytes=1 << 20)
    errors = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 1
    assert "BuildError: " in errors.splitlines()[-1] and "the disk is full" in errors


@pytest.mark.parametrize("workers", [1, 2])
def test_several_outputs_in_one_pass_are_what_each_is_alone(
    checkpoint: Checkpoint, tmp_path: Path, workers: int
) -> None:
    encoders: list[stream.Encoder] = [Copy(), Halves(), Copy()]
    layouts = [lay_out(checkpoint, encoder) for encoder in encoders]
    outputs = []
    for index, data in enumerate(layouts):
        path = tmp_path / str(index)
        fileio.reserve(path, HEADER_BYTES + data.size_bytes)
        outputs.append(stream.Output(data, path, HEADER_BYTES))
    told: list[int] = []
    assert stream.stream(checkpoint, outputs, workers, told.append) == {}
    alone = []
    for index, data in enumerate(layouts[:2]):
        (tmp_path / f"alone-{index}").mkdir()
        alone.append(write(checkpoint, data, tmp_path / f"alone-{index}", 1)[0])
    assert [output.path.read_bytes() for output in outputs] == [*alone, alone[0]]
    assert sum(told) == 3 * len(source_bytes(checkpoint))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_output_that_fails_is_given_up_alone(
    checkpoint: Checkpoint, tmp_path: Path, workers: int
) -> None:
    outputs = []
    for name, encoder in (("good", Copy()), ("bad", Refuse())):
        data = lay_out(checkpoint, encoder)
        fileio.reserve(tmp_path / name, data.size_bytes)
        outputs.append(stream.Output(data, tmp_path / name))
    errors = stream.stream(checkpoint, outputs, workers, lambda _: None)
    assert list(errors) == [1]
    assert isinstance(errors[1], CheckpointError)
    assert (tmp_path / "good").read_bytes() == source_bytes(checkpoint)


@pytest.mark.parametrize("workers", [1, 2])
def test_tasks_that_were_done_before_are_left_out(
    checkpoint: Checkpoint, tmp_path: Path, workers: int
) -> None:
    data = lay_out(checkpoint, Copy())
    path = tmp_path / "data"
    recorded: list[int] = []
    for done in (set(), set(range(1, 1000, 2))):
        path.unlink(missing_ok=True)
        fileio.reserve(path, data.size_bytes)
        recorded = []
        output = stream.Output(data, path, done=done, record=recorded.extend)
        stream.stream(checkpoint, [output], workers, lambda _: None)
    assert sorted(recorded) == list(range(0, 2 * len(recorded), 2))
    assert len(recorded) > 3
    first = data.pieces[0]
    step = max(1, SMALL_TASK_WEIGHTS // first.columns)
    row_bytes = first.columns * 2
    content = path.read_bytes()
    assert content[: step * row_bytes] == source_bytes(checkpoint)[: step * row_bytes]
    assert not any(content[step * row_bytes : 2 * step * row_bytes])


@pytest.mark.parametrize("task_weights", [SMALL_TASK_WEIGHTS, 1 << 23])
def test_a_region_is_put_together_of_rows(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task_weights: int
) -> None:
    """Every second row of one tensor, some of another behind them; then two tensors woven."""
    monkeypatch.setattr(stream, "TASK_WEIGHTS", task_weights)
    names = [f"model.layers.{layer}.mlp.gate_up_proj.weight" for layer in (0, 1)]
    first, second = (
        np.concatenate([part.copy() for _, part in checkpoint.read_rows(name)]) for name in names
    )
    rows, columns = first.shape
    middle = first[1::2].nbytes + second[3:10].nbytes
    pieces = (
        stream.Piece(names[0], 1, rows // 2, columns, Copy(), (0,), step=2),
        stream.Piece(names[1], 3, 7, columns, Copy(), (0,), first=rows // 2),
        stream.Piece(names[0], 2, rows - 2, columns, Copy(), (middle,), woven=names[1]),
    )
    woven = np.stack([first[2:], second[2:]], axis=1)
    expected = b"".join(part.tobytes() for part in (first[1::2], second[3:10], woven))
    data = stream.DataFile("data", len(expected), pieces)
    content, told_bytes = write(checkpoint, data, tmp_path, 2)
    assert content[HEADER_BYTES:] == expected
    assert told_bytes == 2 * data.weights
