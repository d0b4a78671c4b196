"""Semantic Kernel and LangChain, as their users write them."""

import asyncio

import pytest
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI
from semantic_kernel import Kernel
from semantic_kernel.connectors.ai.open_ai import (
    OpenAIChatCompletion,
    OpenAIChatPromptExecutionSettings,
)
from semantic_kernel.contents import ChatHistory
from semantic_kernel.functions import KernelArguments

from tests.clients.conftest import TOKEN
from tests.clients.test_openai import ANSWER, QUESTION


@pytest.fixture
def chat(base_url: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=base_url, api_key=TOKEN, model=model, max_retries=0)


def test_langchain_invoke(chat: ChatOpenAI) -> None:
    answer = chat.invoke([SystemMessage("Answer the question."), HumanMessage(QUESTION)])
    assert answer.content == ANSWER
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("counts", [False, True])
def test_langchain_stream(chat: ChatOpenAI, counts: bool) -> None:
    chunks = list(chat.stream(QUESTION, stream_usage=counts))
    assert "".join(one.content for one in chunks) == ANSWER
    assert any(one.usage_metadata for one in chunks) == counts


def test_langchain_with_everything_set(base_url: str, model: str) -> None:
    chat = ChatOpenAI(
        base_url=base_url, api_key=TOKEN, model=model, temperature=0.0, max_tokens=3, seed=7,
        top_p=1.0, n=1, frequency_penalty=0.0, presence_penalty=0.0, stop=["Paris"],
    )  # fmt: skip
    assert ANSWER.startswith(chat.invoke(QUESTION).content)


def test_langchain_batch(chat: ChatOpenAI) -> None:
    assert [one.content for one in chat.batch([QUESTION] * 4)] == [ANSWER] * 4


@pytest.fixture
def service(base_url: str, model: str) -> OpenAIChatCompletion:
    client = AsyncOpenAI(base_url=base_url, api_key=TOKEN, max_retries=0)
    return OpenAIChatCompletion(ai_model_id=model, async_client=client)


@pytest.fixture
def history() -> ChatHistory:
    history = ChatHistory(system_message="Answer the question.")
    history.add_user_message(QUESTION)
    return history


@pytest.mark.parametrize("more", [{}, {"temperature": 0.0, "max_tokens": 20, "top_p": 1.0}])
def test_semantic_kernel(
    service: OpenAIChatCompletion, history: ChatHistory, more: dict[str, float]
) -> None:
    settings = OpenAIChatPromptExecutionSettings(**more)
    answer = asyncio.run(service.get_chat_message_content(history, settings))
    assert str(answer) == ANSWER
    assert answer.metadata["usage"].completion_tokens > 0


def test_semantic_kernel_stream(service: OpenAIChatCompletion, history: ChatHistory) -> None:
    async def ask() -> tuple[str, list[object]]:
        settings = OpenAIChatPromptExecutionSettings()
        texts, usages = [], []
        async for message in service.get_streaming_chat_message_content(history, settings):
            texts.append(str(message))
            usages.append(message.metadata.get("usage"))
        return "".join(texts), [one for one in usages if one]

    text, usages = asyncio.run(ask())
    assert text == ANSWER
    assert len(usages) >= 1


def test_semantic_kernel_prompt(service: OpenAIChatCompletion) -> None:
    async def ask() -> str:
        kernel = Kernel()
        kernel.add_service(service)
        arguments = KernelArguments(country="France")
        prompt = "What is the capital of {{$country}}?"
        return str(await kernel.invoke_prompt(prompt, arguments=arguments))

    assert asyncio.run(ask()) == ANSWER
