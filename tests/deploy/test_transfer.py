"""Transfer: right bytes durably there, or nothing; what is there is not sent again."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deploy.sealed import make_blob
from tests.deploy.sshd import OpenSSH
from toolkit.device import Device
from toolkit.errors import ArtifactError, PreflightError, UnreachableError
from toolkit.ssh.agent import Agent, build_bootstrap, start_agent
from toolkit.ssh.bundle import pack_runner
from toolkit.ssh.connection import connect
from toolkit.ssh.embedded import EmbeddedDevice
from toolkit.ssh.transfer import Blob, find_missing, send_blobs

SIZE_BYTES = 3_000_000


@contextmanager
def agent_on(device: Device) -> Iterator[Agent]:
    with connect(device) as link:
        yield start_agent(link)


def count_nothing(_: int) -> None:
    pass


def find_base(agent: Agent) -> Path:
    return Path(agent.call("status")["root"])


def make_blobs(folder: Path) -> list[Blob]:
    folder.mkdir()
    contents = {"big": bytes(range(250)) * (SIZE_BYTES // 250), "one": b"1", "empty": b""}
    return [make_blob(folder / name, content) for name, content in contents.items()]


def test_push_then_push_again(device: Device, tmp_path: Path) -> None:
    blobs = make_blobs(tmp_path / "files")
    pieces: list[int] = []
    with agent_on(device) as agent, agent.hold_lock():
        missing = find_missing(agent, [*blobs, blobs[0]])
        assert (missing.blobs, missing.size_bytes) == (tuple(blobs), SIZE_BYTES + 1)
        send_blobs(agent, missing.blobs, pieces.append)
        assert sum(pieces) == missing.size_bytes
        assert find_missing(agent, blobs).blobs == ()
        base = find_base(agent)
    for blob in blobs:
        path = base / "blobs" / "sha256" / blob.sha256
        assert path.read_bytes() == blob.path.read_bytes()
        assert path.stat().st_mode & 0o777 == 0o444
    assert list((base / "incoming").iterdir()) == []


def test_other_bytes_than_announced_are_refused(device: Device, tmp_path: Path) -> None:
    blob = make_blob(tmp_path / "file", b"a" * SIZE_BYTES)
    blob.path.write_bytes(b"a" * (SIZE_BYTES - 1) + b"b")
    with agent_on(device) as agent, agent.hold_lock():
        with pytest.raises(ArtifactError, match=blob.sha256):
            send_blobs(agent, [blob], count_nothing)
        base = find_base(agent)
        assert not (base / "blobs" / "sha256" / blob.sha256).exists()
        assert list((base / "incoming").iterdir()) == []


def test_file_that_shrinks_while_it_is_sent(device: Device, tmp_path: Path) -> None:
    blob = make_blob(tmp_path / "file", b"a" * SIZE_BYTES)
    other = make_blob(tmp_path / "other", b"b" * SIZE_BYTES)
    blob.path.write_bytes(b"a" * 1000)
    with agent_on(device) as agent, agent.hold_lock():
        with pytest.raises(ArtifactError, match="2999000 bytes are missing"):
            send_blobs(agent, [blob, other], count_nothing)
        assert find_missing(agent, [blob, other]).blobs == (blob, other)


@pytest.mark.parametrize("damage", ["one bit", "cut"])
def test_blob_damaged_on_the_disk_is_sent_again(
    device: Device, tmp_path: Path, damage: str
) -> None:
    blob = make_blob(tmp_path / "file", b"a" * SIZE_BYTES)
    with agent_on(device) as agent, agent.hold_lock():
        send_blobs(agent, [blob], count_nothing)
        path = find_base(agent) / "blobs" / "sha256" / blob.sha256
        path.chmod(0o600)
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content if damage == "one bit" else content[:-1])
        missing = find_missing(agent, [blob])
        assert (missing.blobs, missing.corrupt) == ((blob,), 1)
        assert path.exists()  # a release may still read it
        send_blobs(agent, missing.blobs, count_nothing)
        assert path.read_bytes() == blob.path.read_bytes()


def test_quota_is_a_full_disk(
    start_embedded: Callable[..., EmbeddedDevice], tmp_path: Path
) -> None:
    device = start_embedded(quota_bytes=SIZE_BYTES + 100_000).start()
    first = make_blob(tmp_path / "a", b"a" * (SIZE_BYTES - 10))
    second = make_blob(tmp_path / "b", b"b" * SIZE_BYTES)
    with agent_on(device) as agent, agent.hold_lock():
        send_blobs(agent, [first], count_nothing)
        free_bytes = find_missing(agent, [second]).free_bytes
        assert free_bytes == 100_010 - len(pack_runner().content)
        with pytest.raises(PreflightError, match=f"disk is full: {free_bytes} bytes are free"):
            send_blobs(agent, [second], count_nothing)
        assert list((find_base(agent) / "incoming").iterdir()) == []


def test_power_cut_in_the_middle(
    start_embedded: Callable[..., EmbeddedDevice], tmp_path: Path
) -> None:
    blob = make_blob(tmp_path / "file", bytes(range(250)) * 40_000)
    embedded = start_embedded()
    sent: list[int] = []

    def cut_half_way(count: int) -> None:
        sent.append(count)
        if sum(sent) > blob.size_bytes // 2 and embedded.is_running:
            embedded.power_cut()

    with (
        pytest.raises(UnreachableError, match="connection was lost"),
        agent_on(embedded.start()) as agent,
        agent.hold_lock(),
    ):
        send_blobs(agent, [blob], cut_half_way)
    base = embedded.home / ".phiship" / "v1"
    assert not (base / "blobs" / "sha256" / blob.sha256).exists()
    with agent_on(start_embedded().start()) as agent, agent.hold_lock():
        send_blobs(agent, find_missing(agent, [blob]).blobs, count_nothing)
        assert find_missing(agent, [blob]).blobs == ()


def test_two_pushes_at_once(device: Device) -> None:
    busy = pytest.raises(PreflightError, match="another push is under way")
    with agent_on(device) as first, agent_on(device) as second:
        with first.hold_lock(), busy, second.hold_lock():
            pass
        # Free as soon as the first one's block has ended.
        with second.hold_lock(), busy:
            first.change("discard", release="x")
        with pytest.raises(PreflightError, match="holds no lock"):
            second.change("discard", release="x")


def test_lock_goes_with_a_broken_connection(openssh: OpenSSH, tmp_path: Path) -> None:
    device = openssh.device(tmp_path / "device", host_key=openssh.fingerprint())
    with agent_on(device) as agent, agent.hold_lock():
        agent._connection._transport.sock.close()
        with agent_on(device) as second, second.hold_lock():
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
    with pytest.raises(PreflightError, match=words), agent_on(device):
        pass


def test_root_that_cannot_be_used(openssh: OpenSSH, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    device = openssh.device(tmp_path / "file", host_key=openssh.fingerprint())
    with pytest.raises(PreflightError, match="cannot be written") as caught, agent_on(device):
        pass
    assert "root:" in caught.value.advice


def test_damaged_runner_is_replaced(board: Device) -> None:
    with agent_on(board) as agent:
        path = find_base(agent) / "blobs" / "sha256" / pack_runner().sha256
        path.chmod(0o600)
        path.write_bytes(b"damaged")
    with agent_on(board) as agent:
        assert find_base(agent)
    assert path.read_bytes() == pack_runner().content


def test_commands_are_values() -> None:
    command = build_bootstrap("python3", "~/it's here", "0" * 64, "look")
    assert command.startswith("python3 -B -c 'import base64;exec(base64.b64decode(")
    assert command.endswith(f""" '~/it'"'"'s here' {"0" * 64} look""")


def test_many_agents_at_once(board: Device) -> None:
    """The first contact of several hosts at the same time leaves a whole runner."""
    errors: list[BaseException] = []

    def contact() -> None:
        try:
            with agent_on(board) as agent:
                agent.call("status")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=contact) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
