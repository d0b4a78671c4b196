"""A bad network: a TCP proxy that delays, slows, cuts and falls silent, without root."""

import socket
import threading
import time
from contextlib import suppress
from types import TracebackType

from tests.deploy.sshd import LOOPBACK

PIECE_BYTES = 64 << 10


class Proxy:
    """Forwards every connection to `port`; counts the bytes that go up to it.

    Limits count bytes towards the server, over all connections: from `cut_after` on, every
    connection is reset; from `stall_after` on, nothing passes and nothing closes.
    """

    def __init__(
        self,
        port: int,
        *,
        delay_s: float = 0,
        bytes_per_s: float = 0,
        cut_after: int | None = None,
        stall_after: int | None = None,
    ) -> None:
        self.sent_bytes = 0
        self.cut_after, self.stall_after = cut_after, stall_after
        self._target = port
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s
        self._links: list[socket.socket] = []
        self._server = socket.create_server((LOOPBACK, 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Reset every connection: both ends notice at once."""
        for link in self._links:
            with suppress(OSError):
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                link.shutdown(socket.SHUT_RDWR)
                link.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
                server = socket.create_connection((LOOPBACK, self._target))
            except OSError:
                return
            self._links += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(
                    target=self._pump, args=(source, sink, source is client), daemon=True
                ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                if up:
                    self.sent_bytes += len(piece)
                if self._is_beyond(self.cut_after):
                    self.cut()
                while self._is_beyond(self.stall_after):
                    time.sleep(0.1)
                if self._bytes_per_s:
                    time.sleep(len(piece) / self._bytes_per_s)
                time.sleep(self._delay_s)
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)

    def _is_beyond(self, limit: int | None) -> bool:
        return limit is not None and self.sent_bytes > limit
