"""Servers of the bundled example, started when first asked for."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.serving.running import Server, serving

KINDS = ("onnx", "gguf")


class Servers(dict[str, Server]):
    """A server by the artifact's format, with default limits."""

    def __init__(self, artifacts: dict[str, Path], stack: ExitStack) -> None:
        super().__init__()
        self._artifacts, self._stack = artifacts, stack

    def __missing__(self, kind: str) -> Server:
        self[kind] = self._stack.enter_context(serving(self._artifacts[kind]))
        return self[kind]


@pytest.fixture(scope="session")
def servers(artifacts: dict[str, Path]) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(artifacts, stack)


@pytest.fixture
def server(servers: Servers) -> Iterator[Server]:
    """The server that most tests ask; it has to be well afterwards, and have had no fault."""
    one = servers["onnx"]
    yield one
    assert one.ask("GET", "/health").json == {"status": "ok"}
    assert not [line for line in one.log if "Traceback" in line or "File " in line]
