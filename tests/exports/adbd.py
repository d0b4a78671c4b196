"""A phone for adb: the device's end of its protocol, over TCP, with a folder for /data/local/tmp.

Follows protocol.txt, SERVICES.TXT and SYNC.TXT of packages/modules/adb in AOSP: CNXN and AUTH,
OPEN, OKAY, WRTE, CLSE; the service `shell,v2,raw:` with its packets, and `sync:` with STAT, SEND
and QUIT. Anything else is closed, as adbd closes what it does not know. Commands run in a shell of
this machine, with Android's tools (toybox, mksh) where they are installed.
"""

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TMP = "/data/local/tmp"
VERSION = 0x01000001  # without checksums of data
MAX_BYTES = 256 * 1024
HEADER = struct.Struct("<4s5I")
BANNER = "device::ro.product.name=test;ro.product.model=Pixel;features=shell_v2"
GETPROP = """\
#!/bin/sh
case $1 in
    ro.product.model) echo Pixel 8 ;;
    ro.build.version.release) echo 14 ;;
    ro.product.cpu.abi) echo arm64-v8a ;;
esac
"""
TOOLS = ("sha256sum", "stat", "find", "df", "mkdir", "mv", "rm", "cat")


@dataclass
class Faults:
    """What goes wrong."""

    is_unauthorized: bool = False
    break_after_files: int | None = None  # the connection breaks when so many have arrived
    full_after_bytes: int | None = None
    spoil: bool = False  # files arrive with another last byte


@dataclass
class _Stream:
    """An open service: bytes that have arrived for it, and credits to send."""

    remote: int
    arrived: bytearray = field(default_factory=bytearray)
    is_open: bool = True
    may_send: bool = True


