"""Trust: the one way a host key becomes known, on the user's word and for that key alone."""

import contextlib
from pathlib import Path

import msgspec

from toolkit.device import Device
from toolkit.errors import HostKeyError
from toolkit.ssh.endpoint import resolve_endpoint
from toolkit.ssh.handshake import open_handshake, read_host_key
from toolkit.ssh.knownhosts import (
    add_known_key,
    find_known_keys,
    is_known,
    list_files,
    own_file,
    refuse_revoked,
)
from toolkit.ssh.login import open_jumps


def trust(device: Device, fingerprint: str) -> Path:
    """Add a device's host key to phiship's own known_hosts, which is returned.

    Raises HostKeyError when it has not this fingerprint, and when the key is revoked or the
    device is known by another one: a changed key is never accepted by a command.
    """
    endpoint = resolve_endpoint(device)
    with contextlib.ExitStack() as opened:
        via = open_jumps(endpoint, opened)
        pinned = msgspec.structs.replace(device, host_key=fingerprint)
        transport = open_handshake(pinned, endpoint, via, ())
        opened.callback(transport.close)
        key = read_host_key(transport)
    if key.fingerprint != fingerprint:
        raise HostKeyError(
            f"{device.name}: its host key is {key.kind} {key.fingerprint}, not {fingerprint}",
            advice="compare it with what ssh-keygen -l says on the device itself",
        )
    known = find_known_keys(endpoint.host, endpoint.port, list_files())
    refuse_revoked(device.name, key, known)
    if not is_known(device.name, key, known):
        add_known_key(own_file(), endpoint.host, endpoint.port, key)
    return own_file()
