"""What the tests of downloading share: the repository's names, and how they look at a cache."""

import hashlib
from pathlib import Path

import pytest

from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.hub import resolve
from toolkit.console import Console
from toolkit.errors import CheckpointError

ID = "someone/Phi-3-random"
COMMIT = "a" * 40
OLD_COMMIT = "b" * 40
TOKEN = "hf_SECRETsecretSECRETsecret"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
CUT_BYTES = 300_000
QUIET = Console(as_json=True)


def blobs(cache: Path) -> Path:
    return cache / "models--someone--Phi-3-random" / "blobs"


def partial(cache: Path, file: Path) -> Path:
    return blobs(cache) / f"{hashlib.sha256(file.read_bytes()).hexdigest()}.incomplete"


def refusal(reference: str, cache: Path) -> str:
    """The message and the advice of the CheckpointError that `reference` leads to."""
    with pytest.raises(CheckpointError) as caught:
        resolve(reference, QUIET, cache=cache)
    return f"{caught.value} | {caught.value.advice}"


def assert_same(checkpoint: Checkpoint, source: Path) -> None:
    """Every file of the downloaded folder is the source's, byte for byte."""
    names = {path.name for path in checkpoint.folder.iterdir()}
    assert {"config.json", "generation_config.json"} < names
    for name in names:
        assert (checkpoint.folder / name).read_bytes() == (source / name).read_bytes(), name
