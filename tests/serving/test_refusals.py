"""Bodies that cannot be answered: each gets a 400 that says which field, and nothing worse."""

import json
from typing import Any

import pytest

from tests.serving.running import Reply, Server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
TOOL = {"type": "function", "function": {"name": "f"}}

# What is asked -> the field that is named.
CHATS: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [[]]}, "messages[0]"),
    ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "Hello"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "1", "tool_call_id": "x"}]}, None),
    ({"messages": [{"role": ["user"], "content": "Hello"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["Hello"]}]}, "messages[0].content"),
    ({"messages": [*HELLO, {"role": "user", "content": [IMAGE]}]}, "messages[1].content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages[0].content",
    ),
    (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [TOOL]}]},
        "messages[0].tool_calls",
    ),
    ({"messages": [{"role": "user", "content": "Hello", "colour": 1}]}, "messages[0].colour"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "12"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_p": []}, "top_p"),
    ({"seed": 1.5}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"stop": 1}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", None]}, "stop"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": "x" * 257}, "stop"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
    ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"presence_penalty": 1}, "presence_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [TOOL]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy"}}, "audio"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"temprature": 1}, "temprature"),
    ({"top_k": 40}, "top_k"),
    ({"model": 3}, "model"),
]
COMPLETION: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [1, 2, 3]}, "prompt"),
    ({"prompt": [[1, 2]]}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "word " * 600}, "prompt"),
    ({"prompt": "a", "echo": True}, "echo"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "logprobs": 2}, "logprobs"),
    ({"prompt": "a", "messages": HELLO}, "messages"),
]


def check_refusal(reply: Reply, status: int = 400) -> dict[str, Any]:
    assert reply.status == status, reply.body
    error = reply.error
    assert error["type"] == "invalid_request_error"
    # A sentence for people: neither a traceback nor a Python object.
    assert error["message"]
    assert not any(
        word in error["message"] for word in ("Traceback", "Error(", "<class", "object at")
    )
    return error


@pytest.mark.parametrize(("fields", "param"), CHATS)
def test_chats(server: Server, fields: dict[str, Any], param: str | None) -> None:
    error = check_refusal(server.ask("POST", CHAT, {"messages": HELLO, **fields}))
    if param is not None:
        assert error["param"] == param
        assert param.rpartition(".")[2].partition("[")[0] in error["message"]


@pytest.mark.parametrize(("body", "param"), COMPLETION)
def test_completions(server: Server, body: dict[str, Any], param: str) -> None:
    assert check_refusal(server.ask("POST", COMPLETIONS, body))["param"] == param


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"colour": 1}, "unknown_parameter"),
        ({"tools": [TOOL]}, "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "unsupported_content"),
    ],
)
def test_codes(server: Server, fields: dict[str, Any], code: str) -> None:
    reply = server.ask("POST", CHAT, {"messages": HELLO, **fields})
    assert check_refusal(reply)["code"] == code


def test_another_model(server: Server) -> None:
    error = check_refusal(server.chat("Hello", model="gpt-4o"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert server.told["model"] in error["message"]


BODIES = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b'{"messages": [],}', "not JSON"),
    (b"[]", "object"),
    (b"null", "object"),
    (b'"x"', "object"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', "UTF-8"),
    (b'\xef\xbb\xbf{"messages": []}', "not JSON"),
    ('{"messages": []}'.encode("utf-16"), "UTF-8"),
    (b'{"temperature": NaN}', "NaN"),
    (b'{"temperature": Infinity}', "Infinity"),
    (b'{"temperature": -Infinity}', "-Infinity"),
    (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}', "temperature"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
    (b'{"model": "a", "model": "b"}', "twice"),
    (b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}', "twice"),
    (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "surrogate"),
    (b'{"stop": "\\ude00", "messages": []}', "surrogate"),
    (b'{"\\ude00": 1}', "surrogate"),
    (b'{"messages": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "deep"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deep"),
]


@pytest.mark.parametrize(("body", "word"), BODIES, ids=range(len(BODIES)))
def test_bodies(server: Server, body: bytes, word: str) -> None:
    assert word in check_refusal(server.ask("POST", CHAT, body))["message"]


def test_a_surrogate_pair_is_a_character(server: Server) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud83d\\ude00"}], "max_tokens": 2}'
    assert server.ask("POST", CHAT, body).status == 200


def test_many_keys_are_read_in_time(server: Server) -> None:
    names = [f"key{number}" for number in range(60_000)]
    body = json.dumps(dict.fromkeys(names, 1)).encode()[:-1] + b', "key1": 2}'
    assert "twice" in check_refusal(server.ask("POST", CHAT, body))["message"]


@pytest.mark.parametrize("streams", [False, True])
def test_a_prompt_longer_than_the_context(server: Server, streams: bool) -> None:
    reply = server.chat("word " * 600, stream=streams)
    error = check_refusal(reply)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "512" in error["message"]


def test_an_answer_longer_than_the_context(server: Server) -> None:
    used = server.chat("Hello", max_tokens=1).json["usage"]["prompt_tokens"]
    assert server.chat("Hello", max_tokens=512 - used, stop=["a", "e", "i", "o"]).status == 200
    error = check_refusal(server.chat("Hello", max_tokens=512 - used + 1))
    assert error["code"] == "context_length_exceeded"


def test_without_a_number_the_answer_ends_with_the_context(server: Server) -> None:
    """Asked as text that never stops; the rest of the context is what it may take."""
    reply = server.ask("POST", COMPLETIONS, {"prompt": "The"})
    usage, choice = reply.json["usage"], reply.json["choices"][0]
    assert usage["total_tokens"] == 512 or choice["finish_reason"] == "stop"


def test_what_is_quoted_back_is_short(server: Server) -> None:
    long = "x" * 100_000
    bodies: list[dict[str, Any]] = [{long: 1}, {"model": long, "messages": HELLO}]
    bodies.append({"messages": [{"role": long, "content": "a"}]})
    for body in bodies:
        assert len(server.ask("POST", CHAT, body).body) < 1000
