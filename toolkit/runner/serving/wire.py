"""HTTP/1.1 on one connection: requests in, answers out, within limits and deadlines (RFC 9112)."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

from .bodies import Announce
from .options import Limits
from .refusal import Gone, Refusal, refuse

T = TypeVar("T")

PIECE_BYTES = 64 << 10
LINGER_S = 2.0
REQUEST_LINE = re.compile(r"([A-Z]{1,16}) (\S+) HTTP/(\d)\.(\d)")
FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
# Two of them mean that two programs may understand two different requests.
SINGLE = {"host", "content-length", "transfer-encoding", "authorization", "content-type"}


@dataclass(frozen=True)
class Head:
    """A request without its body; names of `fields` are lower case."""

    method: str
    target: str
    minor_version: int
    fields: dict[str, str]

    @property
    def keeps_alive(self) -> bool:
        """Whether the client may ask more on this connection."""
        return self.minor_version > 0 and "close" not in self.fields.get("connection", "").lower()

    @property
    def has_body(self) -> bool:
        """Whether more bytes of this request follow."""
        length = self.fields.get("content-length", "0")
        return length != "0" or "transfer-encoding" in self.fields


def parse_head(data: bytes) -> Head:
    """Parse a request's head; Refusal for whatever is not exactly one."""
    first, *lines = data.decode("latin-1").split("\r\n")
    match = REQUEST_LINE.fullmatch(first)
    if not match:
        raise refuse("the first line is not that of an HTTP request")
    method, target, major, minor = match.groups()
    if major != "1":
        raise Refusal(505, f"HTTP/{major}.{minor} is not spoken here; use HTTP/1.1")
    fields: dict[str, str] = {}
    for line in lines:
        field = FIELD.fullmatch(line)
        if not field:
            raise refuse("a header line is not one")
        name, value = field[1].lower(), field[2].strip(" \t")
        if name in fields and name in SINGLE:
            raise refuse(f"the header {name} is there twice")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    if int(minor) > 0 and "host" not in fields:
        raise refuse("the header Host is missing")
    return Head(method, target, int(minor), fields)


class Connection:
    """One client's connection. Gone is raised as soon as it is known to have left."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._limits = limits
        self._ahead = bytearray()  # read, but not yet understood
        link = writer.get_extra_info("socket")
        # A device that lost its network sends no end; the kernel finds out.
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    async def read_head(self) -> Head:
        """Wait for a request and return its head; Gone when none comes."""
        if not self._ahead:
            try:
                await asyncio.wait_for(self._fill(), self._limits.idle_s)
            except asyncio.TimeoutError:
                raise Gone from None
        too_long = Refusal(431, f"a request's head has at most {self._limits.head_bytes} bytes")
        reading = self._read_until(b"\r\n\r\n", self._limits.head_bytes, too_long)
        head = await _within(self._limits.head_s, reading, "the request's head")
        return parse_head(head.lstrip(b"\r\n"))  # some clients end a body with an empty line

    async def read_body(self, head: Head, announce: Announce) -> bytes:
        """Return a request's body, as it is announced: by its length, or in chunks.

        `announce` is told of bytes before they are read, and may raise Refusal.
        """
        coding, length = head.fields.get("transfer-encoding"), head.fields.get("content-length")
        if coding is None and length is None:
            return b""
        if coding is not None and length is not None:
            raise refuse("Content-Length and Transfer-Encoding exclude one another")
        if coding is not None and coding.lower() != "chunked":
            raise Refusal(501, "the only Transfer-Encoding spoken here is chunked")
        size = None if length is None else self._parse_length(length)
        announce(size or 0)
        if head.fields.get("expect", "").lower() == "100-continue":
            await self.send_bytes(b"HTTP/1.1 100 Continue\r\n\r\n")
        reading = self._read_chunks(announce) if size is None else self._read_exactly(size)
        return await _within(self._limits.body_s, reading, "the request's body")

    async def wait_gone(self) -> None:
        """Return once the client has left; what it sends before that is kept for later."""
        try:
            while len(self._ahead) < self._limits.head_bytes:
                await self._fill()
        except Gone:
            return
        await asyncio.Event().wait()  # it is there, and has said enough for now

    async def send(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """Send the head of an answer, and its body or the first part of it."""
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers]
        await self.send_bytes("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    async def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are; Gone when the client does not take them in time."""
        self._writer.write(data)
        try:
            await asyncio.wait_for(self._writer.drain(), self._limits.write_s)
        except (OSError, asyncio.TimeoutError):
            self._writer.transport.abort()
            raise Gone from None

    async def close(self, *, lingers: bool = False) -> None:
        """End the connection; a lingering end lets a client that still sends read its answer."""
        try:
            if lingers:
                self._writer.write_eof()
                await asyncio.wait_for(self._drop_input(), LINGER_S)
        except (OSError, Gone, asyncio.TimeoutError):
            pass
        self._writer.close()
        try:
            await asyncio.wait_for(self._writer.wait_closed(), self._limits.write_s)
        except (OSError, asyncio.TimeoutError):
            self._writer.transport.abort()

    async def _fill(self) -> None:
        try:
            data = await self._reader.read(PIECE_BYTES)
        except OSError:
            raise Gone from None
        if not data:
            raise Gone
        self._ahead += data

    async def _read_until(self, end: bytes, most_bytes: int, too_long: Refusal) -> bytes:
        start = 0
        while (place := self._ahead.find(end, start)) < 0:
            if len(self._ahead) > most_bytes:
                raise too_long
            start = max(0, len(self._ahead) - len(end) + 1)
            await self._fill()
        if place > most_bytes:
            raise too_long
        data = bytes(self._ahead[:place])
        del self._ahead[: place + len(end)]
        return data

    async def _read_exactly(self, size: int) -> bytes:
        while len(self._ahead) < size:
            await self._fill()
        data = bytes(self._ahead[:size])
        del self._ahead[:size]
        return data

    async def _read_chunks(self, announce: Announce) -> bytes:
        body, damaged = bytearray(), refuse("the body's chunks are damaged")
        while True:
            line = await self._read_until(b"\r\n", 1024, damaged)
            digits = line.partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", digits):
                raise damaged
            size = int(digits, 16)
            if len(body) + size > self._limits.body_bytes:
                raise self._too_large()
            if size == 0:
                break
            announce(size)
            body += await self._read_exactly(size)
            if await self._read_exactly(2) != b"\r\n":
                raise damaged
        for _ in range(100):  # trailers, which mean nothing here
            if not await self._read_until(b"\r\n", 1024, damaged):
                return bytes(body)
        raise damaged

    def _parse_length(self, text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise refuse("Content-Length is no number")
        if int(text) > self._limits.body_bytes:
            raise self._too_large()
        return int(text)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"a request's body has at most {self._limits.body_bytes} bytes")

    async def _drop_input(self) -> None:
        self._ahead.clear()
        while await self._reader.read(PIECE_BYTES):
            pass


async def _within(timeout_s: float, reading: Awaitable[T], what: str) -> T:
    try:
        return await asyncio.wait_for(reading, timeout_s)
    except asyncio.TimeoutError:
        raise Refusal(408, f"{what} did not arrive within {timeout_s:g} s") from None
