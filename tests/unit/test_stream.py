"""The streaming engine: the same bytes from any number of workers, and a clean end of any kind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from tests.checkpoints import write_random_checkpoint
from toolkit import fileio, stream
from toolkit.checkpoint import Checkpoint
from toolkit.errors import BuildError, CheckpointError

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
class Die:
    """Ends its process, by a signal or with an exit code."""

    signal: int = 0
    code: int = 0

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        if self.signal:
            os.kill(os.getpid(), self.signal)
        os._exit(self.code)


@dataclass(frozen=True)
class Wait:
    """Says that it works, and takes its time."""

    seconds: float

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        os.write(1, b"waiting\n")  # One call: two workers share this pipe.
        time.sleep(self.seconds)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A small checkpoint of bf16."""
    return Checkpoint.open(write_random_checkpoint(tmp_path_factory.mktemp("ck"), "mha"))


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make many tasks of a small checkpoint, and let workers take them."""
    make_small_tasks(partial(monkeypatch.setattr, stream))


def make_small_tasks(set_constant: Callable[[str, int], None]) -> None:
    set_constant("TASK_WEIGHTS", SMALL_TASK_WEIGHTS)
    set_constant("ALONE_BELOW_WEIGHTS", 1)


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


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Worker processes, zombies included; not what other tests of this process have running."""
    found = []
    for child in process.children(recursive=True):
        try:
            is_worker = "spawn_main" in " ".join(child.cmdline())
        except psutil.ZombieProcess:
            is_worker = child.name().startswith("python")
        if is_worker:
            found.append(child)
    return found


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_any_number_of_workers_writes_the_same(
    checkpoint: Checkpoint, tmp_path: Path, workers: int
) -> None:
    content, told_bytes = write(checkpoint, lay_out(checkpoint, Copy()), tmp_path, workers)
    assert content[HEADER_BYTES:] == source_bytes(checkpoint)
    assert content[:HEADER_BYTES] == bytes(HEADER_BYTES)
    assert told_bytes == len(source_bytes(checkpoint))
    assert not workers_of(psutil.Process())


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


def test_small_models_need_no_worker(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = lay_out(checkpoint, Die(code=3))
    monkeypatch.setattr(stream, "ALONE_BELOW_WEIGHTS", data.weights + 1)
    monkeypatch.setattr(os, "_exit", lambda code: None)  # Would end this process.
    assert write(checkpoint, data, tmp_path, 2)[1] == 2 * data.weights


def test_without_pread(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fileio, "HAS_POSITIONAL", False)
    content, _ = write(checkpoint, lay_out(checkpoint, Copy()), tmp_path, 1)
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
    assert not workers_of(psutil.Process())


@pytest.mark.parametrize(
    ("encoder", "says"),
    [
        (Die(signal=signal.SIGKILL), "a worker process was killed by SIGKILL"),
        (Die(signal=signal.SIGSEGV), "a worker process was killed by SIGSEGV"),
        (Die(signal=40), "a worker process was killed by signal 40"),
        (Die(code=3), "a worker process failed with exit code 3"),
    ],
)
def test_dead_worker_is_explained(
    checkpoint: Checkpoint, tmp_path: Path, encoder: Die, says: str
) -> None:
    with pytest.raises(BuildError, match=says) as caught:
        write(checkpoint, lay_out(checkpoint, encoder), tmp_path, 2)
    assert ("--workers" in caught.value.advice) == bool(encoder.signal)
    assert not workers_of(psutil.Process())


def main(folder: str, out: str, kind: str, workers: str, limit_bytes: str) -> None:
    """Body of a process that the tests interrupt, kill or starve of disk."""
    make_small_tasks(partial(setattr, stream))
    checkpoint = Checkpoint.open(Path(folder))
    encoders = {"wait": Wait(3600), "slow": Wait(0.1), "copy": Copy()}
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


def wait_for_workers(process: Process, count: int) -> list[psutil.Process]:
    assert process.stdout
    for _ in range(count):
        assert process.stdout.readline() == "waiting\n"
    return workers_of(psutil.Process(process.pid))


@pytest.mark.parametrize("whole_group", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_interrupt_ends_everything(start: Start, workers: int, whole_group: bool) -> None:
    process = start("wait", workers)
    children = wait_for_workers(process, workers)
    assert len(children) == (2 if workers == 2 else 0)
    if whole_group:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1 and errors.endswith("KeyboardInterrupt\n")
    assert not psutil.wait_procs(children, PATIENCE_S)[1]


def test_interrupt_while_workers_start(start: Start) -> None:
    """They are importing then, and must not print tracebacks of their own."""
    process = start("wait", 2)
    parent = psutil.Process(process.pid)
    while not (children := workers_of(parent)):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=PATIENCE_S)[1]
    assert errors.count("Traceback") == 1, errors
    assert not psutil.wait_procs(children, PATIENCE_S)[1]


INTERRUPTED = """
import signal, threading, time
from toolkit import stream

end = threading.Event()
other = threading.Thread(target=end.wait)  # libraries of linear algebra bring their own
other.start()
try:
    with stream._interrupt_held_back():
        signal.pthread_kill(other.ident, signal.SIGINT)
        time.sleep(0.5)
        print("started")
except KeyboardInterrupt:
    print("interrupted")
end.set()
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_interrupt_waits_until_a_worker_is_started() -> None:
    """However many threads there are; in a process of its own, which a failure would end."""
    told = subprocess.check_output([sys.executable, "-c", INTERRUPTED], text=True)
    assert told.split() == ["started", "interrupted", "True"]


def test_worker_is_started_deaf_to_interrupts() -> None:
    script = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with stream._interrupt_held_back():
        told = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert told == "True\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_killed_parent_takes_its_workers_with_it(start: Start) -> None:
    process = start("slow", 2)
    children = wait_for_workers(process, 2)
    process.kill()
    errors = process.communicate(timeout=PATIENCE_S)[1]
    assert not psutil.wait_procs(children, PATIENCE_S)[1]
    assert "Traceback" not in errors, errors


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
        output = stream.Output(data, path, done=done, record=recorded.append)
        stream.stream(checkpoint, [output], workers, lambda _: None)
    assert sorted(recorded) == list(range(0, 2 * len(recorded), 2))
    assert len(recorded) > 3
    first = data.pieces[0]
    step = max(1, SMALL_TASK_WEIGHTS // first.columns)
    row_bytes = first.columns * 2
    content = path.read_bytes()
    assert content[: step * row_bytes] == source_bytes(checkpoint)[: step * row_bytes]
    assert not any(content[step * row_bytes : 2 * step * row_bytes])