class Phone:
    """Listens on a port of loopback; `folder` is its /data/local/tmp."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.faults = folder, Faults()
        self.commands: list[str] = []
        self.received: list[str] = []
        (folder / "tmp").mkdir(parents=True)
        self.tmp = folder / "tmp"
        self.meminfo = folder / "meminfo"
        self.meminfo.write_text("MemTotal:        8000000 kB\nMemAvailable:    5000000 kB\n")
        self.bin = folder / "bin"
        self.bin.mkdir()
        (self.bin / "getprop").write_text(GETPROP)
        (self.bin / "getprop").chmod(0o755)
        if toybox := shutil.which("toybox"):
            for tool in TOOLS:
                (self.bin / tool).symlink_to(toybox)
        self.shell = shutil.which("mksh") or "/bin/sh"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        """Stop listening."""
        self._listener.close()

    def localize(self, text: str) -> str:
        """Paths of the phone as those of this machine."""
        return text.replace(TMP, str(self.tmp)).replace("/proc/meminfo", str(self.meminfo))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=_Session(self, connection).run, daemon=True).start()


class _Session:
    """One connection of an adb server."""

    def __init__(self, phone: Phone, connection: socket.socket) -> None:
        self._phone, self._connection = phone, connection
        self._streams: dict[int, _Stream] = {}
        self._changed = threading.Condition()

    def run(self) -> None:
        """Answer messages until the connection ends."""
        with contextlib.suppress(OSError, EOFError):
            while True:
                command, first, second, size, _, magic = HEADER.unpack(self._read(HEADER.size))
                assert magic == int.from_bytes(command, "little") ^ 0xFFFFFFFF, (
                    "not in the protocol"
                )
                self._handle(command, first, second, self._read(size))
        with self._changed:
            for stream in self._streams.values():
                stream.is_open = False
            self._changed.notify_all()
        self._connection.close()

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self._connection.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        magic = int.from_bytes(command, "little") ^ 0xFFFFFFFF
        header = HEADER.pack(command, first, second, len(data), sum(data) & 0xFFFFFFFF, magic)
        with self._changed:
            self._connection.sendall(header + data)

    def _handle(self, command: bytes, first: int, second: int, data: bytes) -> None:
        if command == b"CNXN":
            if self._phone.faults.is_unauthorized:
                return self._send(b"AUTH", 1, 0, bytes(20))
            return self._send(b"CNXN", VERSION, MAX_BYTES, BANNER.encode())
        if command == b"AUTH":  # a signature that is not known is answered by another token
            return self._send(b"AUTH", 1, 0, bytes(20)) if first == 2 else None
        if command == b"OPEN":
            return self._open(first, data.rstrip(b"\0").decode())
        with self._changed:
            stream = self._streams.get(second)
            if stream is None:
                return None
            if command == b"WRTE":
                stream.arrived += data
            elif command == b"OKAY":
                stream.may_send = True
            elif command == b"CLSE":
                stream.is_open = False
            self._changed.notify_all()
        return self._send(b"OKAY", second, first) if command == b"WRTE" else None

    def _open(self, remote: int, service: str) -> None:
        serve: Callable[[int], None] | None = None
        if service == "sync:":
            serve = self._sync
        elif service.startswith("shell,v2") and ",raw:" in service:
            command = service.partition(",raw:")[2]

            def serve(local: int) -> None:
                self._shell(local, command)

        if serve is None:
            return self._send(b"CLSE", 0, remote)
        local = len(self._streams) + 1
        self._streams[local] = _Stream(remote)
        self._send(b"OKAY", local, remote)
        return threading.Thread(target=self._serve, args=(serve, local), daemon=True).start()

    def _serve(self, serve: Callable[[int], None], local: int) -> None:
        with contextlib.suppress(OSError, EOFError):
            serve(local)
            self._send(b"CLSE", local, self._streams[local].remote)

    def _write(self, local: int, data: bytes) -> None:
        """Send as much as the other end takes at once, each time when it is ready."""
        stream = self._streams[local]
        for start in range(0, len(data), MAX_BYTES):
            with self._changed:
                self._changed.wait_for(lambda: stream.may_send or not stream.is_open)
                if not stream.is_open:
                    raise EOFError
                stream.may_send = False
            self._send(b"WRTE", local, stream.remote, data[start : start + MAX_BYTES])

    def _take(self, local: int, count: int) -> bytes:
        """The next bytes that arrive for a service."""
        stream = self._streams[local]
        with self._changed:
            self._changed.wait_for(lambda: len(stream.arrived) >= count or not stream.is_open)
            if len(stream.arrived) < count:
                raise EOFError
            taken = bytes(stream.arrived[:count])
            del stream.arrived[:count]
        return taken

    def _shell(self, local: int, command: str) -> None:
        """Packets of id and length: 1 is output, 2 errors, 3 the status."""
        phone = self._phone
        phone.commands.append(command)
        done = subprocess.run(
            [phone.shell, "-c", phone.localize(command)], capture_output=True, check=False,
            env={"PATH": f"{phone.bin}:{os.environ['PATH']}"}, cwd=phone.folder,
        )  # fmt: skip
        output = done.stdout.replace(str(phone.tmp).encode(), TMP.encode())
        for kind, data in ((1, output), (2, done.stderr), (3, bytes([done.returncode & 255]))):
            if data:
                self._write(local, struct.pack("<BI", kind, len(data)) + data)

    def _sync(self, local: int) -> None:
        while True:
            request, size = struct.unpack("<4sI", self._take(local, 8))
            if request == b"QUIT":
                return
            path = self._take(local, size).decode()
            if request == b"STAT":
                self._write(local, b"STAT" + self._stat(path))
            elif request == b"SEND":
                self._receive(local, path.rpartition(",")[0])
            else:
                raise EOFError(f"{request!r} is not in the protocol")

    def _stat(self, path: str) -> bytes:
        try:
            found = Path(self._phone.localize(path)).stat()
        except OSError:
            return struct.pack("<3I", 0, 0, 0)
        return struct.pack("<3I", found.st_mode, found.st_size, int(found.st_mtime))

    def _receive(self, local: int, path: str) -> None:
        """DATA until DONE; then OKAY, or FAIL with a reason."""
        phone, faults = self._phone, self._phone.faults
        if faults.break_after_files is not None and len(phone.received) >= faults.break_after_files:
            self._connection.shutdown(socket.SHUT_RDWR)
            raise EOFError
        content, is_full = bytearray(), False
        while True:
            kind, size = struct.unpack("<4sI", self._take(local, 8))
            if kind == b"DONE":
                break
            content += self._take(local, size)
            limit = faults.full_after_bytes
            is_full = is_full or (limit is not None and len(content) > limit)
        if is_full:
            reason = b"couldn't write: No space left on device"
            return self._write(local, struct.pack("<4sI", b"FAIL", len(reason)) + reason)
        if faults.spoil and content:
            content[-1] ^= 1
        Path(phone.localize(path)).write_bytes(content)
        phone.received.append(path)
        return self._write(local, struct.pack("<4sI", b"OKAY", 0))
