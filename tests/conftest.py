"""Fixtures for all tests: the bundled example and the artifacts made of it."""

import os

# Before NumPy is loaded, and for the programs under test: workers side by side that each wake a
# thread for every core wait for each other, minutes in all.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hashlib
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.cache import keep
from toolkit import catalog
from toolkit.build import build
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.device import Device
from toolkit.job import Options
from toolkit.report import Report
from toolkit.ssh.embedded import EmbeddedDevice

# Whoever runs the tests in the background has interrupts ignored, and the processes under test
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-phi3"
RECIPES = {
    "onnx": "tiny-phi3-onnx-cpu-int4",
    "gguf": "tiny-phi3-gguf-q4_0",
    "openvino": "tiny-phi3-openvino-int4",
    "mlx": "tiny-phi3-mlx-4bit",
}


def load_module(name: str, path: Path) -> ModuleType:
    """Import a program of examples/, whose folders are no packages."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def example() -> Path:
    """The folder of the bundled trained checkpoint."""
    return EXAMPLE


class Artifacts(dict[str, Path]):
    """Artifacts of the bundled example by format, built by `build` when first asked for."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self._out = out

    def __missing__(self, kind: str) -> Path:
        recipe, checkpoint = catalog.load_recipe(RECIPES[kind]), Checkpoint.open(EXAMPLE)
        self[kind] = build(recipe, checkpoint, self._out, Options(), Console(), Report(recipe.name))
        return self[kind]


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Artifacts of the bundled example by format."""
    return Artifacts(tmp_path_factory.mktemp("artifacts"))


@pytest.fixture(scope="session")
def real_tokenizer() -> Path:
    """Phi-3's real tokenizer files: the folder that PHISHIP_TEST_DATA names."""
    folder = os.environ.get("PHISHIP_TEST_DATA")
    if not folder:
        pytest.skip("PHISHIP_TEST_DATA names no folder with Phi-3's tokenizer files")
    return Path(folder)


@pytest.fixture(scope="session")
def real_lm() -> Path:
    """A real language model in Phi-3's architecture (examples/real-lm), made once a machine."""
    program = ROOT / "examples" / "real-lm" / "make.py"
    maker = load_module("real_lm_make", program)
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    try:
        return keep("real-lm", digest, maker.make)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def start_embedded(tmp_path: Path) -> Iterator[Callable[..., EmbeddedDevice]]:
    """Make embedded devices that are stopped at the end of the test."""
    made: list[EmbeddedDevice] = []

    def make(**options: object) -> EmbeddedDevice:
        made.append(EmbeddedDevice(tmp_path / "embedded", **options))
        return made[-1]

    yield make
    for device in made:
        device.stop()


@pytest.fixture
def board(start_embedded: Callable[..., EmbeddedDevice]) -> Device:
    """An embedded device, for what does not depend on the SSH server."""
    return start_embedded().start()
