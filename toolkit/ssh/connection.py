"""One SSH connection: commands with standard input, bounded memory and a time limit."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.device import Device
from toolkit.errors import RunnerError, UnreachableError
from toolkit.ssh.login import log_in

if TYPE_CHECKING:
    from paramiko.channel import Channel
    from paramiko.transport import Transport

# The whole standard output is kept up to this; more is an error, never a cut text.
OUTPUT_LIMIT_BYTES = 8 << 20
STDERR_TAIL_BYTES = 64 << 10
READ_BYTES = 64 << 10
OPEN_TIMEOUT_S = 30
RELEASE_TIMEOUT_S = 5
# A slow card may block writes for tens of seconds; longer than this is a dead device.
STALL_TIMEOUT_S = 120
SHELL_SIGNAL_BASE = 128


@dataclass(frozen=True)
class Completed:
    """A finished command; `signal` names what killed it, as far as its shell tells."""

    stdout: bytes
    stderr: bytes
    code: int
    signal: str | None


class Connection:
    """An open, authenticated connection to a device; the host key has been checked."""

    def __init__(self, device: Device, transport: "Transport") -> None:
        self.device = device
        self._transport = transport

    def run(
        self, command: str, stdin: bytes | Iterable[bytes] = b"", *, timeout_s: float
    ) -> Completed:
        """Run a command; UnreachableError when the connection breaks or the time is over."""
        pieces = [stdin] if isinstance(stdin, bytes) else stdin
        with self._explain_loss():
            channel = self._open(command)
            try:
                return _Exchange(channel, timeout_s).finish(pieces)
            finally:
                _close(channel)

    @contextmanager
    def hold(self, command: str) -> Iterator[bytes]:
        """Run a command that answers one line; inside the block its standard input stays open."""
        with self._explain_loss():
            channel = self._open(command)
            channel.settimeout(OPEN_TIMEOUT_S)
            line = _read_line(channel)
        try:
            yield line
        finally:
            # Its end is awaited, so that what it holds is free when the block is left.
            _close_input(channel)
            channel.status_event.wait(RELEASE_TIMEOUT_S)
            _close(channel)

    def _open(self, command: str) -> "Channel":
        channel = self._transport.open_session(timeout=OPEN_TIMEOUT_S)
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

    @contextmanager
    def _explain_loss(self) -> Iterator[None]:
        """Turn what paramiko and sockets raise into a sentence."""
        from paramiko.ssh_exception import SSHException

        try:
            yield
        except TimeoutError as error:
            raise UnreachableError(
                f"{self.device.name}: no answer in time ({str(error) or 'the transfer stalled'})",
                advice="look after the device and its network, then run the same command again",
            ) from error
        except (SSHException, OSError, EOFError) as error:
            reason = str(error) or type(error).__name__
            raise UnreachableError(
                f"{self.device.name}: the connection was lost ({reason})",
                advice="run the same command again: what has arrived is not sent again",
            ) from error


class _Exchange:
    """One command under way: output is read by threads while its input is written."""

    def __init__(self, channel: "Channel", timeout_s: float) -> None:
        self._channel = channel
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._stdout = bytearray()
        self._stderr = bytearray()

    def finish(self, pieces: Iterable[bytes]) -> Completed:
        """Write all input, read all output, wait for the end."""
        readers = [
            threading.Thread(target=self._read_stdout, daemon=True),
            threading.Thread(target=self._read_stderr, daemon=True),
        ]
        for reader in readers:
            reader.start()
        self._send(pieces)
        for reader in readers:
            reader.join(self._left_s())
        self._channel.status_event.wait(self._left_s())
        return self._complete()

    def _send(self, pieces: Iterable[bytes]) -> None:
        """Write the input; a command that ends before it has read all of it still has an answer."""
        for piece in pieces:
            self._left_s()
            if not _send_all(self._channel, piece):
                return
        _close_input(self._channel)

    def _complete(self) -> Completed:
        if len(self._stdout) > OUTPUT_LIMIT_BYTES:
            raise RunnerError(f"the device printed more than {OUTPUT_LIMIT_BYTES} bytes")
        self._left_s()
        code = self._channel.exit_status
        transport = self._channel.get_transport()
        if code == -1 and not transport.is_active():
            raise EOFError("the device closed it")
        return Completed(bytes(self._stdout), bytes(self._stderr), code, _name_signal(code))

    def _left_s(self) -> float:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"the command ran longer than {self._timeout_s:.0f} s")
        return left_s

    def _read_stdout(self) -> None:
        for piece in _read_all(self._channel.recv):
            self._stdout += piece
            if len(self._stdout) > OUTPUT_LIMIT_BYTES:
                _close(self._channel)

    def _read_stderr(self) -> None:
        for piece in _read_all(self._channel.recv_stderr):
            self._stderr += piece
            del self._stderr[:-STDERR_TAIL_BYTES]


@contextmanager
def connect(device: Device) -> Iterator[Connection]:
    """Log in to a device for the length of a block.

    Raises UnreachableError (no answer, no SSH, login refused) or HostKeyError.
    """
    with log_in(device) as transport:
        yield Connection(device, transport)


def _close_input(channel: "Channel") -> None:
    """Say that no more input comes, where there is still somebody to tell."""
    with suppress(OSError, EOFError):
        channel.shutdown_write()


def _close(channel: "Channel") -> None:
    """Close a channel; on a connection that is gone there is nobody to tell."""
    from paramiko.ssh_exception import SSHException

    with suppress(SSHException, OSError, EOFError):
        channel.close()


def _send_all(channel: "Channel", piece: bytes) -> bool:
    """Send all of a piece; False when the command has ended and takes no more."""
    try:
        channel.sendall(piece)
    except TimeoutError:
        raise
    except OSError:
        if not channel.get_transport().is_active():
            raise
        return False
    return True


def _read_all(receive: Callable[[int], bytes]) -> Iterator[bytes]:
    """Yield output until its end. Silence is no error here: only the command's deadline counts."""
    while True:
        try:
            piece = receive(READ_BYTES)
        except TimeoutError:
            continue
        if not piece:
            return
        yield piece


def _read_line(channel: "Channel") -> bytes:
    line = b""
    while not line.endswith(b"\n") and (piece := channel.recv(READ_BYTES)):
        line += piece
    return line


def _name_signal(code: int) -> str | None:
    """Name the signal in a shell's exit code; paramiko drops the one that SSH itself sends."""
    if code == -1:
        return "an unnamed signal"
    try:
        return signal.Signals(code - SHELL_SIGNAL_BASE).name
    except ValueError:
        return None
