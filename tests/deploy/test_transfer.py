"""Transfer: right bytes durably there, or nothing; what is there is not sent again."""

import dataclasses
import json
import os
import random
import signal as signals
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from tests.deploy.sealed import make_blob
from tests.deploy.sshd import OpenSSH
from toolkit.artifact import hash_file
from toolkit.device import Device
from toolkit.errors import ArtifactError, PreflightError, RunnerError, UnreachableError
from toolkit.progress import Ignored
from toolkit.runner.agent.blobs import PREFIX_STEP_BYTES
from toolkit.ssh.bundle import pack_runner
from toolkit.ssh.channel import ChannelStream
from toolkit.ssh.embedded import EmbeddedDevice
from toolkit.ssh.login import log_in
from toolkit.ssh.session import Session, build_command, open_session
from toolkit.ssh.transfer import Blob, Part, find_missing, send_parts

SIZE_BYTES = 3_000_000


@contextmanager
def pushing(device: Device) -> Iterator[Session]:
    """A session that holds the lock."""
    with open_session(device) as session:
        session.lock()
        yield session


def find_base(session: Session) -> Path:
    return Path(session.call("status")["root"])


def send(session: Session, *blobs: Blob) -> None:
    send_parts(session, [Part(blob, 0) for blob in blobs], Ignored())


