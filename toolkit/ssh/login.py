"""From a device to authenticated transports: hops, host keys, user keys."""

import contextlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.device import Device, parse_address
from toolkit.errors import UnreachableError
from toolkit.ssh.endpoint import Endpoint, resolve_endpoint
from toolkit.ssh.handshake import open_handshake, read_host_key
from toolkit.ssh.knownhosts import (
    HostKey,
    check_host_key,
    find_known_keys,
    list_files,
    list_trusted,
)

if TYPE_CHECKING:
    from paramiko.pkey import PKey
    from paramiko.transport import Transport

KEEPALIVE_S = 15
# Servers close the connection after a handful of refused keys (OpenSSH: MaxAuthTries 6).
MOST_KEYS = 5

# paramiko logs tracebacks of its thread; every one of them also arrives as an exception.
logging.getLogger("paramiko").addHandler(logging.NullHandler())


@contextlib.contextmanager
def log_in(device: Device) -> Iterator["Transport"]:
    """Log in to a device, through its jump hosts; everything opened is closed at the end.

    Raises UnreachableError or HostKeyError.
    """
    endpoint = resolve_endpoint(device)
    with contextlib.ExitStack() as opened:
        via = open_jumps(endpoint, opened)
        yield _open_hop(device, endpoint, via, opened)


def open_jumps(endpoint: Endpoint, opened: contextlib.ExitStack) -> "Transport | None":
    """Log in to each jump host through the one before; return the last one's transport."""
    via = None
    for text in endpoint.jumps:
        jump = parse_address(text)
        via = _open_hop(jump, resolve_endpoint(jump), via, opened)
    return via


def find_host_keys(device: Device) -> list[HostKey]:
    """Return the keys that the device may show; when none is known, the one it shows, judged.

    Raises what `fetch_host_key` raises.
    """
    endpoint = resolve_endpoint(device)
    known = find_known_keys(endpoint.host, endpoint.port, list_files())
    return list_trusted(known, device.host_key) or [fetch_host_key(device)]


def fetch_host_key(device: Device) -> HostKey:
    """Return the host key of a device when it is to be trusted, without logging in there.

    Raises UnreachableError or HostKeyError.
    """
    endpoint = resolve_endpoint(device)
    with contextlib.ExitStack() as opened:
        via = open_jumps(endpoint, opened)
        return read_host_key(_open_trusted(device, endpoint, via, opened))


def _open_trusted(
    device: Device, endpoint: Endpoint, via: "Transport | None", opened: contextlib.ExitStack
) -> "Transport":
    """Connect to one server and check its host key."""
    known = find_known_keys(endpoint.host, endpoint.port, list_files())
    kinds = [entry.key.kind for entry in known if entry.key and not entry.is_revoked]
    transport = open_handshake(device, endpoint, via, kinds)
    opened.callback(transport.close)
    check_host_key(device.name, read_host_key(transport), known, device.host_key)
    return transport


def _open_hop(
    device: Device, endpoint: Endpoint, via: "Transport | None", opened: contextlib.ExitStack
) -> "Transport":
    """Connect to one server, check its host key, log in."""
    transport = _open_trusted(device, endpoint, via, opened)
    _authenticate(device.name, endpoint, transport)
    transport.set_keepalive(KEEPALIVE_S)
    return transport


def _authenticate(name: str, endpoint: Endpoint, transport: "Transport") -> None:
    """Offer the user's keys one by one; UnreachableError when none opens the door."""
    from paramiko.ssh_exception import AuthenticationException, SSHException

    where = f"{endpoint.user}@{endpoint.host}:{endpoint.port}"
    notes: list[str] = []
    for key, label in itertools.islice(_list_user_keys(endpoint, notes), MOST_KEYS):
        try:
            transport.auth_publickey(endpoint.user, key)
        except AuthenticationException:
            notes.append(f"{label} was refused")
        except (SSHException, OSError, EOFError) as error:
            raise UnreachableError(
                f"{name}: {where} ended the login: {error}", advice="look into the device's log"
            ) from error
        if transport.is_authenticated():
            return
    raise UnreachableError(
        f"{name}: {where} refused the login: {'; '.join(notes) or 'there is no key to offer'}",
        advice=f"bring your key onto the device: ssh-copy-id -p {endpoint.port} "
        f"{endpoint.user}@{endpoint.host}",
    )


def _list_user_keys(endpoint: Endpoint, notes: list[str]) -> Iterator[tuple["PKey", str]]:
    """Yield keys from files, then from the agent; `notes` gets why a file gave none.

    A protected file leads to the agent even where the device names its own key: that is where
    its unlocked copy is.
    """
    use_agent = endpoint.use_agent
    for path in endpoint.identity_files:
        key = _load_key(path, notes)
        if key:
            yield key, str(path)
        else:
            use_agent = True
    if use_agent:
        yield from _list_agent_keys()


def _load_key(path: Path, notes: list[str]) -> "PKey | None":
    from paramiko.pkey import PKey
    from paramiko.ssh_exception import PasswordRequiredException, SSHException

    try:
        return PKey.from_path(path)
    except (TypeError, PasswordRequiredException):
        notes.append(f"{path} is protected by a passphrase (ssh-add it)")
    except OSError as error:
        notes.append(f"{path} cannot be read ({error.strerror})")
    except (ValueError, SSHException):
        # The text of these errors may quote the file: it stays out.
        notes.append(f"{path} is no private key that paramiko can read")
    return None


def _list_agent_keys() -> Iterator[tuple["PKey", str]]:
    from paramiko.agent import Agent

    agent = Agent()
    try:
        for key in agent.get_keys():
            yield key, f"the agent's {key.get_name()} key {key.comment}"
    finally:
        agent.close()
