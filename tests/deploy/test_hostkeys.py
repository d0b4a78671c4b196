"""Host keys: known pass; unknown, changed and revoked are refused, and nothing is ever added."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.deploy.sshd import LOOPBACK, OpenSSH, find_free_port, make_key, start_sshd
from toolkit.device import Device
from toolkit.errors import HostKeyError
from toolkit.ssh.carrier import open_stream
from toolkit.ssh.hostkeys import trust
from toolkit.ssh.knownhosts import find_known_keys, own_file


def log_in(device: Device) -> bytes:
    with open_stream(device, "echo hello", "paramiko") as stream:
        return stream.receive()


def write_known_hosts(home: Path, *lines: str) -> Path:
    path = home / ".ssh" / "known_hosts"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def make_public_key(folder: Path, kind: str = "ed25519") -> str:
    path = folder / f"other_{kind}"
    make_key(path, kind)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def test_unknown_is_refused_with_the_command_that_trusts_it(
    openssh: OpenSSH, tmp_path: Path, own_home: Path
) -> None:
    device = openssh.device(tmp_path)
    with pytest.raises(HostKeyError, match="unknown") as caught:
        log_in(device)
    command = f"phiship trust board --fingerprint {openssh.fingerprint()}"
    assert command in caught.value.advice
    assert not own_file().exists()
    assert not list(own_home.rglob("known_hosts"))


def test_trust_then_connect(openssh: OpenSSH, tmp_path: Path) -> None:
    device = openssh.device(tmp_path)
    own_file().parent.mkdir(parents=True)
    own_file().write_text("# a last line without its end")
    for _ in range(2):  # the second time nothing is added
        assert trust(device, openssh.fingerprint()) == own_file()
    assert own_file().read_text().splitlines() == [
        "# a last line without its end",
        f"[{LOOPBACK}]:{openssh.port} {openssh.public_key()}",
    ]
    assert log_in(device) == b"hello\n"


def test_trust_refuses_another_fingerprint(openssh: OpenSSH, tmp_path: Path) -> None:
    wrong = "SHA256:" + "A" * 43
    with pytest.raises(HostKeyError, match=wrong):
        trust(openssh.device(tmp_path), wrong)
    assert not own_file().exists()


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_changed_is_refused(openssh: OpenSSH, tmp_path: Path, own_home: Path, kind: str) -> None:
    """Also when the known key is of a kind that the server has no more."""
    device = openssh.device(tmp_path)
    name = f"[{LOOPBACK}]:{openssh.port}"
    path = write_known_hosts(own_home, "# old", f"{name} {make_public_key(tmp_path, kind)}")
    for attempt in (log_in, lambda board: trust(board, openssh.fingerprint())):
        with pytest.raises(HostKeyError, match="CHANGED") as caught:
            attempt(device)
        assert f"{path}:2" in str(caught.value)
    assert not own_file().exists()


def test_changed_after_the_device_was_set_up_anew(tmp_path: Path) -> None:
    port = find_free_port()
    first = start_sshd(tmp_path / "a", port=port)
    trust(first.device(tmp_path), first.fingerprint())
    first.stop()
    second = start_sshd(tmp_path / "b", port=port)
    try:
        with pytest.raises(HostKeyError, match="CHANGED"):
            log_in(second.device(tmp_path))
    finally:
        second.stop()


@pytest.mark.parametrize("key", ["the same", "none", "damaged"])
def test_revoked_fails_closed(openssh: OpenSSH, tmp_path: Path, own_home: Path, key: str) -> None:
    name = f"[{LOOPBACK}]:{openssh.port}"
    good = openssh.public_key()
    text = {"the same": good, "none": "", "damaged": good[:-5] + "!"}[key]
    path = write_known_hosts(own_home, f"{name} {good}", f"@revoked {name} {text}")
    pinned = openssh.device(tmp_path, host_key=openssh.fingerprint())
    for device in (openssh.device(tmp_path), pinned):
        with pytest.raises(HostKeyError, match="revoked") as caught:
            log_in(device)
        assert f"{path}:2" in str(caught.value)


def test_another_revoked_key_does_not_matter(
    openssh: OpenSSH, tmp_path: Path, own_home: Path
) -> None:
    name = f"[{LOOPBACK}]:{openssh.port}"
    write_known_hosts(
        own_home, f"@revoked * {make_public_key(tmp_path)}", f"{name} {openssh.public_key()}"
    )
    assert log_in(openssh.device(tmp_path)) == b"hello\n"


def test_lines_nobody_can_read_are_skipped(
    openssh: OpenSSH, tmp_path: Path, own_home: Path
) -> None:
    name = f"[{LOOPBACK}]:{openssh.port}"
    path = write_known_hosts(
        own_home,
        "@cert-authority * ssh-ed25519 AAAA",
        "",
        "only-one-field",
        f"{name} ssh-ed25519 ***",
        f"{name} ssh-rsa {openssh.public_key().split()[1]}",
        "|1|bad|hash ssh-ed25519 AAAA",
        f"{name} {openssh.public_key()} a comment",
    )
    assert log_in(openssh.device(tmp_path)) == b"hello\n"
    known = find_known_keys(LOOPBACK, openssh.port, [path])
    assert [entry.line for entry in known] == [7]


def test_hashed_names(openssh: OpenSSH, tmp_path: Path, own_home: Path) -> None:
    """As ssh-keygen -H writes them."""
    name = f"[{LOOPBACK}]:{openssh.port}"
    path = write_known_hosts(own_home, f"{name} {openssh.public_key()}")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(path)], check=True, capture_output=True)
    assert LOOPBACK not in path.read_text()
    assert log_in(openssh.device(tmp_path)) == b"hello\n"


@pytest.mark.parametrize(
    ("pattern", "host", "port", "matches"),
    [
        ("orin.lan", "orin.lan", 22, True),
        ("orin.lan", "orin.lan", 2222, False),
        ("[orin.lan]:2222", "orin.lan", 2222, True),
        ("[orin.lan]:22", "orin.lan", 22, True),
        ("*.lan", "orin.lan", 22, True),
        ("ORIN.lan", "orin.LAN", 22, True),
        ("*.lan,!orin.lan", "orin.lan", 22, False),
        ("192.168.1.?", "192.168.1.4", 22, True),
        ("[*.lan]:2222", "orin.lan", 2222, True),
        ("[orin", "o", 22, False),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, host: str, port: int, matches: bool) -> None:
    """The same verdicts as `ssh-keygen -F`, which wants [host]:port for other ports."""
    path = tmp_path / "known_hosts"
    path.write_text(f"{pattern} {make_public_key(tmp_path)}\n")
    assert bool(find_known_keys(host, port, [path])) == matches


def test_known_key_of_another_kind_than_the_first(tmp_path: Path, own_home: Path) -> None:
    """A server with several keys proves the one that is known or pinned."""
    server = start_sshd(tmp_path / "sshd", kinds=("ed25519", "ecdsa", "rsa"))
    try:
        name = f"[{LOOPBACK}]:{server.port}"
        for kind in ("rsa", "ecdsa", "ed25519"):
            path = write_known_hosts(own_home, f"{name} {server.public_key(kind)}")
            assert log_in(server.device(tmp_path)) == b"hello\n"
            path.unlink()
            pinned = server.device(tmp_path, host_key=server.fingerprint(kind))
            assert log_in(pinned) == b"hello\n"
            trust(server.device(tmp_path), server.fingerprint(kind))
            assert server.public_key(kind) in own_file().read_text()
            own_file().unlink()
    finally:
        server.stop()


def test_pinned_but_other(openssh: OpenSSH, tmp_path: Path) -> None:
    wrong = "SHA256:" + "A" * 43
    with pytest.raises(HostKeyError, match=wrong) as caught:
        log_in(openssh.device(tmp_path, host_key=wrong))
    assert openssh.fingerprint() in str(caught.value)


def test_embedded_device_pins_its_own(start_embedded: Callable[..., object]) -> None:
    assert log_in(start_embedded().start()) == b"hello\n"
