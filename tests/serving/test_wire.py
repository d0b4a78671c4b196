"""HTTP itself: what is no request, what is too much of one, and who may ask at all."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.serving.running import Server, read_all, serving

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}).encode()
PATIENCE_S = 0.5  # of the impatient server
TOKEN = "a-token-nobody-knows"


@pytest.fixture(scope="module")
def impatient(artifacts: dict[str, Path]) -> Iterator[Server]:
    """A server with small limits."""
    limits = {
        **dict.fromkeys(("head_s", "body_s", "idle_s"), PATIENCE_S),
        "connections": 4,
        "body_bytes": 2000,
        "head_bytes": 1000,
    }
    with serving(artifacts["onnx"], limits=limits) as server:
        yield server


@pytest.fixture(scope="module")
def guarded(artifacts: dict[str, Path]) -> Iterator[Server]:
    """A server that asks for a token, and that other machines could reach."""
    options = {"host": "0.0.0.0", "cors_origin": "https://app.example"}
    with serving(artifacts["onnx"], TOKEN, options=options) as server:
        yield server


def post(body: bytes = BODY, *fields: str, path: str = CHAT, version: str = "1.1") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, *fields, "", ""]).encode() + body


def split(data: bytes) -> tuple[int, bytes, Any]:
    """Status, head and JSON of the first answer in `data`."""
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if b"Content-Length" in line
    )
    return int(head.split()[1]), head, json.loads(body[:length])


NO_REQUESTS = [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    (b"GET /health\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX : 1\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\n folded: 1\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    (b"GET /" + b"a" * 40_000, 431),
    (post(BODY, "Content-Length: 5", "Content-Length: 6"), 400),
    (post(BODY, "Content-Length: -5"), 400),
    (post(BODY, "Content-Length: 5x"), 400),
    (post(BODY, "Content-Length: 1_0"), 400),
    (post(b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked"), 400),
    (post(b"", "Transfer-Encoding: gzip, chunked"), 501),
    (post(b"5\r\nabc", "Transfer-Encoding: chunked"), 0),  # it leaves in the middle
    (post(b"zz\r\n", "Transfer-Encoding: chunked"), 400),
    (post(b"2\r\nabcd\r\n0\r\n\r\n", "Transfer-Encoding: chunked"), 400),
    (post(b"fffffff\r\n", "Transfer-Encoding: chunked"), 413),
    (post(b"", "Content-Length: 99999999999"), 413),
    (post(BODY, "Content-Length: 3"), 400),  # no JSON, and then no request
]


@pytest.mark.parametrize(("data", "status"), NO_REQUESTS, ids=range(len(NO_REQUESTS)))
def test_what_is_no_request(server: Server, data: bytes, status: int) -> None:
    with server.open_socket() as link:
        link.sendall(data)
        link.shutdown(socket.SHUT_WR)
        answer = read_all(link)
    if not status:
        assert answer == b""
        return
    found, head, body = split(answer)
    assert found == status, answer
    assert body["error"]["message"]
    # The rest of it could be anything, and is not taken for a request.
    assert b"Connection: close" in head or data == post(BODY, "Content-Length: 3")


def test_a_large_body_is_refused_before_it_is_sent(impatient: Server) -> None:
    """Also to a client that sends it all the same and reads only then."""
    reply = impatient.ask("POST", CHAT, b"x" * 20_000_000)
    assert reply.status == 413
    assert "2000" in reply.error["message"]
    with impatient.open_socket() as link:
        link.sendall(post(b"", "Content-Length: 3000", "Expect: 100-continue"))
        assert split(read_all(link))[0] == 413


def test_a_body_that_is_waited_for(server: Server) -> None:
    with server.open_socket() as link:
        link.sendall(post(b"", f"Content-Length: {len(BODY)}", "Expect: 100-continue"))
        assert link.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        link.sendall(BODY)
        assert link.recv(100).startswith(b"HTTP/1.1 200 OK\r\n")


def test_chunks(server: Server) -> None:
    chunks = b"".join(b"%x;x=y\r\n%c\r\n" % (1, byte) for byte in BODY)
    data = post(chunks + b"0\r\nTrailer: 1\r\n\r\n", "Transfer-Encoding: chunked")
    status, _, answer = split(server.send_raw(data + b"GET / HTTP/1.0\r\n\r\n"))
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 2


def test_requests_in_a_row_are_answered_in_order(server: Server) -> None:
    """Also when they come before the first answer is sent."""
    one = post(BODY, f"Content-Length: {len(BODY)}")
    data = server.send_raw(
        one + one + b"GET /health HTTP/1.1\r\nHost: [::1]:1\r\nConnection: close\r\n\r\n"
    )
    assert data.count(b"HTTP/1.1 200 OK") == 3
    assert data.endswith(b'{"status": "ok"}\n')


def test_a_connection_is_used_again_after_a_stream(server: Server) -> None:
    link = server.connect()
    body = {"messages": [{"role": "user", "content": "What is 2 plus 2?"}], "stream": True}
    for _ in range(3):
        assert server.ask("POST", CHAT, body, connection=link).streamed_text
        assert server.ask("POST", CHAT, {"messages": 1}, connection=link).status == 400
        assert server.ask("GET", "/health", connection=link).status == 200
    link.close()


def test_http_1_0(server: Server) -> None:
    """No chunks there, and no connection that stays."""
    answer = server.send_raw(b"GET /health HTTP/1.0\r\n\r\n")
    assert split(answer)[0] == 200
    assert b"Connection: close" in answer
    body = BODY[:-1] + b', "stream": true}'
    answer = server.send_raw(post(body, f"Content-Length: {len(body)}", version="1.0"))
    assert b"chunked" not in answer
    assert answer.endswith(b"\n\ndata: [DONE]\n\n")


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", post(b"{", "Content-Length: 900")])
def test_a_slow_client_has_a_deadline(impatient: Server, sent: bytes) -> None:
    """A byte now and then does not put it off, and others are answered meanwhile."""
    begin_s = time.monotonic()
    with impatient.open_socket() as link:
        link.sendall(sent)
        link.settimeout(PATIENCE_S / 5)
        answer, is_closed = b"", False
        while not is_closed:
            assert time.monotonic() < begin_s + 30
            try:
                if sent:
                    link.sendall(b"x")
                piece = link.recv(1000)
                answer, is_closed = answer + piece, not piece
            except TimeoutError:
                assert impatient.ask("GET", "/health").status == 200
            except OSError:
                is_closed = True
    assert time.monotonic() >= begin_s + PATIENCE_S * 0.9
    assert split(answer)[0] == 408 if sent else answer == b""


def test_too_many_connections(artifacts: dict[str, Path]) -> None:
    limits = {"connections": 4, "head_s": 3.0}
    with serving(artifacts["onnx"], limits=limits) as server, ExitStack() as stack:
        links = [stack.enter_context(server.open_socket()) for _ in range(4)]
        for link in links:
            link.sendall(b"GET")
        assert wait_for(lambda: server.ask("GET", "/health").status == 503)
        refused = server.ask("GET", "/health")
        assert refused.error["code"] == "too_many_connections"
        # The slow ones are sent away, and there is room again.
        assert all(read_all(link).startswith(b"HTTP/1.1 408") for link in links)
        assert wait_for(lambda: server.ask("GET", "/health").status == 200)


def wait_for(is_so: Any, timeout_s: float = 30.0) -> bool:
    end_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.02)
    return True


def test_paths_and_methods(server: Server) -> None:
    for path in ("/", "/v1", "/v2/models", "/v1/chat", "/v1/embeddings", "/%00", "//health", "*"):
        assert server.ask("GET", path).error["message"].startswith("nothing is at")
    for path, method in ((CHAT, "GET"), ("/v1/models", "DELETE"), ("/metrics", "PUT")):
        reply = server.ask(method, path)
        assert reply.status == 405
        assert method not in reply.headers["allow"]
        assert method in reply.error["message"]


def test_head_is_get_without_the_body(server: Server) -> None:
    link = server.connect()
    head = server.ask("HEAD", "/v1/models", connection=link)
    whole = server.ask("GET", "/v1/models", connection=link)
    link.close()
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"] == str(len(whole.body))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_web_page_cannot_post_without_being_asked_about(server: Server, kind: str) -> None:
    """What a browser sends across origins without a preflight is refused."""
    reply = server.ask("POST", CHAT, BODY, {"Content-Type": kind})
    assert (reply.status, "application/json" in reply.error["message"]) == (415, True)


def test_browsers_get_no_leave_unless_it_was_given(server: Server, guarded: Server) -> None:
    asks = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    assert not [
        name for name in server.ask("OPTIONS", CHAT, None, asks).headers if "access" in name
    ]
    reply = guarded.ask("OPTIONS", CHAT, None, asks)
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
    other = guarded.ask("OPTIONS", CHAT, None, {**asks, "Origin": "https://other.example"})
    assert not [name for name in other.headers if "access" in name]
    refused = guarded.ask("POST", CHAT, BODY, {"Origin": "https://app.example"})
    assert refused.status == 401  # which the page may read
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "127.0.0.1:1", "[::1]:8080", "[::1]", "127.9.9.9")),
        *(
            (host, 403)
            for host in ("evil.example", "evil.example:8080", "10.0.0.1", "", "localhost.")
        ),
    ],
)
def test_names_of_other_machines(server: Server, host: str, status: int) -> None:
    """A name that an attacker's DNS points at this machine does not open it."""
    assert server.ask("GET", "/v1/models", None, {"Host": host}).status == status


