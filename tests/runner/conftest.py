"""Fixtures: artifacts of the bundled example, loaded in each engine."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.runner.models import RUNTIMES, open_model, pass_over_missing
from toolkit.runner.loading import Loaded


class Models:
    """Loaded artifacts by runtime, each loaded when first asked for."""

    def __init__(self, artifacts: dict[str, Path], stack: ExitStack) -> None:
        self._artifacts = artifacts
        self._stack = stack
        self._loaded: dict[str, Loaded] = {}

    def __getitem__(self, runtime: str) -> Loaded:
        pass_over_missing(runtime)
        if runtime not in self._loaded:
            opened = open_model(runtime, self._artifacts)
            self._loaded[runtime] = self._stack.enter_context(opened)
        return self._loaded[runtime]


@pytest.fixture(scope="session")
def models(artifacts: dict[str, Path]) -> Iterator[Models]:
    """Loaded artifacts by runtime."""
    with ExitStack() as stack:
        yield Models(artifacts, stack)


@pytest.fixture(params=RUNTIMES)
def loaded(request: pytest.FixtureRequest, models: Models) -> Loaded:
    """The bundled example in one runtime after the other."""
    return models[str(request.param)]
