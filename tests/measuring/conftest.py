"""Copies of artifacts, which may get settings of their own, and an embedded device with one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.commands import run


@pytest.fixture
def copy(artifacts: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of the artifact of a format."""

    def make(kind: str) -> Path:
        folder = tmp_path / "copies" / artifacts[kind].name
        shutil.copytree(artifacts[kind], folder)
        return folder

    return make


@pytest.fixture(scope="session")
def board(artifacts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the device `embedded` has a GGUF release in use."""
    folder = tmp_path_factory.mktemp("board")
    place = {"PHISHIP_EMBEDDED_ROOT": str(folder / "device"), "HOME": str(folder)}
    done = run("deploy", str(artifacts["gguf"]), "embedded", **place)
    assert done.returncode == 0, done.stderr + done.stdout
    return place