@pytest.mark.parametrize(
    "header",
    [
        *("", "Bearer", "Bearer ", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", "Bearer \xe9"),
        f"Bearer {TOKEN[:-1]}",
    ],
)
def test_a_wrong_token(guarded: Server, header: str) -> None:
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")):
        body = BODY if method == "POST" else None
        reply = guarded.ask(method, path, body, {"Authorization": header} if header else {})
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert TOKEN[:-1] not in reply.body.decode()


def test_the_right_token(guarded: Server) -> None:
    for scheme in ("Bearer", "bearer"):
        headers = {"Authorization": f"{scheme} {TOKEN}", "Host": "device.example:8080"}
        assert guarded.ask("POST", CHAT, BODY, headers).status == 200
    assert guarded.ask("GET", "/health").json == {"status": "ok"}
    assert not any(TOKEN in line for line in guarded.log)


def test_without_a_token_any_is_accepted(server: Server) -> None:
    """Clients insist on sending one."""
    assert server.ask("GET", "/v1/models", None, {"Authorization": "Bearer none"}).status == 200


def test_the_log_says_nothing_of_what_was_said(server: Server) -> None:
    secret = "Xylophone-4711"
    server.chat(f"Remember {secret}", max_tokens=8)
    server.ask("POST", CHAT, {secret: 1})
    server.ask("GET", f"/{secret}")
    request = server.ask("POST", CHAT, {secret: 2}).headers["x-request-id"]
    assert wait_for(lambda: any(request in line for line in server.log))
    assert not any(secret in line for line in server.log)
