"""OpenAI's own Python client: plain, asynchronous, streaming, and what it raises."""

import asyncio
import time

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.clients.conftest import TOKEN
from tests.serving.running import Server

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def client(base_url: str) -> OpenAI:
    return OpenAI(base_url=base_url, api_key=TOKEN, max_retries=0)


def test_chat(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=MESSAGES, seed=1, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model == model
    assert answer.system_fingerprint
    assert answer._request_id.startswith("req_")


def test_stream(client: OpenAI, model: str) -> None:
    options = {"include_usage": True}
    whole = client.chat.completions.create(model=model, messages=MESSAGES)
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, stream=True, stream_options=options
    )
    *chunks, usage = list(stream)
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage == whole.usage


def test_the_clients_own_accumulation(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=MESSAGES) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.content == ANSWER
    assert final.choices[0].finish_reason == "stop"


def test_a_conversation_with_what_the_client_gave(client: OpenAI, model: str) -> None:
    """Its message is sent back as it came, nulls and all."""
    first = client.chat.completions.create(model=model, messages=MESSAGES)
    said = first.choices[0].message
    for turn in (said, said.model_dump()):
        messages = [*MESSAGES, turn, *MESSAGES]
        again = client.chat.completions.create(model=model, messages=messages)
        assert again.choices[0].message.content == ANSWER


def test_completions(client: OpenAI, model: str) -> None:
    prompt = f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n"
    whole = client.completions.create(model=model, prompt=prompt, max_tokens=20)
    assert whole.choices[0].text.strip() == ANSWER
    stream = client.completions.create(model=model, prompt=prompt, max_tokens=20, stream=True)
    assert "".join(one.choices[0].text for one in stream) == whole.choices[0].text


def test_stop_and_limit(client: OpenAI, model: str) -> None:
    stopped = client.chat.completions.create(model=model, messages=MESSAGES, stop=[" is"])
    assert stopped.choices[0].message.content == "The capital of France"
    short = client.chat.completions.create(model=model, messages=MESSAGES, max_completion_tokens=2)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2


def test_models(client: OpenAI, model: str) -> None:
    assert [one.id for one in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def test_several_at_once(base_url: str, model: str) -> None:
    async def ask(client: AsyncOpenAI, first: int) -> str:
        question = [{"role": "user", "content": f"What is {first} plus 2?"}]
        stream = await client.chat.completions.create(model=model, messages=question, stream=True)
        return "".join([one.choices[0].delta.content or "" async for one in stream])

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=base_url, api_key=TOKEN) as client:
            together = await asyncio.gather(*(ask(client, number) for number in range(1, 7)))
            in_turn = [await ask(client, number) for number in range(1, 7)]
        assert together == in_turn
        return together

    assert len(set(asyncio.run(ask_all()))) == 6


def test_errors(client: OpenAI, base_url: str, model: str) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as tools:
        function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
        tool = {"type": "function", "function": function}
        create(model=model, messages=MESSAGES, tools=[tool])
    assert (tools.value.param, tools.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.BadRequestError, match="context") as long:
        create(model=model, messages=[{"role": "user", "content": "word " * 600}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        create(model="gpt-4o", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=base_url, api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=model, input="Hello")


def test_leaving_a_stream_ends_the_answer(slow_server: Server) -> None:
    client = OpenAI(base_url=slow_server.told["listening"], api_key="any", max_retries=0)
    model = slow_server.told["model"]
    stream = client.completions.create(model=model, prompt="The", stream=True, max_tokens=400)
    for number, _ in enumerate(stream):
        if number == 3:
            break
    stream.close()
    begin_s = time.monotonic()
    client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=1)
    assert time.monotonic() - begin_s < 10  # of the 20 seconds that 400 tokens take
    assert slow_server.measure("answers_total", end="cancelled") == 1


def test_the_client_comes_back_when_the_line_was_full(slow_server: Server) -> None:
    """Retry-After is what it waits for."""

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(
            base_url=slow_server.told["listening"], api_key="any", max_retries=10
        ) as client:
            asked = [
                client.completions.create(
                    model=slow_server.told["model"], prompt="The", max_tokens=4
                )
                for _ in range(4)
            ]
            return [one.choices[0].text for one in await asyncio.gather(*asked)]

    assert len(set(asyncio.run(ask_all()))) == 1
    route = {"route": "/completions", "status": "429"}
    assert slow_server.measure("requests_total", **route) >= 1
