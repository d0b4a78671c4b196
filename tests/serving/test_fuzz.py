"""Bodies and bytes that nobody thought of: refused or answered, and never a fault.

`make test-clients` has the schema-driven fuzz (tests/clients/test_contract.py); this one changes
valid requests by any JSON anywhere, and requests by any bytes.
"""

import copy
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.running import Server, read_all
from tests.serving.test_wire import post

VALID: dict[str, Any] = {
    "model": "tiny-phi3-onnx-cpu-int4",
    "messages": [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ],
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "seed": 1,
    "stop": ["x"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 1,
    "tools": [],
    "response_format": {"type": "text"},
}
# Deep ones, wide ones, and what Python's JSON takes though no other does.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
PATHS = [("/v1/chat/completions", VALID), ("/v1/completions", {"prompt": "Hello", "max_tokens": 2})]
# A server under test is no data of the examples; each example is one request of milliseconds.
FUZZ = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def list_places(data: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value, as keys from the outside in."""
    keys = (
        data.keys()
        if isinstance(data, dict)
        else range(len(data))
        if isinstance(data, list)
        else ()
    )
    return [place, *(one for key in keys for one in list_places(data[key], (*place, key)))]


def put(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of `data` with `value` at a place."""
    if not place:
        return value
    made = copy.deepcopy(data)
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return made


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, Any]:
    """A path, and a valid body of it with one or two values changed."""
    path, body = draw(st.sampled_from(PATHS))
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(list_places(body)))
        if draw(st.booleans()) and isinstance(body, dict):
            place = (draw(st.text(max_size=8)),)
        body = put(body, place, draw(VALUES))
        if not isinstance(body, dict | list):
            break
    return path, body


def check_alive(server: Server) -> None:
    assert server.ask("GET", "/health").json == {"status": "ok"}


@FUZZ
@given(bodies())
def test_any_json(server: Server, asked: tuple[str, Any]) -> None:
    path, body = asked
    reply = server.ask("POST", path, json.dumps(body).encode("utf-8"))
    if reply.status == 200 and reply.headers["content-type"].startswith("text/event-stream"):
        assert reply.events[-1]["object"]
    elif reply.status == 200:
        assert reply.json["choices"][0]["finish_reason"] in ("stop", "length")
    else:
        assert reply.status in (400, 404), reply.body
        assert reply.error["type"] == "invalid_request_error"
        assert "Traceback" not in reply.error["message"]
    check_alive(server)


@FUZZ
@given(st.binary(max_size=200), st.sampled_from(["whole", "body", "cut"]), st.integers(0, 300))
def test_any_bytes(server: Server, data: bytes, kind: str, place: int) -> None:
    """As a request, as a body, and in the middle of a valid request; then the client leaves."""
    valid = json.dumps(VALID).encode()
    whole = post(valid, f"Content-Length: {len(valid)}")
    sent = {
        "whole": data,
        "body": post(data, f"Content-Length: {len(data)}"),
        "cut": whole[:place] + data + whole[place:],
    }[kind]
    with server.open_socket() as link:
        link.sendall(sent)
        link.shutdown(1)
        answer = read_all(link)
    for first in answer.split(b"HTTP/1.1 ")[1:]:
        assert first[:3] in (b"200", b"400", b"404", b"405", b"413", b"415", b"431", b"501", b"505",
                             b"403", b"408")  # fmt: skip
    assert b"Traceback" not in answer
    check_alive(server)
