"""One request with its answer: headers, whole pages, and streams of events."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from .refusal import Refusal
from .wire import Connection, Head

JSON = "application/json"
EVENTS = "text/event-stream; charset=utf-8"


@dataclass(frozen=True)
class Page:
    """An answer that is whole before it is sent."""

    body: bytes = b""
    status: int = 200
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


def make_page(
    data: dict[str, Any], status: int = 200, headers: tuple[tuple[str, str], ...] = ()
) -> Page:
    """Return a page of JSON, all of it ASCII."""
    return Page(json.dumps(data).encode() + b"\n", status, headers=headers)


class Exchange:
    """Sends one answer; `status` is what was sent, 0 before anything was."""

    def __init__(self, connection: Connection, head: Head | None, cors_origin: str | None) -> None:
        self.connection = connection
        self.head = head
        self.id = f"req_{secrets.token_hex(8)}"
        self.status = 0
        self.route = "other"
        self.note = ""  # for the log
        self.keeps_alive = head is not None and head.keeps_alive
        self._cors_origin = cors_origin
        # Before HTTP/1.1 there are no chunks: the end of the connection is that of the stream.
        self._is_chunked = head is not None and head.minor_version > 0

    async def send_page(self, page: Page) -> None:
        """Send a whole answer."""
        self.status = page.status
        headers = [*self._common(page.content_type), *page.headers]
        if page.status != 204:
            headers.append(("Content-Length", str(len(page.body))))
        is_bare = self.head is not None and self.head.method == "HEAD"
        await self.connection.send(page.status, headers, b"" if is_bare else page.body)

    async def send_refusal(self, refusal: Refusal) -> None:
        """Send an error in OpenAI's shape: as the answer, or as the event that ends it."""
        if not self.status:
            await self.send_page(make_page(refusal.to_json(), refusal.status, refusal.headers))
            return
        await self.send_event(b"data: " + json.dumps(refusal.to_json()).encode() + b"\n\n")
        await self.end_stream()

    async def start_stream(self) -> None:
        """Send the head of a stream of events."""
        self.status = 200
        self.keeps_alive = self.keeps_alive and self._is_chunked
        coding = [("Transfer-Encoding", "chunked")] if self._is_chunked else []
        await self.connection.send(200, [*self._common(EVENTS), *coding], b"")

    async def send_event(self, event: bytes) -> None:
        """Send an event at once."""
        framed = b"%x\r\n%b\r\n" % (len(event), event) if self._is_chunked else event
        await self.connection.send_bytes(framed)

    async def end_stream(self) -> None:
        """Send the end of a stream."""
        if self._is_chunked:
            await self.connection.send_bytes(b"0\r\n\r\n")

    def _common(self, content_type: str) -> list[tuple[str, str]]:
        return [
            ("Content-Type", content_type),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Request-Id", self.id),
            ("Connection", "keep-alive" if self.keeps_alive else "close"),
            *self._allow_origin(),
        ]

    def _allow_origin(self) -> list[tuple[str, str]]:
        """What tells a browser that the page at the allowed origin may read this."""
        allowed, fields = self._cors_origin, self.head.fields if self.head else {}
        if allowed is None or allowed not in ("*", fields.get("origin")):
            return []
        headers = [("Access-Control-Allow-Origin", allowed), ("Vary", "Origin")]
        asked = fields.get("access-control-request-headers", "")
        if re.fullmatch(r"[A-Za-z0-9, -]+", asked):
            headers.append(("Access-Control-Allow-Headers", asked))
            headers.append(("Access-Control-Allow-Methods", "GET, POST"))
        return headers
