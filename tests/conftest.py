"""Fixtures for all tests: the bundled example and the artifacts made of it."""

import os
from pathlib import Path

import pytest

from toolkit import catalog
from toolkit.build import Options, build
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.report import Report

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-phi3"
RECIPES = {"onnx": "tiny-phi3-onnx-cpu-int4", "gguf": "tiny-phi3-gguf-q4_0"}


@pytest.fixture(scope="session")
def example() -> Path:
    """The folder of the bundled trained checkpoint."""
    return EXAMPLE


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of the bundled example by format, built as `phiship build` builds them."""
    out = tmp_path_factory.mktemp("artifacts")
    checkpoint = Checkpoint.open(EXAMPLE)
    return {
        name: build(
            catalog.load_recipe(recipe), checkpoint, out, Options(), Console(), Report(recipe)
        )
        for name, recipe in RECIPES.items()
    }


@pytest.fixture(scope="session")
def real_tokenizer() -> Path:
    """Phi-3's real tokenizer files: the folder that PHISHIP_TEST_DATA names."""
    folder = os.environ.get("PHISHIP_TEST_DATA")
    if not folder:
        pytest.skip("PHISHIP_TEST_DATA names no folder with Phi-3's tokenizer files")
    return Path(folder)
