"""A server for real clients: `make test-clients`, in an environment that has them."""

import importlib.util
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.running import ROOT, Server, running

# The environment of `make test` has no clients.
collect_ignore_glob = [] if importlib.util.find_spec("semantic_kernel") else ["test_*.py"]

# What runs phiship: nothing of it is installed beside the clients.
PYTHON = os.environ.get("PHISHIP_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
RECIPES = {"onnx": "tiny-phi3-onnx-cpu-int4", "gguf": "tiny-phi3-gguf-q4_0"}
TOKEN = "a-token-of-the-tests"


def build(kind: str, folder: Path) -> Path:
    """Build the bundled example as its users do; returns the artifact."""
    command = [
        PYTHON,
        "-m",
        "toolkit",
        "build",
        RECIPES[kind],
        "--out",
        str(folder),
        "--checkpoint",
    ]
    subprocess.run([*command, "examples/tiny-phi3"], cwd=ROOT, check=True, capture_output=True)
    return folder / RECIPES[kind]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session", params=RECIPES)
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[Server]:
    """The runner's own command, with a token."""
    command = [PYTHON, "-m", "toolkit.runner", "serve", "--port", "0", "--json", "--artifact"]
    command += [str(build(request.param, folder)), "--threads", "1"]
    with running(command, {**os.environ, "PHISHIP_TOKEN": TOKEN}) as server:
        assert "listening" in server.told, server.told
        yield server
        assert server.stop() == 0
        assert not [line for line in server.log if "File " in line]


@pytest.fixture(scope="session")
def slow_server(folder: Path) -> Iterator[Server]:
    """A server whose tokens take a while, with room for one who waits."""
    artifact = folder / RECIPES["onnx"]
    if not artifact.exists():
        build("onnx", folder)
    asked = json.dumps({"delay_s": 0.05, "options": {"queue_size": 1}})
    with running([PYTHON, "-m", "tests.serving.start", str(artifact), asked]) as server:
        yield server


@pytest.fixture
def base_url(server: Server) -> str:
    return f"{server.told['listening']}/v1"


@pytest.fixture
def model(server: Server) -> str:
    return str(server.told["model"])
