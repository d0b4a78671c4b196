"""A port of a device's loopback, seen on this machine's loopback, through SSH."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from toolkit.device import Device
from toolkit.ssh.login import log_in

if TYPE_CHECKING:
    from paramiko.transport import Transport

LOOPBACK = "127.0.0.1"
READ_BYTES = 64 << 10
OPEN_TIMEOUT_S = 30


@contextmanager
def tunneling(
    device: Device, remote_port: int, local_port: int = 0, remote_host: str = LOOPBACK
) -> Iterator[int]:
    """Forward a port of this machine's loopback to one that the device reaches; yields ours.

    UnreachableError when the login fails; OSError when `local_port` is in use.
    """
    with log_in(device) as transport:

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                _forward(transport, (remote_host, remote_port), self.request)

        with _Listener((LOOPBACK, local_port), Connection) as listener:
            serving = threading.Thread(target=listener.serve_forever, daemon=True)
            serving.start()
            try:
                yield int(listener.server_address[1])
            finally:
                listener.shutdown()


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False


def _forward(transport: "Transport", target: tuple[str, int], client: Any) -> None:
    """Copy both ways until either side is done; a side that cannot be reached hangs up."""
    from paramiko.ssh_exception import SSHException

    try:
        channel = transport.open_channel(
            "direct-tcpip", target, (LOOPBACK, 0), timeout=OPEN_TIMEOUT_S
        )
    except (SSHException, OSError, EOFError):
        return
    with channel:
        back = threading.Thread(target=_pump, args=(channel, client), daemon=True)
        back.start()
        _pump(client, channel)
        back.join()


def _pump(source: Any, sink: Any) -> None:
    """Copy until the source ends, then tell the other side; a lost side ends both."""
    import socket

    with suppress(OSError, EOFError):
        while piece := source.recv(READ_BYTES):
            sink.sendall(piece)
    with suppress(OSError, EOFError):
        if hasattr(sink, "shutdown_write"):
            sink.shutdown_write()
        else:
            sink.shutdown(socket.SHUT_WR)
