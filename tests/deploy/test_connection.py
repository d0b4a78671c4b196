"""Connections: commands that cannot hang, and sentences for everything that goes wrong."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.deploy.sshd import LOOPBACK, OpenSSH, find_free_port, make_key, start_sshd
from toolkit.device import Device
from toolkit.errors import HostKeyError, RunnerError, UnreachableError
from toolkit.ssh import connection as connection_module
from toolkit.ssh import handshake
from toolkit.ssh.connection import connect
from toolkit.ssh.endpoint import parse_settings, resolve_endpoint


def test_output_code_and_signal(device: Device) -> None:
    with connect(device) as link:
        done = link.run("echo out; echo err >&2; exit 3", timeout_s=30)
        assert (done.stdout, done.stderr, done.code, done.signal) == (b"out\n", b"err\n", 3, None)
        assert link.run("sh -c 'kill -SEGV $$'; exit $?", timeout_s=30).signal == "SIGSEGV"
        assert link.run("kill -KILL $$", timeout_s=30).signal == "an unnamed signal"


def test_input_and_both_outputs_at_once(device: Device) -> None:
    """5 MB into a command that answers all of it while it is still being fed."""
    pieces = [bytes([number]) * 250_000 for number in range(20)]
    with connect(device) as link:
        done = link.run("tee /dev/stderr", iter(pieces), timeout_s=120)
    assert done.stdout == b"".join(pieces)
    assert len(done.stderr) == connection_module.STDERR_TAIL_BYTES
    assert done.stderr == done.stdout[-len(done.stderr) :]


def test_command_that_does_not_read_its_input(device: Device) -> None:
    with connect(device) as link:
        done = link.run("echo no thanks; exit 7", [b"x" * 250_000] * 100, timeout_s=60)
    assert (done.stdout, done.code) == (b"no thanks\n", 7)


def test_silent_command_may_take_its_time_but_not_more(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "STALL_TIMEOUT_S", 0.2)
    with connect(device) as link:
        assert link.run("sleep 1; echo done", timeout_s=60).stdout == b"done\n"
        started_s = time.monotonic()
        with pytest.raises(UnreachableError, match="longer than 1 s"):
            link.run("sleep 60", timeout_s=1)
        # Far less than the command's minute, far more than a busy machine needs.
        assert time.monotonic() - started_s < 30


def test_stalled_transfer(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "STALL_TIMEOUT_S", 1)
    with connect(device) as link, pytest.raises(UnreachableError, match="no answer in time"):
        link.run("sleep 60", iter(lambda: b"x" * 250_000, b""), timeout_s=120)


@pytest.fixture
def silenceable(tmp_path: Path) -> Iterator[tuple[Device, Callable[[], None]]]:
    """A device, and what stops its server's processes while the connection stays open."""
    server = start_sshd(tmp_path / "sshd")
    stopped: list[psutil.Process] = []

    def silence() -> None:
        for process in psutil.Process(server.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it served the handshake only
                process.suspend()
                stopped.append(process)

    yield server.device(tmp_path, host_key=server.fingerprint()), silence
    for process in stopped:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    server.stop()


def test_server_that_goes_silent(
    silenceable: tuple[Device, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "OPEN_TIMEOUT_S", 2)
    device, silence = silenceable
    with connect(device) as link:
        assert link.run("echo hello", timeout_s=30).stdout == b"hello\n"
        silence()
        with pytest.raises(UnreachableError):
            link.run("echo hello", timeout_s=30)


def test_exec_that_is_never_answered(
    silenceable: tuple[Device, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel opens, and then the server goes silent."""
    device, silence = silenceable
    with connect(device) as link:
        open_session = link._transport.open_session

        def open_then_silence(timeout: float) -> object:
            channel = open_session(timeout=timeout)
            silence()
            monkeypatch.setattr(connection_module, "OPEN_TIMEOUT_S", 2)
            return channel

        monkeypatch.setattr(link._transport, "open_session", open_then_silence)
        with pytest.raises(UnreachableError):
            link.run("echo hello", timeout_s=30)


def test_too_much_output(device: Device) -> None:
    with connect(device) as link, pytest.raises(RunnerError, match="printed more than"):
        link.run("yes", timeout_s=60)


def test_nobody_listens(openssh: OpenSSH, tmp_path: Path) -> None:
    with (
        pytest.raises(UnreachableError, match="cannot be reached"),
        connect(openssh.device(tmp_path, port=find_free_port())),
    ):
        pass


def test_unknown_name(openssh: OpenSSH, tmp_path: Path) -> None:
    with (
        pytest.raises(UnreachableError, match=r"board: the name no\.such\.invalid is not known"),
        connect(openssh.device(tmp_path, host="no.such.invalid")),
    ):
        pass


@pytest.mark.parametrize("words", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"", None])
def test_no_ssh_there(
    openssh: OpenSSH, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: bytes | None
) -> None:
    """A server that says something else, nothing, or does not even hang up."""
    monkeypatch.setattr(handshake, "HANDSHAKE_TIMEOUT_S", 1)
    with socket.create_server((LOOPBACK, 0)) as server:
        held: list[socket.socket] = []

        def answer() -> None:
            link, _ = server.accept()
            held.append(link)
            if words is not None:
                link.sendall(words)
                link.close()

        threading.Thread(target=answer, daemon=True).start()
        port = server.getsockname()[1]
        with (
            pytest.raises(UnreachableError, match="not as an SSH server"),
            connect(openssh.device(tmp_path, port=port)),
        ):
            pass
        held[0].close()


def test_key_refused(openssh: OpenSSH, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger", "ed25519")
    path = tmp_path / "stranger"
    device = openssh.device(tmp_path, identity_file=str(path), host_key=openssh.fingerprint())
    with pytest.raises(UnreachableError, match=r"stranger was refused") as caught, connect(device):
        pass
    assert "ssh-copy-id" in caught.value.advice
    secret = path.read_text().splitlines()[2]
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("locked", "protected by a passphrase"),
        ("absent", "cannot be read"),
        ("garbage", "no private key"),
    ],
)
def test_key_that_cannot_be_used(openssh: OpenSSH, tmp_path: Path, name: str, words: str) -> None:
    make_key(tmp_path / "locked", "ed25519", passphrase="secret words")
    (tmp_path / "garbage").write_text("-----BEGIN garbage")
    device = openssh.device(
        tmp_path, identity_file=str(tmp_path / name), host_key=openssh.fingerprint()
    )
    with pytest.raises(UnreachableError, match=words), connect(device):
        pass


def test_key_from_the_agent(
    openssh: OpenSSH, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A protected key works once ssh-agent has it."""
    socket_path = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket_path)], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket_path))
        key = str(openssh.folder / "id_ed25519")
        while subprocess.run(["ssh-add", "-q", key], capture_output=True).returncode:
            time.sleep(0.05)
        make_key(tmp_path / "locked", "ed25519", passphrase="secret words")
        for identity_file in (None, str(tmp_path / "locked")):
            device = openssh.device(
                tmp_path, identity_file=identity_file, host_key=openssh.fingerprint()
            )
            with connect(device) as link:
                assert link.run("echo hello", timeout_s=30).stdout == b"hello\n"
    finally:
        agent.terminate()
        agent.wait()


