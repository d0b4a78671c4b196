"""What carries a command to a device, and its bytes both ways: paramiko, or the system's ssh."""

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from toolkit.device import Device
from toolkit.errors import UnreachableError
from toolkit.ssh.endpoint import resolve_endpoint

Carrier = Literal["auto", "paramiko", "openssh"]
CARRIERS: tuple[Carrier, ...] = ("auto", "paramiko", "openssh")
# From here on the system's ssh, written in C, gains more than its second handshake costs.
OPENSSH_FROM_BYTES = 64_000_000
STDERR_TAIL_BYTES = 64 << 10
READ_BYTES = 64 << 10
# A slow card may block writes for tens of seconds; longer than this is a dead device.
STALL_TIMEOUT_S = 120
SHELL_SIGNAL_BASE = 128


@dataclass(frozen=True)
class Ending:
    """How a command ended: its exit code, the signal that killed it, its last words.

    `is_lost` when not the command but the connection ended.
    """

    code: int | None
    signal: str | None
    stderr: str
    is_lost: bool

    def describe(self) -> str:
        """The end and the last words."""
        ended = f"killed by {self.signal}" if self.signal else f"exit code {self.code}"
        lines = self.stderr.strip().splitlines()
        return f"{ended}: {lines[-1]}" if lines else ended


class Stream(Protocol):
    """A command under way on a device."""

    def send(self, piece: bytes | memoryview) -> bool:
        """Write all of a piece to its input; False when it has ended and takes no more."""

    def receive(self) -> bytes:
        """Wait for some output; empty at its end."""

    def finish(self) -> Ending:
        """Close its input and wait a moment for its end."""


def choose_carrier(device: Device, asked: Carrier, size_bytes: int) -> Carrier:
    """Return the carrier for a push of so many bytes; UnreachableError when it is not there."""
    has_ssh = shutil.which("ssh") is not None and sys.platform != "win32"
    if asked == "openssh" and not has_ssh:
        raise UnreachableError(
            "--carrier openssh: there is no ssh on this machine's PATH",
            advice="install OpenSSH's client, or use --carrier paramiko",
        )
    if asked != "auto":
        return asked
    is_worth_it = has_ssh and not device.is_embedded and size_bytes >= OPENSSH_FROM_BYTES
    # ssh checks the keys of jump hosts by its own files alone, so these stay with paramiko.
    return "openssh" if is_worth_it and not resolve_endpoint(device).jumps else "paramiko"


def open_stream(device: Device, command: str, carrier: Carrier) -> AbstractContextManager[Stream]:
    """Run a command on a device for the length of a block.

    Raises UnreachableError (no answer, no SSH, login refused) or HostKeyError.
    """
    if carrier == "openssh":
        from toolkit.ssh.openssh import run_with_ssh

        return run_with_ssh(device, command)
    from toolkit.ssh.channel import run_with_paramiko

    return run_with_paramiko(device, command)


@contextmanager
def explain_loss(device: str) -> Iterator[None]:
    """Turn what paramiko, pipes and sockets raise into a sentence."""
    from paramiko.ssh_exception import SSHException

    try:
        yield
    except TimeoutError as error:
        raise UnreachableError(
            f"{device}: no answer in time ({str(error) or 'the transfer stalled'})",
            advice="look after the device and its network, then run the same command again",
        ) from error
    except (SSHException, OSError, EOFError) as error:
        raise lost(device, str(error) or type(error).__name__) from error


def lost(device: str, reason: str) -> UnreachableError:
    """The error of a connection that has ended by itself."""
    return UnreachableError(
        f"{device}: the connection was lost ({reason})",
        advice="run the same command again: what has arrived is not sent again",
    )


def name_signal(code: int | None) -> str | None:
    """Name the signal in a shell's exit code, 128 + its number."""
    try:
        return signal.Signals((code or 0) - SHELL_SIGNAL_BASE).name
    except ValueError:
        return None
