"""The source's final states on disk, so that several artifacts and runs share one forward pass."""

import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from toolkit import __version__
from toolkit import checkpoint as reading
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.quality import reference
from toolkit.quality.reference import Array
from toolkit.quality.texts import digest_ids
from toolkit.vendor import environment

MOST_FILES = 8
MOST_BYTES = 1 << 30
PART = "part-"
PART_LIFE_S = 24 * 3600


def cache_folder() -> Path:
    """Where the states are: the user's cache folder, as each system has it."""
    return environment.cache_folder().parent / "reference"


def name_states(
    checkpoint: Checkpoint, decoder: Decoder, sequences: Sequence[Sequence[int]]
) -> str:
    """Hex sha256 over all that decides the states: weights, architecture, ids, our own code."""
    code = [Path(module.__file__ or "").read_text("utf-8") for module in (reading, reference)]
    parts = [__version__, *code, checkpoint.fingerprint(), asdict(decoder), digest_ids(sequences)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load(name: str, shape: tuple[int, ...]) -> Array | None:
    """The states of that name; None when there are none, or the file is damaged."""
    path = cache_folder() / f"{name}.npz"
    try:
        with np.load(path) as content:  # a zip file: its checksum is compared
            states: Array = content["states"]
        os.utime(path)  # in use: others go first
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
    return states if states.shape == shape and states.dtype == np.float32 else None


def store(name: str, states: Array) -> bool:
    """Keep the states, whole or not at all, and drop the oldest; False when that fails."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=PART) as made:
            part = Path(made) / "states.npz"
            np.savez(part, states=states)
            part.replace(folder / f"{name}.npz")
        _drop_oldest(folder)
    except OSError:
        return False
    return True


def _drop_oldest(folder: Path) -> None:
    """Keep the newest MOST_FILES of MOST_BYTES in all; what killed runs left goes after a day."""
    newest = sorted(folder.glob("*.npz"), key=lambda path: -path.stat().st_mtime_ns)
    total_bytes = 0
    for place, path in enumerate(newest):
        total_bytes += path.stat().st_size
        if place >= MOST_FILES or (place and total_bytes > MOST_BYTES):
            path.unlink(missing_ok=True)
    for path in folder.glob(f"{PART}*"):
        if time.time() - path.stat().st_mtime > PART_LIFE_S:
            shutil.rmtree(path, ignore_errors=True)