def test_settings_of_openssh_and_a_jump(openssh: OpenSSH, tmp_path: Path, own_home: Path) -> None:
    """An alias of ~/.ssh/config, reached through a jump host; both host keys are checked."""
    key = openssh.folder / "id_ed25519"
    (own_home / "ssh_config").write_text(
        f"Host alias gate\n  HostName {LOOPBACK}\n  Port {openssh.port}\n"
        f"  IdentityFile {key}\n  User nobody\n"
        "Host alias\n  ProxyJump gate\n"
    )
    alias = openssh.device(tmp_path, host="alias", port=22, identity_file=None)
    endpoint = resolve_endpoint(alias)
    assert (endpoint.host, endpoint.port, endpoint.jumps) == (LOOPBACK, openssh.port, ("gate",))
    assert endpoint.user == alias.user  # what the device says wins over the settings
    with pytest.raises(HostKeyError, match="gate: its host key is unknown"), connect(alias):
        pass
    own = own_home / ".config" / "phiship"
    own.mkdir(parents=True)
    line = f"[{LOOPBACK}]:{openssh.port} {openssh.public_key()}\n"
    (own / "known_hosts").write_text(line)
    (own_home / "ssh_config").write_text(
        (own_home / "ssh_config").read_text().replace("nobody", alias.user)
    )
    with connect(alias) as link:
        assert link.run("echo hello", timeout_s=30).stdout == b"hello\n"


def test_proxy_command_is_refused(openssh: OpenSSH, tmp_path: Path, own_home: Path) -> None:
    (own_home / "ssh_config").write_text("Host *\n  ProxyCommand nc %h %p\n")
    with pytest.raises(UnreachableError, match="ProxyCommand"):
        resolve_endpoint(openssh.device(tmp_path))


def test_settings_lines() -> None:
    text = "hostname a\nidentityfile ~/one\nidentityfile ~/two words\nproxyjump none\n"
    assert parse_settings(text) == {
        "hostname": ["a"],
        "identityfile": ["~/one", "~/two words"],
        "proxyjump": ["none"],
    }


def test_fast_cipher_is_used(openssh: OpenSSH, tmp_path: Path) -> None:
    with connect(openssh.device(tmp_path, host_key=openssh.fingerprint())) as link:
        assert link._transport.remote_cipher == "aes128-gcm@openssh.com"
