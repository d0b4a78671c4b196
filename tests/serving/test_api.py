"""What the server answers, compared with the runner's own answers and OpenAI's shapes."""

from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import KINDS, Servers
from tests.serving.running import Reply, Server
from toolkit.runner.generate import generate

FRANCE = "What is the capital of France?"
PARIS = "The capital of France is Paris."
PATHS = ("/v1/chat/completions", "/chat/completions", "/v1/chat/completions/?api-version=1")


def chat(*contents: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for content in contents]


@pytest.mark.parametrize("kind", [*KINDS, "mlx", "openvino"])
def test_the_answer_is_the_runners(servers: Servers, artifacts: dict[str, Path], kind: str) -> None:
    pieces: list[str] = []
    whole = generate(artifacts[kind], FRANCE, 24, pieces.append)
    reply = servers[kind].chat(FRANCE, max_tokens=24)
    assert reply.status == 200
    assert reply.text == whole["text"] == PARIS
    assert reply.json["choices"][0]["finish_reason"] == "stop"
    assert reply.json["usage"] == {
        "prompt_tokens": whole["prompt_tokens"],
        "completion_tokens": whole["new_tokens"],
        "total_tokens": whole["prompt_tokens"] + whole["new_tokens"],
    }


def test_shape_of_a_chats_answer(server: Server) -> None:
    answer = server.chat(FRANCE, user="me", metadata={"a": "b"}).json
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert type(answer["created"]) is int
    assert answer["model"] == server.told["model"] == "tiny-phi3-onnx-cpu-int4"
    assert answer["system_fingerprint"].startswith("fp_")
    message = {"role": "assistant", "content": PARIS, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert answer["choices"] == [choice]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wish", [None, {"include_usage": False}, {"include_usage": True}])
def test_shape_of_a_stream(servers: Servers, kind: str, wish: dict[str, bool] | None) -> None:
    more = {} if wish is None else {"stream_options": wish}
    reply = servers[kind].chat(FRANCE, stream=True, **more)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    whole = servers[kind].chat(FRANCE).json
    events = reply.events
    assert len({(one["id"], one["created"]) for one in events}) == 1
    assert {one["object"] for one in events} == {"chat.completion.chunk"}
    counts_tokens = wish == {"include_usage": True}
    if counts_tokens:
        *events, usage = events
        assert usage["choices"] == []
        assert usage["usage"] == whole["usage"]
    # Where usage was asked for, it is null in all other chunks; elsewhere it is not there.
    assert all((one.get("usage", 0) is None) == counts_tokens for one in events)
    choices = [one["choices"][0] for one in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(list(one["delta"]) == ["content"] for one in choices[1:-1])
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, "stop")
    assert all(one["finish_reason"] is None for one in choices[:-1])
    assert len(choices) > 4  # it came in pieces
    assert reply.streamed_text == whole["choices"][0]["message"]["content"] == PARIS


@pytest.mark.parametrize("path", ["/v1/completions", "/completions"])
def test_completions(server: Server, path: str) -> None:
    prompt = f"<|user|>\n{FRANCE}<|end|>\n<|assistant|>\n"
    reply = server.ask("POST", path, {"prompt": prompt, "max_tokens": 16})
    assert reply.json["object"] == "text_completion"
    assert reply.json["id"].startswith("cmpl-")
    assert reply.text.strip() == PARIS
    assert reply.json["usage"] == server.chat(FRANCE).json["usage"]
    options = {"prompt": [prompt], "stream": True, "stream_options": {"include_usage": True}}
    streamed = server.ask("POST", path, options)
    assert streamed.streamed_text == reply.text
    assert {one["object"] for one in streamed.events} == {"text_completion"}
    assert streamed.events[-1]["usage"] == reply.json["usage"]


@pytest.mark.parametrize("path", PATHS)
def test_paths_with_and_without_version(server: Server, path: str) -> None:
    assert server.ask("POST", path, {"messages": chat(FRANCE)}).text == PARIS


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("stop", [" is", ["nothing", "France"], ["is Par", " capital of Fr"]])
def test_stop_texts(server: Server, stop: Any, streams: bool) -> None:
    reply = server.chat(FRANCE, stop=stop, stream=streams)
    places = [PARIS.find(one) for one in ([stop] if isinstance(stop, str) else stop)]
    expected = PARIS[: min(place for place in places if place >= 0)]
    assert (reply.streamed_text if streams else reply.text) == expected
    last = reply.events[-1] if streams else reply.json
    assert last["choices"][0]["finish_reason"] == "stop"


def test_a_stop_text_that_never_comes_changes_nothing(server: Server) -> None:
    # It begins like the end of the answer, which is held back until it is over.
    reply = server.chat(FRANCE, stop=["Paris. And"], stream=True)
    assert reply.streamed_text == PARIS


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(server: Server, name: str) -> None:
    reply = server.chat(FRANCE, **{name: 3})
    assert PARIS.startswith(reply.text)
    assert reply.json["usage"]["completion_tokens"] == 3
    assert reply.json["choices"][0]["finish_reason"] == "length"


def test_seed_and_temperature(server: Server) -> None:
    def ask(**fields: Any) -> str:
        return server.chat("Tell me a story.", max_tokens=24, **fields).text

    greedy = ask()
    assert ask() == ask(temperature=0, seed=3) == ask(temperature=1.5, top_p=0) == greedy
    sampled = [ask(temperature=1.8, seed=seed) for seed in range(5)]
    assert len(set(sampled)) > 1
    assert sampled == [ask(temperature=1.8, seed=seed) for seed in range(5)]
    # top_p alone means: do sample.
    assert len({ask(top_p=0.99, seed=seed) for seed in range(8)}) > 1


@pytest.mark.parametrize(
    "messages",
    [
        chat(
            [
                {"type": "text", "text": "What is the capital"},
                {"type": "text", "text": " of France?"},
            ]
        ),
        [*chat("Answer the question.", role="system"), *chat(FRANCE)],
        [*chat("Answer the question.", role="developer"), *chat(FRANCE)],
        [{"role": "user", "content": FRANCE, "name": "me"}],
        [
            *chat("What is 2 plus 2?"),
            # What clients send back is what they were sent.
            {"role": "assistant", "content": "4", "refusal": None, "tool_calls": None},
            *chat(FRANCE),
        ],
    ],
)
def test_messages(server: Server, messages: list[dict[str, Any]]) -> None:
    reply = server.ask("POST", "/v1/chat/completions", {"messages": messages})
    assert reply.status == 200, reply.body
    assert reply.text == PARIS


def test_a_developer_is_the_system(server: Server) -> None:
    def count(role: str) -> int:
        messages = [*chat("Answer.", role=role), *chat(FRANCE)]
        reply = server.ask("POST", "/v1/chat/completions", {"messages": messages})
        return int(reply.json["usage"]["prompt_tokens"])

    assert count("developer") == count("system")


def test_values_that_ask_for_nothing_are_taken(server: Server) -> None:
    nothing = {
        "n": 1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_logprobs": None,
        "stream": None,
        "stop": None,
        "seed": None,
        "store": True,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "model": server.told["model"],
    }
    assert server.chat(FRANCE, **nothing).text == PARIS


def test_models(server: Server) -> None:
    listed = server.ask("GET", "/v1/models").json
    assert listed["object"] == "list"
    (model,) = listed["data"]
    assert (model["id"], model["object"]) == (server.told["model"], "model")
    assert model["context_length"] == server.told["context_tokens"] == 512
    assert server.ask("GET", f"/v1/models/{model['id']}").json == model
    missing = server.ask("GET", "/models/gpt-5%2Fx")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


def test_metrics(server: Server) -> None:
    names = ("prompt_tokens_total", "generated_tokens_total")
    before = [server.measure(name) for name in names]
    usage = server.chat(FRANCE).json["usage"]
    after = [server.measure(name) for name in names]
    assert after[0] - before[0] == usage["prompt_tokens"]
    assert after[1] - before[1] == usage["completion_tokens"]
    page = server.ask("GET", "/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    check_exposition(page)
    count = server.measure("time_to_first_token_seconds_count")
    assert count == server.measure("time_to_first_token_seconds_bucket", le="+Inf") > 0
    assert server.measure("tokens_per_second") > 0
    assert server.measure("peak_memory_bytes") > 1e7
    assert server.measure("queue_depth") == 0


def check_exposition(page: Reply) -> None:
    """Each name has its help and type once, before its values; buckets only grow."""
    typed: dict[str, str] = {}
    growing: dict[str, float] = {}
    for line in page.body.decode().splitlines():
        if line.startswith("#"):
            _, word, name, text = line.split(" ", 3)
            if word == "TYPE":
                assert name not in typed
                typed[name] = text
            continue
        title, _, value = line.rpartition(" ")
        name = title.partition("{")[0]
        base = name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")
        assert (base if typed.get(base) == "histogram" else name) in typed
        if name.endswith("_bucket"):
            assert float(value) >= growing.get(name, 0.0)
            growing[name] = float(value)
        else:
            growing.pop(f"{base}_bucket", None)
