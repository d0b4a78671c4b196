"""The runtimes that the runner can load an artifact in, and how a test asks them."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from toolkit.runner.answer import Answer, Question, encode_chat, stream_answer
from toolkit.runner.engines._llama_server import VARIABLE
from toolkit.runner.loading import Loaded, loading
from toolkit.runner.settings import GREEDY, Sampling, Settings

# llama.cpp twice: the wheel, and the program as a child process.
SERVER = "llama-server"
RUNTIMES = ("onnx", "openvino", "mlx", "gguf", SERVER)
CONTEXT_TOKENS = 512
QUESTION = "What is the capital of France?"
# A build at hand, for the tests alone; the program in PATH otherwise.
TEST_VARIABLE = "PHISHIP_TEST_LLAMA_SERVER"


def find_llama_server() -> str | None:
    """Return the llama-server that tests may use."""
    return shutil.which(os.environ.get(TEST_VARIABLE) or SERVER)


def pass_over_missing(runtime: str) -> None:
    """Skip the test when it needs a llama-server and none is there."""
    if runtime == SERVER and find_llama_server() is None:
        pytest.skip(f"no {SERVER} in PATH, and {TEST_VARIABLE} names none")


@contextmanager
def chosen(runtime: str) -> Iterator[None]:
    """Let the runner take the program for the length of the block, if it is what is asked for."""
    before = os.environ.pop(VARIABLE, None)
    if runtime == SERVER:
        os.environ[VARIABLE] = str(find_llama_server())
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)
        if before is not None:
            os.environ[VARIABLE] = before


@contextmanager
def open_model(
    runtime: str,
    artifacts: Mapping[str, Path],
    context_tokens: int = CONTEXT_TOKENS,
    **settings: int | None,
) -> Iterator[Loaded]:
    """Load an artifact of the bundled example as the runner does."""
    pass_over_missing(runtime)
    artifact = artifacts["gguf" if runtime == SERVER else runtime]
    if runtime == SERVER:  # several threads wait for each other by spinning; our cores are shared
        settings = {"threads": 1, **settings}
    with chosen(runtime), loading(artifact, Settings(context_tokens, **settings)) as loaded:
        yield loaded


def ask_ids(loaded: Loaded, question: str = QUESTION) -> list[int]:
    """Return the prompt's token ids of one question."""
    return encode_chat(loaded, [("user", question)])


def generate_ids(
    loaded: Loaded, prompt_ids: list[int], count: int = 24, sampling: Sampling = GREEDY
) -> list[int]:
    """Return what the engine generates, its stop token included where it gives one."""
    return [token for token, _ in loaded.model.generate(prompt_ids, count, sampling)]


def answer(
    loaded: Loaded, prompt_ids: list[int], count: int = 24, sampling: Sampling = GREEDY
) -> Answer:
    """Return an answer as the runner gives it."""
    filled = Answer()
    pieces = list(stream_answer(loaded, Question(prompt_ids, count, sampling), filled))
    assert "".join(pieces) == filled.text
    return filled
