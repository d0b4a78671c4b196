"""A command on a device through paramiko: a channel of an authenticated transport."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from toolkit.device import Device
from toolkit.ssh.carrier import (
    READ_BYTES,
    STALL_TIMEOUT_S,
    STDERR_TAIL_BYTES,
    Ending,
    explain_loss,
    name_signal,
)
from toolkit.ssh.login import log_in

if TYPE_CHECKING:
    from paramiko.channel import Channel
    from paramiko.transport import Transport

OPEN_TIMEOUT_S = 30
END_TIMEOUT_S = 5


class ChannelStream:
    """A command behind a channel; its stderr is read by a thread of its own."""

    def __init__(self, channel: "Channel") -> None:
        self._channel = channel
        self._stderr = bytearray()
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def send(self, piece: bytes | memoryview) -> bool:
        """Write all of a piece; OSError without a connection, TimeoutError when it stalls."""
        try:
            self._channel.sendall(bytes(piece))
        except TimeoutError:
            raise
        except OSError:
            if not self._is_connected():
                raise
            return False
        return True

    def receive(self) -> bytes:
        """Wait for output. Silence is no error here."""
        while True:
            with suppress(TimeoutError):
                return self._channel.recv(READ_BYTES)

    def finish(self) -> Ending:
        """Close the input and wait a moment for the exit status."""
        with suppress(OSError, EOFError):
            self._channel.shutdown_write()
        self._channel.status_event.wait(END_TIMEOUT_S)
        self._reader.join(END_TIMEOUT_S)
        code = self._channel.exit_status
        # paramiko drops the signal's name that SSH itself sends.
        signal = "an unnamed signal" if code == -1 else name_signal(code)
        is_lost = code == -1 and not self._is_connected()
        return Ending(code, signal, self._stderr.decode("utf-8", "replace"), is_lost)

    def _is_connected(self) -> bool:
        return bool(self._channel.get_transport().is_active())

    def _read_stderr(self) -> None:
        while True:
            try:
                piece = self._channel.recv_stderr(READ_BYTES)
            except TimeoutError:
                continue
            if not piece:
                return
            self._stderr += piece
            del self._stderr[:-STDERR_TAIL_BYTES]


@contextmanager
def run_with_paramiko(device: Device, command: str) -> Iterator[ChannelStream]:
    """Log in, run a command, and close everything at the end of the block."""
    with log_in(device) as transport:
        with explain_loss(device.name):
            channel = _open(transport, command)
        try:
            yield ChannelStream(channel)
        finally:
            _close(channel)


def _open(transport: "Transport", command: str) -> "Channel":
    channel = transport.open_session(timeout=OPEN_TIMEOUT_S)
    channel.settimeout(STALL_TIMEOUT_S)
    # exec_command waits for ever for a server that has gone silent.
    watchdog = threading.Timer(OPEN_TIMEOUT_S, _close, [channel])
    watchdog.daemon = True
    watchdog.start()
    try:
        channel.exec_command(command)
    finally:
        watchdog.cancel()
    return channel


def _close(channel: "Channel") -> None:
    """Close a channel; on a connection that is gone there is nobody to tell."""
    from paramiko.ssh_exception import SSHException

    with suppress(SSHException, OSError, EOFError):
        channel.close()
