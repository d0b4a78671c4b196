"""A real HTTP server that answers as each test says, and remembers what it was asked."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from toolkit.endpoint import Endpoint


@dataclass
class Said:
    """What the server says to a request: a status, headers, and pieces of a body."""

    status: int = 200
    body: bytes | list[bytes] = b""
    headers: dict[str, str] = field(default_factory=dict)
    hold_s: float = 0.0  # between the pieces

    @classmethod
    def json(cls, data: Any, status: int = 200, **headers: str) -> "Said":
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, json.dumps(data).encode(), named)


@dataclass
class Asked:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


Answer = Callable[[Asked], Said]


@dataclass
class ChatServer:
    """Where it listens, and what it was asked so far."""

    base_url: str
    asked: list[Asked] = field(default_factory=list)

    def endpoint(self, model: str = "some-model", key: str | None = None) -> Endpoint:
        return Endpoint(self.base_url, model, key)


def reply(text: str, *, finish: str = "stop", usage: tuple[int, int] | None = (7, 3)) -> Said:
    """An answer as OpenAI writes it."""
    data: dict[str, Any] = {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "some-model",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text},
                     "finish_reason": finish}],
    }  # fmt: skip
    if usage:
        counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        data["usage"] = {**counts, "total_tokens": sum(usage)}
    return Said.json(data)


def stream(pieces: list[str], *, done: bool = True, hold_s: float = 0.0) -> Said:
    """The same as server-sent events, usage last."""
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant"}}]}]
    chunks += [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}]
    chunks += [{"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": len(pieces)}}]
    lines = [b"data: " + json.dumps(chunk, ensure_ascii=False).encode() for chunk in chunks]
    lines += [b"data: [DONE]"] if done else []
    headers = {"Content-Type": "text/event-stream"}
    return Said(200, [line + b"\n\n" for line in lines], headers, hold_s)


@contextmanager
def serving(answer: Answer) -> Iterator[ChatServer]:
    """Serve on a free loopback port for the length of the block."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked = Asked(self.path, dict(self.headers), json.loads(body))
            server.asked.append(asked)
            said = answer(asked)
            pieces = [said.body] if isinstance(said.body, bytes) else said.body
            self.send_response(said.status)
            for name, value in said.headers.items():
                self.send_header(name, value)
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                for piece in pieces:
                    self.wfile.write(piece)
                    self.wfile.flush()
                    released.wait(said.hold_s)
            except OSError:
                pass  # the client left, as some tests want
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = ChatServer(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        released.set()
        http.shutdown()
        http.server_close()
