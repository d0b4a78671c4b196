"""Bodies of many requests: bounded together, refused before they are read, free when they end."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.serving.running import Server, read_all, serving

CHAT = "/v1/chat/completions"
SMALL = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}).encode()
WAIT_S = 30.0


@pytest.fixture(scope="module")
def server(artifacts: dict[str, Path]) -> Iterator[Server]:
    """A server that holds two bodies and a half."""
    with serving(
        artifacts["onnx"], limits={"body_bytes": 2000, "held_bytes": 5000, "free_bytes": 0}
    ) as one:
        yield one


def post(server: Server, *fields: str, sent: bytes = b"") -> socket.socket:
    """Begin a request, and send so much of its body."""
    link = server.open_socket()
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *fields]
    link.sendall("\r\n".join([*lines, "", ""]).encode() + sent)
    return link


def wait_held(server: Server, count: int) -> None:
    """Wait until bodies of so many bytes are held."""
    deadline_s = time.monotonic() + WAIT_S
    while (found := server.measure("body_bytes")) != count:
        assert time.monotonic() < deadline_s, found
        time.sleep(0.05)


@pytest.mark.parametrize("coding", ["length", "chunks"])
def test_bodies_are_bounded_together(coding: str, server: Server) -> None:
    chunked = "Transfer-Encoding: chunked"
    with ExitStack() as opened:
        for _ in range(2):
            if coding == "length":
                link = post(server, "Content-Length: 2000", sent=b"{")
            else:
                link = post(server, chunked, sent=b"3e8\r\n" + b" " * 1000 + b"\r\n3e8\r\n{")
            opened.enter_context(closing(link))
        filling = opened.enter_context(closing(post(server, "Content-Length: 950", sent=b"{")))
        wait_held(server, 4950)
        reply = server.ask("POST", CHAT, SMALL)
        assert (reply.status, reply.error["code"]) == (429, "bodies_full")
        assert "requests of 4950 bytes are held already" in reply.error["message"]
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        # Before the body is read: who waits for leave to send it gets none.
        late = post(server, "Content-Length: 100", "Expect: 100-continue")
        with closing(late):
            assert late.recv(100).startswith(b"HTTP/1.1 429 ")
        with closing(post(server, chunked, sent=b"64\r\n")) as growing:
            assert read_all(growing).startswith(b"HTTP/1.1 429 ")
        assert server.ask("GET", "/health").status == 200
        filling.close()
        wait_held(server, 4000)
        assert server.ask("POST", CHAT, SMALL).status == 200
    wait_held(server, 0)


def test_bodies_are_held_until_their_answers_end(artifacts: dict[str, Path]) -> None:
    """Also that of one who waits for its turn."""
    long = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400})
    limits = {"body_bytes": 2000, "held_bytes": 4100, "free_bytes": 0}
    with serving(artifacts["onnx"], limits=limits, delay_s=0.05) as one, ExitStack() as opened:
        body = long.encode().ljust(2000)
        for _ in range(2):
            link = post(one, "Content-Length: 2000", sent=body)
            opened.enter_context(closing(link))
        wait_held(one, 4000)
        time.sleep(0.5)  # bodies are whole, and one waits for its turn
        assert one.measure("queue_depth") == 1
        assert one.ask("POST", CHAT, SMALL.ljust(200)).error["code"] == "bodies_full"
        opened.close()  # they leave, and their bodies with them
        wait_held(one, 0)


@pytest.mark.parametrize("coding", ["length", "chunks"])
def test_small_bodies_pass_by_large_ones(coding: str, artifacts: dict[str, Path]) -> None:
    """What counts is beyond a first part; two slow pictures do not keep a text from its answer."""
    limits = {"body_bytes": 2000, "held_bytes": 2000, "free_bytes": 1000}
    with serving(artifacts["onnx"], limits=limits) as one, ExitStack() as opened:
        for _ in range(2):
            opened.enter_context(closing(post(one, "Content-Length: 2000", sent=b"{")))
        wait_held(one, 2000)
        assert one.ask("POST", CHAT, SMALL.ljust(1000)).status == 200
        if coding == "length":
            assert one.ask("POST", CHAT, SMALL.ljust(1001)).error["code"] == "bodies_full"
        else:
            chunks = b"3e8\r\n" + b" " * 1000 + b"\r\n1\r\n"
            with closing(post(one, "Transfer-Encoding: chunked", sent=chunks)) as growing:
                assert read_all(growing).startswith(b"HTTP/1.1 429 ")
        wait_held(one, 2000)
