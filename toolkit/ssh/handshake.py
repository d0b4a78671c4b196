"""A socket, and SSH's key exchange on it, up to where the server's host key is known."""

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Union

from toolkit.device import Device
from toolkit.errors import UnreachableError
from toolkit.ssh.endpoint import Endpoint
from toolkit.ssh.knownhosts import HostKey

if TYPE_CHECKING:
    from paramiko.channel import Channel
    from paramiko.transport import Transport

CONNECT_TIMEOUT_S = 10
HANDSHAKE_TIMEOUT_S = 20
SILENCE_TIMEOUT_MS = 60_000
FAST_CIPHER = "aes128-gcm@openssh.com"
# Signature algorithms by the kind of host key they use, in the order they are asked for.
KEY_ALGORITHMS = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}


def open_handshake(
    device: Device, endpoint: Endpoint, via: "Transport | None", known_kinds: Sequence[str]
) -> "Transport":
    """Return a transport that has exchanged keys, preferably with a key of a known kind.

    Of a server's several host keys only one is used; when the device's is pinned and that key has
    another fingerprint, the other kinds are tried, and the first transport stays when none fits.
    """
    fingerprint = device.host_key
    kinds = sorted(KEY_ALGORITHMS, key=lambda kind: kind not in known_kinds)
    first = _exchange_keys(device, endpoint, via, kinds)
    if fingerprint in (None, read_host_key(first).fingerprint):
        return first
    for kind in kinds:
        try:
            other = _exchange_keys(device, endpoint, via, [kind])
        except UnreachableError:
            continue  # the server has no key of this kind
        if read_host_key(other).fingerprint == fingerprint:
            first.close()
            return other
        other.close()
    return first


def read_host_key(transport: "Transport") -> HostKey:
    """Return the host key the server has proven to own."""
    key = transport.get_remote_server_key()
    return HostKey(key.get_name(), key.asbytes())


def _exchange_keys(
    device: Device, endpoint: Endpoint, via: "Transport | None", kinds: Sequence[str]
) -> "Transport":
    from paramiko.ssh_exception import IncompatiblePeer, SSHException
    from paramiko.transport import Transport

    where = f"{endpoint.host}:{endpoint.port}"
    name = device.name
    transport = Transport(_open_socket(name, endpoint, via))
    _prefer(transport, kinds, device.cipher or FAST_CIPHER)
    transport.banner_timeout = HANDSHAKE_TIMEOUT_S
    try:
        transport.start_client(timeout=HANDSHAKE_TIMEOUT_S)
        transport.get_remote_server_key()  # raises when the time was over
    except IncompatiblePeer as error:
        transport.close()
        raise UnreachableError(
            f"{name}: the SSH server at {where} shares no algorithm with paramiko: {error}",
            advice="it is too old, or allows too little: update it",
        ) from error
    except (SSHException, OSError, EOFError) as error:
        transport.close()
        raise UnreachableError(
            f"{name}: something answers at {where}, but not as an SSH server: {error}",
            advice="check host and port; an overloaded server closes new connections as well",
        ) from error
    return transport


def _prefer(transport: "Transport", kinds: Sequence[str], first: str) -> None:
    """Set which host keys are accepted, and one cipher before the others."""
    options = transport.get_security_options()
    options.key_types = [name for kind in kinds for name in KEY_ALGORITHMS[kind]]
    ciphers = list(options.ciphers)
    # A sort keeps the order of the rest.
    options.ciphers = sorted(ciphers, key=lambda cipher: cipher != first)


def _open_socket(
    name: str, endpoint: Endpoint, via: "Transport | None"
) -> Union[socket.socket, "Channel"]:
    """Connect to the server, directly or through the jump host `via`."""
    from paramiko.ssh_exception import SSHException

    where = f"{endpoint.host}:{endpoint.port}"
    address = (endpoint.host, endpoint.port)
    try:
        if via:
            return via.open_channel("direct-tcpip", address, ("", 0), timeout=CONNECT_TIMEOUT_S)
        link = socket.create_connection(address, timeout=CONNECT_TIMEOUT_S)
    except socket.gaierror as error:
        raise UnreachableError(
            f"{name}: the name {endpoint.host} is not known ({error.strerror})",
            advice="check the name; .local names need mDNS on this machine",
        ) from error
    except (TimeoutError, SSHException, OSError) as error:
        reason = "no answer" if isinstance(error, TimeoutError) else _describe(error)
        raise UnreachableError(
            f"{name}: {where} cannot be reached: {reason}",
            advice="check that the device is on, in this network, and that its SSH server runs",
        ) from error
    # Without this, small packets wait for each other's acknowledgement.
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_TIMEOUT_MS)
    return link


def _describe(error: Exception) -> str:
    """Return the system's words without its number."""
    return getattr(error, "strerror", None) or str(error)