def make_blobs(folder: Path) -> list[Blob]:
    folder.mkdir()
    contents = {"big": bytes(range(250)) * (SIZE_BYTES // 250), "one": b"1", "empty": b""}
    return [make_blob(folder / name, content) for name, content in contents.items()]


class Counter(Ignored):
    """A progress bar that remembers."""

    def __init__(self) -> None:
        self.bytes = 0
        self.parts: list[str] = []

    def __call__(self, count: int) -> None:
        self.bytes += count

    def show(self, part: str) -> None:
        self.parts.append(part)


def test_push_then_push_again(device: Device, tmp_path: Path) -> None:
    blobs = make_blobs(tmp_path / "files")
    counter = Counter()
    with pushing(device) as session:
        missing = find_missing(session, [*blobs, blobs[0]])
        assert [part.blob for part in missing.parts] == blobs
        assert (missing.size_bytes, missing.resumed_bytes) == (SIZE_BYTES + 1, 0)
        send_parts(session, missing.parts, counter)
        assert counter.bytes == missing.size_bytes
        assert counter.parts == ["big (1 of 3)", "one (2 of 3)", "empty (3 of 3)"]
        assert find_missing(session, blobs).parts == ()
        base = find_base(session)
    for blob in blobs:
        path = base / "blobs" / "sha256" / blob.sha256
        assert path.read_bytes() == blob.path.read_bytes()
        assert path.stat().st_mode & 0o777 == 0o444
    assert list((base / "incoming").iterdir()) == []


def test_other_bytes_than_announced_are_refused(device: Device, tmp_path: Path) -> None:
    """A file that changed here after its manifest was written; the session goes on."""
    blob = make_blob(tmp_path / "file", b"a" * SIZE_BYTES)
    blob.path.write_bytes(b"a" * (SIZE_BYTES - 1) + b"b")
    with pushing(device) as session:
        with pytest.raises(ArtifactError, match=blob.sha256):
            send(session, blob)
        base = find_base(session)
        assert not (base / "blobs" / "sha256" / blob.sha256).exists()
        assert list((base / "incoming").iterdir()) == []


def test_file_that_shrinks_while_it_is_sent(device: Device, tmp_path: Path) -> None:
    blob = make_blob(tmp_path / "file", b"a" * SIZE_BYTES)
    other = make_blob(tmp_path / "other", b"b" * SIZE_BYTES)
    blob.path.write_bytes(b"a" * 1000)
    with pytest.raises(ArtifactError, match="2999000 bytes are missing"), pushing(device) as link:
        send(link, blob, other)
    blob.path.write_bytes(b"a" * SIZE_BYTES)
    with pushing(device) as session:
        assert [part.blob for part in find_missing(session, [blob, other]).parts] == [blob, other]


def begin(session: Session, blob: Blob, content: bytes) -> Path:
    """Leave an unfinished file, as an earlier push would."""
    part = find_base(session) / "incoming" / f"{blob.sha256}.part"
    part.write_bytes(content)
    return part


NOISE = random.Random(1).randbytes(3 * PREFIX_STEP_BYTES + 1000)


@pytest.mark.parametrize(
    ("begun", "resumed_bytes"),
    [
        pytest.param(NOISE[:2_000_000], 2_000_000, id="ends anywhere"),
        pytest.param(NOISE, len(NOISE), id="whole but not sealed"),
        pytest.param(b"", 0, id="empty"),
        pytest.param(
            NOISE[: 2 * PREFIX_STEP_BYTES + 5] + bytes(500_000), 2 * PREFIX_STEP_BYTES,
            id="zeros of a power cut at its end",
        ),
        pytest.param(b"x" + NOISE[1:], 0, id="first byte wrong"),
        pytest.param(NOISE + b"x", 0, id="too long"),
    ],
)  # fmt: skip
def test_unfinished_file_is_continued(
    device: Device, tmp_path: Path, begun: bytes, resumed_bytes: int
) -> None:
    blob = make_blob(tmp_path / "file", NOISE)
    counter = Counter()
    with pushing(device) as session:
        begin(session, blob, begun)
    with pushing(device) as session:
        missing = find_missing(session, [blob])
        assert missing.resumed_bytes == resumed_bytes
        send_parts(session, missing.parts, counter)
        assert counter.bytes == len(NOISE) - resumed_bytes
        path = find_base(session) / "blobs" / "sha256" / blob.sha256
    assert path.read_bytes() == NOISE


def test_part_that_rots_after_it_was_compared(device: Device, tmp_path: Path) -> None:
    """The device finds out by its hash, and the file is sent anew: never wedged."""
    blob = make_blob(tmp_path / "file", NOISE)
    with pushing(device) as session:
        begin(session, blob, NOISE[:PREFIX_STEP_BYTES])
        missing = find_missing(session, [blob])
        # From another file: what is announced is not what arrives.
        wrong = dataclasses.replace(blob, path=tmp_path / "wrong")
        wrong.path.write_bytes(b"x" * len(NOISE))
        with pytest.raises(ArtifactError):
            send_parts(session, [Part(wrong, missing.parts[0].from_bytes)], Ignored())
        assert find_missing(session, [blob]).resumed_bytes == 0
        send(session, blob)
        assert find_missing(session, [blob]).parts == ()


def test_offset_that_was_never_compared(device: Device, tmp_path: Path) -> None:
    blob = make_blob(tmp_path / "file", NOISE)
    with pushing(device) as session, pytest.raises(RunnerError, match="cannot be continued"):
        send_parts(session, [Part(blob, 12)], Ignored())


def read_peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc is of Linux")
def test_memory_does_not_grow_with_the_file(openssh: OpenSSH, tmp_path: Path) -> None:
    device = openssh.device(tmp_path / "device", host_key=openssh.fingerprint())
    peaks = []
    for size_bytes in (8_000_000, 200_000_000):
        path = tmp_path / str(size_bytes)
        with path.open("wb") as stream:
            for _ in range(size_bytes // 8_000_000):
                stream.write(NOISE[:8_000_000])
        blob = Blob("file", path, hash_file(path), size_bytes)
        with pushing(device) as session:
            send_parts(session, find_missing(session, [blob]).parts, Ignored())
            assert find_missing(session, [blob]).parts == ()
            agent = json.loads((find_base(session) / "lock").read_text())["pid"]
            peaks.append((read_peak_bytes(os.getpid()), read_peak_bytes(agent)))
    (host_small, agent_small), (host_large, agent_large) = peaks
    # Buffers on the way: 2 MiB of SSH's window and a few chunks; far less than the file.
    assert host_large - host_small < 10_000_000
    assert agent_large - agent_small < 10_000_000
    assert agent_large < 60_000_000


def test_limited_rate(board: Device, tmp_path: Path) -> None:
    blob = make_blob(tmp_path / "file", NOISE[:1_000_000])
    with pushing(board) as session:
        started_s = time.monotonic()
        send_parts(session, [Part(blob, 0)], Ignored(), bytes_per_s=1_000_000)
        # A limit: no machine is faster.
        assert time.monotonic() - started_s > 0.9


@pytest.mark.parametrize("damage", ["one bit", "cut"])
def test_blob_damaged_on_the_disk_is_sent_again(
    device: Device, tmp_path: Path, damage: str
) -> None:
    blob = make_blob(tmp_path / "file", b"a" * SIZE_BYTES)
    with pushing(device) as session:
        send(session, blob)
        path = find_base(session) / "blobs" / "sha256" / blob.sha256
        path.chmod(0o600)
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content if damage == "one bit" else content[:-1])
        missing = find_missing(session, [blob])
        assert (missing.parts, missing.corrupt) == ((Part(blob, 0),), 1)
        assert path.exists()  # a release may still read it
        send_parts(session, missing.parts, Ignored())
        assert path.read_bytes() == blob.path.read_bytes()


def test_quota_is_a_full_disk(
    start_embedded: Callable[..., EmbeddedDevice], tmp_path: Path
) -> None:
    device = start_embedded(quota_bytes=SIZE_BYTES + 300_000).start()
    first = make_blob(tmp_path / "a", b"a" * (SIZE_BYTES - 10))
    second = make_blob(tmp_path / "b", b"b" * SIZE_BYTES)
    with pushing(device) as session:
        send(session, first)
        free_bytes = find_missing(session, [second]).free_bytes
        assert free_bytes == 300_010 - len(pack_runner().content)
        with pytest.raises(PreflightError, match=f"disk is full: {free_bytes} bytes are free"):
            send(session, second)
    with open_session(device) as session:  # that push has ended
        assert list((find_base(session) / "incoming").iterdir()) == []


def test_power_cut_near_the_end(
    start_embedded: Callable[..., EmbeddedDevice], tmp_path: Path
) -> None:
    """What has arrived is not sent again: of a push killed at 90 %, at most 11 % are."""
    blob = make_blob(tmp_path / "file", random.Random(2).randbytes(40_000_000))
    embedded = start_embedded()

    class Cutting(Counter):
        def __call__(self, count: int) -> None:
            super().__call__(count)
            if self.bytes > 0.9 * blob.size_bytes and embedded.is_running:
                time.sleep(1)  # what is on its way is lost; let it arrive
                embedded.power_cut()

    with (
        pytest.raises(UnreachableError, match="connection was lost"),
        pushing(embedded.start()) as session,
    ):
        send_parts(session, [Part(blob, 0)], Cutting())
    base = embedded.home / ".phiship" / "v1"
    assert not (base / "blobs" / "sha256" / blob.sha256).exists()
    with pushing(start_embedded().start()) as session:
        missing = find_missing(session, [blob])
        assert missing.size_bytes <= 0.11 * blob.size_bytes
        send_parts(session, missing.parts, Ignored())
        assert find_missing(session, [blob]).parts == ()


def test_two_pushes_at_once(device: Device) -> None:
    with pushing(device), open_session(device) as second:
        with pytest.raises(PreflightError, match=r"another push is under way: by process \d+ on"):
            second.lock()
        with pytest.raises(PreflightError, match="needs the lock"):
            second.call("discard", release="x")
        assert second.call("unlock", force=False)["holder"].startswith("by process")
    # Free as soon as the first one's block has ended.
    with pushing(device) as third:
        third.call("discard", release="x")
    with open_session(device) as fourth:
        assert fourth.call("unlock", force=True) == {"holder": None, "unlocked": False}


def test_unlock_by_force_ends_the_other_push(device: Device) -> None:
    with pushing(device) as first, open_session(device) as second:
        assert second.call("unlock", force=True)["unlocked"]
        second.lock()
        with pytest.raises((RunnerError, UnreachableError)):
            first.call("status")


def test_lock_goes_with_a_broken_connection(openssh: OpenSSH, tmp_path: Path) -> None:
    device = openssh.device(tmp_path / "device", host_key=openssh.fingerprint())
    with log_in(device) as transport:
        channel = transport.open_session()
        channel.exec_command(build_command(device, pack_runner()))
        session = Session(device, ChannelStream(channel))
        session.start(pack_runner())
        session.lock()
        transport.sock.close()
        with pushing(device):
            pass


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSEGV"])
def test_agent_that_is_killed(device: Device, signal: str) -> None:
    with pushing(device) as session:
        pid = json.loads((find_base(session) / "lock").read_text())["pid"]
        os.kill(pid, getattr(signals, signal))
        with pytest.raises((RunnerError, UnreachableError)):
            session.call("status")
    with pushing(device):
        pass


@pytest.mark.parametrize(
    ("python", "words"),
    [
        ("no-such-python", "there is no no-such-python"),
        ("sh -c 'kill -ILL $$'", "does not start"),
        ("sh -c 'echo oops >&2; exit 3'", "exit code 3: oops"),
        ('sh -c \'echo "{\\"python\\": [3, 8, 10]}"\'', r"is Python 3\.8\.10"),
    ],
)
def test_python_that_cannot_run_the_agent(
    openssh: OpenSSH, tmp_path: Path, python: str, words: str
) -> None:
    device = openssh.device(tmp_path, host_key=openssh.fingerprint(), python=python)
    with pytest.raises(PreflightError, match=words), open_session(device):
        pass


@pytest.mark.parametrize("place", ["a file is there", "read-only"])
def test_root_that_cannot_be_used(openssh: OpenSSH, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / "file" if place == "a file is there" else Path("/proc/phiship")
    device = openssh.device(root, host_key=openssh.fingerprint())
    with pytest.raises(PreflightError, match="cannot be written") as caught, open_session(device):
        pass
    assert "root:" in caught.value.advice


def test_damaged_runner_is_replaced(board: Device) -> None:
    with open_session(board) as session:
        path = find_base(session) / "blobs" / "sha256" / pack_runner().sha256
        path.chmod(0o600)
        path.write_bytes(b"damaged")
    with open_session(board) as session:
        assert find_base(session)
    assert path.read_bytes() == pack_runner().content


def test_command_is_a_value(board: Device) -> None:
    runner = pack_runner()
    device = msgspec.structs.replace(board, python="nice python3", root="~/it's here")
    command = build_command(device, runner)
    assert command.startswith("nice python3 -B -c 'import base64;exec(base64.b64decode(")
    assert command.endswith(f""" '~/it'"'"'s here' {runner.sha256} {len(runner.content)}""")


def test_many_agents_at_once(board: Device) -> None:
    """The first contact of several hosts at the same time leaves a whole runner."""
    errors: list[BaseException] = []

    def contact() -> None:
        try:
            with open_session(board) as session:
                session.call("status")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=contact) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
