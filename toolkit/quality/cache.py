"""The source's final states on disk, so that several artifacts and runs share one forward pass."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from toolkit import __version__
from toolkit import checkpoint as reading
from toolkit.checkpoint import Checkpoint, fp8, lora, merged, safetensors, split
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
    """Hex sha256 over all that decides the states: weights, architecture, ids, our own code.

    The fingerprint looks at the ends of tensors only; the files' times tell of an edit in between.
    """
    modules = (reading, fp8, lora, merged, safetensors, split, reference)
    code = [Path(module.__file__ or "").read_text("utf-8") for module in modules]
    names = checkpoint.files
    stats = [(checkpoint.folder / name).stat() for name in names]
    files = [(name, s.st_size, s.st_mtime_ns) for name, s in zip(names, stats, strict=True)]
    weights = [checkpoint.fingerprint(), *files]
    parts = [__version__, *code, *weights, asdict(decoder), digest_ids(sequences)]
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
    """Keep the states, whole or not at all, and drop the oldest; False when that fails.

    States above MOST_BYTES are not kept, which is no failure.
    """
    if states.nbytes > MOST_BYTES:
        return True
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
    """Keep the newest MOST_FILES of MOST_BYTES in all; what killed runs left goes after a day.

    Other processes do the same: a file that is gone meanwhile is no failure.
    """
    found = _read_stats(folder.glob("*.npz"))
    total_bytes = 0
    for place, (path, stat) in enumerate(sorted(found, key=lambda one: -one[1].st_mtime_ns)):
        total_bytes += stat.st_size
        if place >= MOST_FILES or total_bytes > MOST_BYTES:
            path.unlink(missing_ok=True)
    for path, stat in _read_stats(folder.glob(f"{PART}*")):
        if time.time() - stat.st_mtime > PART_LIFE_S:
            shutil.rmtree(path, ignore_errors=True)


def _read_stats(paths: Iterable[Path]) -> list[tuple[Path, os.stat_result]]:
    """Each path that is still there, with its size and time."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found.append((path, path.stat()))
    return found
