"""A device inside this process: a real SSH server on loopback, commands in a folder of its own.

For the demo and for tests. Commands are real processes of this machine; only their working
folder, HOME and environment are their own, so it is no sandbox against hostile code.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from toolkit.device import EMBEDDED, Device
from toolkit.errors import require
from toolkit.ssh.knownhosts import HostKey

ROOT_VARIABLE = "PHISHIP_EMBEDDED_ROOT"
QUOTA_VARIABLE = "PHISHIP_QUOTA_BYTES"
LOOPBACK = "127.0.0.1"
# Any name may log in with the key; commands run as the user of this process.
USER = "device"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
READ_BYTES = 256 << 10
WINDOW_BYTES = 16 << 20
PACKET_BYTES = 256 << 10
START_TIMEOUT_S = 30
END_TIMEOUT_S = 10

T = TypeVar("T")


class EmbeddedDevice:
    """A device below `root`: `root`/home is what it sees, `root`/keys holds its key pairs."""

    def __init__(
        self,
        root: Path,
        *,
        quota_bytes: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.home = root.absolute() / "home"
        self._keys = root.absolute() / "keys"
        self._environment = _build_environment(self.home, quota_bytes, environment or {})
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._server: Any = None
        self._is_cut = False
        self._connections: set[Any] = set()
        self._processes: set[asyncio.subprocess.Process] = set()
        self._sessions: set[asyncio.Task[None]] = set()

    def start(self) -> Device:
        """Start serving; returns the device to connect to, with its host key pinned."""
        asyncssh = require("asyncssh")
        (self.home / "tmp").mkdir(parents=True, exist_ok=True, mode=0o700)
        self._keys.mkdir(exist_ok=True, mode=0o700)
        host_key = _ensure_key(asyncssh, self._keys / "host_key")
        _ensure_key(asyncssh, self._keys / "id_ed25519")
        self._thread.start()
        port = self._wait(self._serve(asyncssh, host_key))
        return Device(
            name=EMBEDDED,
            host=LOOPBACK,
            port=port,
            user=USER,
            identity_file=str(self._keys / "id_ed25519"),
            host_key=HostKey("ssh-ed25519", host_key.public_data).fingerprint,
            python=sys.executable,
            runtime="device",
        )

    @property
    def is_running(self) -> bool:
        """True between start and the first power cut or stop."""
        return self._server is not None and not self._is_cut

    def power_cut(self) -> None:
        """Pull the plug: every connection and process dies at once, nothing is cleaned up."""
        self._wait(self._cut())

    def stop(self) -> None:
        """Stop serving and end the thread; the files stay."""
        if self._thread.is_alive():
            self._wait(self._cut())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(START_TIMEOUT_S)
            self._loop.close()

    def __enter__(self) -> Device:
        """Start, for the length of a with block."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_TIMEOUT_S)

    async def _serve(self, asyncssh: Any, host_key: Any) -> int:
        self._server = await asyncssh.create_server(
            lambda: _new_session_rules(asyncssh, self._connections),
            LOOPBACK,
            0,
            server_host_keys=[host_key],
            authorized_client_keys=str(self._keys / "id_ed25519.pub"),
            process_factory=self._start_session,
            encoding=None,
            line_editor=False,
            allow_pty=False,
            agent_forwarding=False,
            allow_scp=False,
            gss_host=None,
            compression_algs=None,
            window=WINDOW_BYTES,
            max_pktsize=PACKET_BYTES,
        )
        return int(self._server.get_port())

    async def _cut(self) -> None:
        self._is_cut = True
        if self._server:
            self._server.close()
        for process in list(self._processes):
            _kill(process)
        for connection in list(self._connections):
            connection.abort()
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=END_TIMEOUT_S)

    def _start_session(self, channel: Any) -> None:
        """Run a command in a task of our own: asyncssh would cancel its own half-way."""
        task = self._loop.create_task(self._execute(channel))
        self._sessions.add(task)
        task.add_done_callback(self._sessions.discard)

    async def _execute(self, channel: Any) -> None:
        """Run the command of one SSH session; it dies with the session."""
        if channel.command is None:
            channel.stderr.write(b"this device has no interactive shell\n")
            channel.exit(1)
            return
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            channel.command,
            cwd=self.home,
            env=self._environment,
            start_new_session=True,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self._processes.add(process)
        feeding = asyncio.create_task(_pump(channel.stdin, process.stdin))
        finished = asyncio.create_task(_finish(process, channel))
        gone = asyncio.create_task(channel.channel.wait_closed())
        try:
            await asyncio.wait({finished, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            _kill(process)
            feeding.cancel()
            gone.cancel()
            # Awaited to the end, so that no pipe outlives the loop.
            await asyncio.gather(feeding, finished, gone, return_exceptions=True)
            self._processes.discard(process)


@contextlib.contextmanager
def running(device: Device) -> Iterator[Device]:
    """Yield a device that answers: itself, or the embedded one started for this block."""
    if not device.is_embedded:
        yield device
        return
    default = Path.home() / ".cache" / "phiship" / EMBEDDED
    with EmbeddedDevice(Path(os.environ.get(ROOT_VARIABLE) or default)) as started:
        yield started


def _new_session_rules(asyncssh: Any, connections: set[Any]) -> Any:
    """Return asyncssh's callbacks for one connection, which is remembered for a power cut."""

    class Rules(asyncssh.SSHServer):  # type: ignore[misc]
        def connection_made(self, conn: Any) -> None:
            self._connection = conn
            connections.add(conn)

        def connection_lost(self, _: Exception | None) -> None:
            connections.discard(self._connection)

        def connection_requested(self, dest_host: str, *_: object) -> bool:
            return dest_host.startswith("127.")

    return Rules()


async def _finish(process: asyncio.subprocess.Process, channel: Any) -> None:
    """Pass all output on, then how the process ended."""
    await asyncio.gather(
        _pump(process.stdout, channel.stdout, close=False),
        _pump(process.stderr, channel.stderr, close=False),
    )
    code = await process.wait()
    if code < 0:
        channel.exit_with_signal(signal.Signals(-code).name.removeprefix("SIG"))
    else:
        channel.exit(code)


async def _pump(source: Any, sink: Any, *, close: bool = True) -> None:
    """Copy until the source ends; asyncssh's own redirection breaks under back-pressure."""
    while piece := await source.read(READ_BYTES):
        with contextlib.suppress(OSError):  # nobody listens any more; the source still has to end
            sink.write(piece)
            await sink.drain()
    if close:
        sink.close()


def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill a command with all it has started; nothing happens when it has ended."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _build_environment(
    home: Path, quota_bytes: int | None, more: Mapping[str, str]
) -> dict[str, str]:
    """Return a login's environment; nothing of ours passes but what is named in `more`."""
    quota = {} if quota_bytes is None else {QUOTA_VARIABLE: str(quota_bytes)}
    return {
        "PATH": PATH,
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "LANG": "C.UTF-8",
        "USER": USER,
        "SHELL": "/bin/sh",
        **quota,
        **more,
    }


def _ensure_key(asyncssh: Any, path: Path) -> Any:
    """Read a key pair, made at the first start."""
    if not path.exists():
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_public_key(str(path.with_name(path.name + ".pub")))
        fresh = path.with_name(path.name + ".new")
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
            out.write(key.export_private_key())
        fresh.replace(path)
    return asyncssh.read_private_key(str(path))
