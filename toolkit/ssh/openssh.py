"""A command on a device through the system's ssh: faster than paramiko where much is sent.

Trust is decided in one place, by our rules (knownhosts.py): ssh is told the keys that the device
may show, and no others. Where none is known, paramiko fetches the device's key to be judged.
"""

import os
import select
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from toolkit.device import Device
from toolkit.ssh.carrier import (
    READ_BYTES,
    STALL_TIMEOUT_S,
    STDERR_TAIL_BYTES,
    Ending,
    name_signal,
)
from toolkit.ssh.endpoint import build_ssh
from toolkit.ssh.handshake import FAST_CIPHER
from toolkit.ssh.login import find_host_keys

ALIAS = "phiship-device"
END_TIMEOUT_S = 5
PIPE_BYTES = 1 << 20
CONNECTION_FAILED = 255  # ssh's own exit code, also for a refused login
OPTIONS = (
    *("BatchMode=yes", "StrictHostKeyChecking=yes", "GlobalKnownHostsFile=none"),
    *("UpdateHostKeys=no", "CheckHostIP=no", "ControlMaster=no", "ControlPath=none"),
    *("ClearAllForwardings=yes", "RequestTTY=no", "RemoteCommand=none", "PermitLocalCommand=no"),
    *("Compression=no", "ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=4"),
    *("LogLevel=ERROR", f"HostKeyAlias={ALIAS}"),
)


class ProcessStream:
    """A command behind a process of ssh; its stderr is read by a thread of its own."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._stdin, self._stdout = _number(process.stdin), _number(process.stdout)
        os.set_blocking(self._stdin, False)
        _widen(self._stdin)
        self._stderr = bytearray()
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def send(self, piece: bytes | memoryview) -> bool:
        """Write all of a piece; TimeoutError when ssh takes nothing for long."""
        view = memoryview(piece)
        while view:
            if not select.select([], [self._stdin], [], STALL_TIMEOUT_S)[1]:
                raise TimeoutError("the transfer stalled")
            try:
                view = view[os.write(self._stdin, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                return False
        return True

    def receive(self) -> bytes:
        """Wait for output."""
        return os.read(self._stdout, READ_BYTES)

    def finish(self) -> Ending:
        """Close the input and wait a moment for the exit code."""
        if self._process.stdin:
            with suppress(OSError):
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_TIMEOUT_S)
        self._reader.join(END_TIMEOUT_S)
        code = self._process.returncode
        stderr = self._stderr.decode("utf-8", "replace")
        return Ending(code, name_signal(code), stderr, code == CONNECTION_FAILED)

    def _read_stderr(self) -> None:
        number = _number(self._process.stderr)
        while piece := os.read(number, READ_BYTES):
            self._stderr += piece
            del self._stderr[:-STDERR_TAIL_BYTES]


@contextmanager
def run_with_ssh(device: Device, command: str) -> Iterator[ProcessStream]:
    """Find the host key, run ssh, and end it with the block."""
    keys = find_host_keys(device)
    with tempfile.TemporaryDirectory(prefix="phiship-") as folder:
        known = Path(folder) / "known_hosts"
        known.write_text("".join(f"{ALIAS} {key.text}\n" for key in keys), encoding="ascii")
        process = subprocess.Popen(
            build_command(device, command, known),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is ours; it would tear the transfer
        )
        stream = ProcessStream(process)
        try:
            yield stream
        finally:
            process.kill()
            process.wait()


def build_command(device: Device, command: str, known: Path) -> list[str]:
    """Return ssh's words; `known` is a known_hosts file with the device's keys under ALIAS."""
    words = build_ssh(device)
    for option in OPTIONS:
        words += ["-o", option]
    # A path with a space has to be quoted within the option.
    words += ["-o", f'UserKnownHostsFile="{known}"']
    words += ["-o", f"Ciphers=^{device.cipher or FAST_CIPHER}"]
    if device.identity_file:
        words += ["-i", str(Path(device.identity_file).expanduser()), "-o", "IdentitiesOnly=yes"]
    return [*words, "--", device.host, command]


def _number(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    return pipe.fileno()


def _widen(descriptor: int) -> None:
    """Let more bytes wait in a pipe, where the system can."""
    import fcntl

    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
