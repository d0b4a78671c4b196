"""One answer at a time: who waits, who is sent away, who left, and what breaks."""

import contextlib
import http.client
import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import KINDS
from tests.serving.running import JSON, Reply, Server, read_all, serving
from tests.serving.test_wire import split, wait_for

CHAT = "/v1/chat/completions"
LONG = {"prompt": "The", "max_tokens": 400}  # goes on to its end, which the test checks
DELAY_S = 0.02  # a token, so that an answer of 400 would take eight seconds
QUEUE = 2


@pytest.fixture(scope="module", params=KINDS)
def slow(request: pytest.FixtureRequest, artifacts: dict[str, Path]) -> Iterator[Server]:
    asked: dict[str, Any] = {"delay_s": DELAY_S, "options": {"queue_size": QUEUE}}
    with serving(artifacts[request.param], **asked) as server:
        yield server


def begin(server: Server, body: dict[str, Any] = LONG, *, streams: bool = True) -> socket.socket:
    """Send a request for a long answer, and read nothing."""
    data = json.dumps({**body, "stream": streams}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    link = server.open_socket()
    link.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
    return link


def count_tokens(server: Server) -> float:
    return server.measure("generated_tokens_total")


def wait_running(server: Server) -> None:
    before = count_tokens(server)
    assert wait_for(lambda: count_tokens(server) > before + 2)


@pytest.mark.parametrize("streams", [True, False])
def test_who_leaves_ends_the_answer(slow: Server, streams: bool) -> None:
    cancelled = slow.measure("answers_total", end="cancelled")
    with begin(slow, streams=streams):
        wait_running(slow)
        begun = count_tokens(slow)
    # The next is served at once, long before 400 tokens are over.
    assert slow.chat("What is 2 plus 2?", max_tokens=2).status == 200
    assert count_tokens(slow) < begun + 100
    assert slow.measure("answers_total", end="cancelled") == cancelled + 1
    left = slow.measure("requests_total", route="/completions", status="499")
    assert left >= 1
    after = count_tokens(slow)
    time.sleep(10 * DELAY_S)
    assert count_tokens(slow) == after


def test_who_leaves_the_line_gives_up_its_place(slow: Server) -> None:
    with begin(slow):
        wait_running(slow)
        with begin(slow), begin(slow):
            assert wait_for(lambda: slow.measure("queue_depth") == QUEUE)
            assert slow.chat("Hello").status == 429
        assert wait_for(lambda: slow.measure("queue_depth") == 0)
        wait_running(slow)  # the first is still at it
    assert slow.chat("Hello", max_tokens=1).status == 200


def test_the_line_has_an_end(slow: Server) -> None:
    before = slow.measure("requests_total", route="/chat/completions", status="429")
    with begin(slow), ExitStack() as stack:
        wait_running(slow)
        links = [stack.enter_context(begin(slow, {"prompt": "A", "max_tokens": 1}, streams=False))
                 for _ in range(QUEUE)]  # fmt: skip
        assert wait_for(lambda: slow.measure("queue_depth") == QUEUE)
        refused = slow.chat("Hello")
        assert refused.status == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (refused.error["type"], refused.error["code"]) == ("rate_limit_error", "queue_full")
        # What needs no turn is answered as ever.
        assert slow.ask("GET", "/health").status == 200
        assert slow.chat("Hello", n=2).status == 400
        assert slow.measure("requests_total", route="/chat/completions", status="429") == before + 1
        begun = links[0]
        begun.settimeout(0.1)
        with pytest.raises(TimeoutError):
            begun.recv(1)  # it waits
    assert wait_for(lambda: slow.measure("queue_depth") == 0)


def test_those_who_wait_are_answered_in_turn(slow: Server) -> None:
    with begin(slow) as first:
        wait_running(slow)
        with begin(slow, {"prompt": "A", "max_tokens": 3}, streams=False) as second:
            assert wait_for(lambda: slow.measure("queue_depth") == 1)
            first.close()
            assert b'"completion_tokens": 3' in second.recv(10_000)


def test_a_client_that_does_not_read_holds_up_nobody(artifacts: dict[str, Path]) -> None:
    with serving(artifacts["onnx"], limits={"write_s": 0.5}) as server:
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        link.connect(("127.0.0.1", server.port))
        # Pages for some ten megabytes, which no kernel keeps for so small a window.
        link.settimeout(0.5)
        with contextlib.suppress(OSError):
            link.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
        assert server.chat("What is 2 plus 2?").status == 200
        # In the end the connection is given up.
        assert wait_for(lambda: server.measure("connections") == 1)
        left = {"route": "/metrics", "status": "499"}
        assert server.measure("requests_total", **left) == 1
        link.close()


@pytest.mark.parametrize("streams", [False, True])
def test_an_engine_that_breaks_in_the_middle(artifacts: dict[str, Path], streams: bool) -> None:
    with serving(artifacts["onnx"], fail_after=3) as server:
        reply = server.chat("What is the capital of France?", stream=streams)
        check_no_inside(reply)
        if streams:
            assert reply.status == 200
            *chunks, last, rest = reply.body.decode().split("\n\n")
            assert (len(chunks), rest) == (4, "")  # the role and three tokens, and no [DONE]
            error = json.loads(last[len("data: ") :])["error"]
        else:
            assert reply.status == 500
            error = reply.error
        assert (error["type"], error["code"]) == ("server_error", "engine_failed")
        assert server.measure("answers_total", end="failed") == 1
        # The log has it all.
        assert wait_for(lambda: any("the engine broke" in line for line in server.log))
        assert any("in generate" in line for line in server.log)
        # One request may be to blame; an engine that fails always is.
        assert server.ask("GET", "/health").status == 200
        for _ in range(2):
            server.chat("Hello")
        unwell = server.ask("GET", "/health")
        assert (unwell.status, unwell.json) == (503, {"status": "failing"})
        assert server.chat("Hello", max_tokens=3).status == 200
        assert server.ask("GET", "/health").status == 200
        assert server.stop() == 0


def test_an_engine_that_breaks_before_it_answers(artifacts: dict[str, Path]) -> None:
    with serving(artifacts["onnx"], fail_encoding=True) as server:
        for streams in (False, True):
            reply = server.chat("Xylophone", stream=streams)
            assert (reply.status, reply.error["code"]) == (500, "engine_failed")
            check_no_inside(reply)
        assert wait_for(lambda: any("in encode" in line for line in server.log))
        # This failure quotes the prompt, and the log does not.
        assert not any("Xylophone" in line for line in server.log)


def check_no_inside(reply: Reply) -> None:
    words = ("Traceback", ".py", "RuntimeError", "broke", "line ")
    assert not any(word in reply.body.decode() for word in words)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", KINDS)
def test_stopping_lets_the_answer_end(
    artifacts: dict[str, Path], kind: str, number: signal.Signals
) -> None:
    with serving(artifacts[kind], delay_s=DELAY_S) as server, ExitStack() as stack:
        link = stack.enter_context(begin(server, {"prompt": "The", "max_tokens": 100}))
        wait_running(server)
        waiting = stack.enter_context(begin(server, streams=False))
        assert wait_for(lambda: server.measure("queue_depth") == 1)
        idle = server.connect()
        assert server.ask("GET", "/health", connection=idle).status == 200
        server.process.send_signal(number)
        # Who waits is told to go elsewhere, and so is who comes now.
        assert b" 503 " in waiting.recv(4096)
        assert server.ask("GET", "/health").json == {"status": "stopping"}
        refused = server.chat("Hello")
        assert (refused.status, refused.error["code"]) == (503, "stopping")
        assert read_all(link).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert server.wait() == 0
        assert not any("Traceback" in line for line in server.log)


def test_patience_ends(artifacts: dict[str, Path]) -> None:
    """After the grace period, or at the second signal, the answer ends with an error."""
    for grace_s, signals in ((0.2, 1), (60.0, 2)):
        options = {"grace_s": grace_s}
        with serving(artifacts["onnx"], delay_s=DELAY_S, options=options) as server:
            with begin(server) as link:
                wait_running(server)
                for _ in range(signals):
                    server.process.send_signal(signal.SIGTERM)
                    wait_for(lambda: server.ask("GET", "/health").status == 503, 1.0)
                ended = read_all(link)
            assert b'"code": "stopping"' in ended
            assert b"[DONE]" not in ended
            assert server.wait() == 0


def test_an_engine_that_never_returns_keeps_nobody(artifacts: dict[str, Path]) -> None:
    with serving(artifacts["onnx"], delay_s=3600, options={"grace_s": 0.1}) as server:
        with begin(server) as link:
            assert wait_for(lambda: server.measure("prompt_tokens_total") > 0)
            server.process.send_signal(signal.SIGTERM)
            assert b'"code": "stopping"' in read_all(link)
        assert server.wait() == 0
        assert any("did not end in time" in line for line in server.log)


def test_answers_do_not_mix_on_one_connection_that_leaves(slow: Server) -> None:
    """Requests sent ahead on a connection that is closed are not taken up."""
    before = slow.measure("answers_total", end="length")
    link = http.client.HTTPConnection("127.0.0.1", slow.port)
    link.request("POST", "/v1/completions", json.dumps(LONG).encode(), JSON)
    wait_running(slow)
    assert link.sock
    link.sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    link.close()
    assert slow.chat("Hello", max_tokens=1).status == 200
    assert slow.measure("answers_total", end="length") <= before + 1
    assert split(slow.send_raw(b"GET /health HTTP/1.0\r\n\r\n"))[0] == 200
