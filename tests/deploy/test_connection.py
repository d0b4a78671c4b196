"""Connections: commands that cannot hang, and sentences for everything that goes wrong."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from tests.deploy.sshd import LOOPBACK, OpenSSH, find_free_port, make_key, start_sshd
from toolkit.device import Device
from toolkit.errors import HostKeyError, UnreachableError
from toolkit.ssh import channel, handshake
from toolkit.ssh import openssh as openssh_module
from toolkit.ssh import session as session_module
from toolkit.ssh.carrier import (
    OPENSSH_FROM_BYTES,
    STDERR_TAIL_BYTES,
    Carrier,
    Ending,
    choose_carrier,
    explain_loss,
    open_stream,
)
from toolkit.ssh.endpoint import parse_settings, resolve_endpoint
from toolkit.ssh.login import log_in
from toolkit.ssh.openssh import build_command
from toolkit.ssh.session import open_session


def run(
    device: Device, command: str, pieces: Iterable[bytes] = (), carrier: Carrier = "paramiko"
) -> tuple[bytes, Ending]:
    """Feed a command, read all of its output meanwhile, wait for its end."""
    output = bytearray()

    def read() -> None:
        while piece := stream.receive():
            output.extend(piece)

    with open_stream(device, command, carrier) as stream:
        reader = threading.Thread(target=read)
        reader.start()
        for piece in pieces:
            if not stream.send(piece):
                break
        ending = stream.finish()
        reader.join()
    return bytes(output), ending


@pytest.fixture(params=["paramiko", "openssh"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    found: Carrier = request.param
    return found


def test_output_code_and_signal(device: Device, carrier: Carrier) -> None:
    output, ending = run(device, "echo out; echo err >&2; exit 3", carrier=carrier)
    assert (output, ending) == (b"out\n", Ending(3, None, "err\n", is_lost=False))
    _, ending = run(device, "sh -c 'kill -SEGV $$'; exit $?", carrier=carrier)
    assert ending.signal == "SIGSEGV"


def test_input_and_both_outputs_at_once(device: Device, carrier: Carrier) -> None:
    """5 MB into a command that answers all of it while it is still being fed."""
    pieces = [bytes([97 + number]) * 250_000 for number in range(20)]
    output, ending = run(device, "tee /dev/stderr", pieces, carrier)
    assert output == b"".join(pieces)
    assert ending.stderr.encode() == output[-STDERR_TAIL_BYTES:]


def test_command_that_does_not_read_its_input(device: Device, carrier: Carrier) -> None:
    output, ending = run(device, "echo no thanks; exit 7", [b"x" * 250_000] * 100, carrier)
    assert (output, ending.code) == (b"no thanks\n", 7)


def test_stalled_transfer(
    device: Device, carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (channel, openssh_module):
        monkeypatch.setattr(module, "STALL_TIMEOUT_S", 1)
    endless = iter(lambda: b"x" * 250_000, b"")
    with (
        pytest.raises(UnreachableError, match="no answer in time"),
        explain_loss("board"),
        open_stream(device, "sleep 60", carrier) as stream,
    ):
        for piece in endless:
            stream.send(piece)


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


def test_device_that_falls_silent(
    silenceable: tuple[Device, Callable[[], None]],
    carrier: Carrier,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of a session, with the connection still open."""
    monkeypatch.setattr(session_module, "SILENCE_TIMEOUT_S", 2)
    device, silence = silenceable
    with open_session(device, carrier) as session:
        session.call("status")
        silence()
        with pytest.raises(UnreachableError, match="silent for 2 s"):
            session.call("status")


def test_exec_that_is_never_answered(
    silenceable: tuple[Device, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel opens, and then the server goes silent."""
    device, silence = silenceable
    with log_in(device) as transport:
        open_channel = transport.open_session

        def open_then_silence(timeout: float) -> object:
            opened = open_channel(timeout=timeout)
            silence()
            monkeypatch.setattr(channel, "OPEN_TIMEOUT_S", 2)
            return opened

        monkeypatch.setattr(transport, "open_session", open_then_silence)
        with pytest.raises(UnreachableError), explain_loss("board"):
            channel._open(transport, "echo hello")


def test_line_without_an_end(device: Device) -> None:
    endless = msgspec.structs.replace(device, python="sh -c 'yes | tr -d \"\\\\n\"'")
    with pytest.raises(UnreachableError, match="printed more than"), open_session(endless):
        pass


def test_login_shell_that_talks(device: Device) -> None:
    """Greetings before the agent's own lines, one of them JSON."""
    talking = f"sh -c 'echo Welcome; echo 7; exec {device.python} \"$@\"' --"
    with open_session(msgspec.structs.replace(device, python=talking)) as session:
        assert session.call("status")["current"] is None


def test_nobody_listens(openssh: OpenSSH, tmp_path: Path) -> None:
    with (
        pytest.raises(UnreachableError, match="cannot be reached"),
        open_stream(openssh.device(tmp_path, port=find_free_port()), "true", "paramiko"),
    ):
        pass


def test_unknown_name(openssh: OpenSSH, tmp_path: Path) -> None:
    with (
        pytest.raises(UnreachableError, match=r"board: the name no\.such\.invalid is not known"),
        open_stream(openssh.device(tmp_path, host="no.such.invalid"), "true", "paramiko"),
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
            open_stream(openssh.device(tmp_path, port=port), "true", "paramiko"),
        ):
            pass
        held[0].close()


def test_key_refused(openssh: OpenSSH, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger", "ed25519")
    path = tmp_path / "stranger"
    device = openssh.device(tmp_path, identity_file=str(path), host_key=openssh.fingerprint())
    with pytest.raises(UnreachableError, match=r"stranger was refused") as caught:
        run(device, "true")
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
    with pytest.raises(UnreachableError, match=words):
        run(device, "true")


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
            assert run(device, "echo hello")[0] == b"hello\n"
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
    with pytest.raises(HostKeyError, match="gate: its host key is unknown"):
        run(alias, "true")
    own = own_home / ".config" / "phiship"
    own.mkdir(parents=True)
    line = f"[{LOOPBACK}]:{openssh.port} {openssh.public_key()}\n"
    (own / "known_hosts").write_text(line)
    (own_home / "ssh_config").write_text(
        (own_home / "ssh_config").read_text().replace("nobody", alias.user)
    )
    assert run(alias, "echo hello")[0] == b"hello\n"


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
    with log_in(openssh.device(tmp_path, host_key=openssh.fingerprint())) as transport:
        assert transport.remote_cipher == "aes128-gcm@openssh.com"
    chosen = openssh.device(tmp_path, host_key=openssh.fingerprint(), cipher="aes256-ctr")
    with log_in(chosen) as transport:
        assert transport.remote_cipher == "aes256-ctr"


def test_openssh_is_told_our_keys_and_no_other(openssh: OpenSSH, tmp_path: Path) -> None:
    """Trust is decided here; ssh itself asks nobody."""
    wrong = openssh.device(tmp_path, host_key="SHA256:" + "A" * 43)
    with pytest.raises(HostKeyError):
        run(wrong, "true", carrier="openssh")
    command = build_command(openssh.device(tmp_path), "true", tmp_path / "it's one")
    assert "StrictHostKeyChecking=yes" in command
    assert "GlobalKnownHostsFile=none" in command
    assert f'UserKnownHostsFile="{tmp_path}/it\'s one"' in command
    assert command[-3:] == ["--", LOOPBACK, "true"]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("{place} {key}", None),
        ("{place} {other}\n{place} {key}", None),
        ("{place} {other}", "its host key has CHANGED"),
        ("@revoked {place} {key}\n{place} {key}", "revoked"),
        ("@revoked {place} garbage\n{place} {key}", "revoked"),
        ("", "its host key is unknown"),
    ],
)
def test_host_keys_through_openssh(
    openssh: OpenSSH, tmp_path: Path, own_home: Path, lines: str, words: str | None
) -> None:
    """The same verdicts, in the same words, whoever carries the bytes."""
    make_key(tmp_path / "other", "ed25519")
    other = " ".join((tmp_path / "other.pub").read_text().split()[:2])
    folder = own_home / ".config" / "phiship"
    folder.mkdir(parents=True)
    place = f"[{LOOPBACK}]:{openssh.port}"
    text = lines.format(place=place, key=openssh.public_key(), other=other)
    (folder / "known_hosts").write_text(text + "\n")
    device = openssh.device(tmp_path / "root")
    if words is None:
        with open_session(device, "openssh") as session:
            assert session.call("status")["current"] is None
        return
    with pytest.raises(HostKeyError, match=words), open_session(device, "openssh"):
        pass


@pytest.mark.parametrize(
    "settings",
    [
        "KexAlgorithms diffie-hellman-group14-sha1\n",
        "Ciphers chacha20-poly1305@openssh.com\n",
        "HostKeyAlgorithms ssh-rsa\n",
    ],
)
def test_server_that_is_too_old(tmp_path: Path, settings: str) -> None:
    """One that offers SHA-1 only, or nothing that paramiko has: said, and what to do."""
    server = start_sshd(tmp_path / "sshd", kinds=("ed25519", "rsa"), more=settings)
    with pytest.raises(UnreachableError, match="shares no algorithm with paramiko") as caught:
        run(server.device(tmp_path, host_key=server.fingerprint()), "true")
    server.stop()
    assert "update it" in caught.value.advice


def test_login_that_ssh_does_not_get(openssh: OpenSSH, tmp_path: Path) -> None:
    make_key(tmp_path / "stranger", "ed25519")
    key = str(tmp_path / "stranger")
    device = openssh.device(tmp_path, identity_file=key, host_key=openssh.fingerprint())
    with (
        pytest.raises(UnreachableError, match="Permission denied"),
        open_session(device, "openssh"),
    ):
        pass


def test_choice_of_the_carrier(openssh: OpenSSH, tmp_path: Path, own_home: Path) -> None:
    device = openssh.device(tmp_path)
    assert choose_carrier(device, "auto", OPENSSH_FROM_BYTES) == "openssh"
    assert choose_carrier(device, "auto", OPENSSH_FROM_BYTES - 1) == "paramiko"
    assert choose_carrier(device, "openssh", 0) == "openssh"
    (own_home / "ssh_config").write_text("Host *\n  ProxyJump gate\n")
    assert choose_carrier(device, "auto", OPENSSH_FROM_BYTES) == "paramiko"


def test_no_ssh_on_this_machine(
    openssh: OpenSSH, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose_carrier(openssh.device(tmp_path), "auto", 10**10) == "paramiko"
    with pytest.raises(UnreachableError, match="no ssh on this machine"):
        choose_carrier(openssh.device(tmp_path), "openssh", 0)
