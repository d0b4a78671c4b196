"""A runtime made of a checkpoint itself, for tests of the gate's own logic.

The gate's tests against the real runtimes are in test_gate_runtimes.py.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import Checkpoint
from toolkit.families import read_decoder
from toolkit.quality import reference, tokens


class SourceSession:
    """Runs a checkpoint with the reference forward and its own tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.runtime = "reference"
        self.checkpoint = Checkpoint.open(folder)
        self.decoder = read_decoder(self.checkpoint.config)
        self.tokenizer = tokens.read_tokenizer(self.checkpoint)
        self.stop_ids = set(self.checkpoint.stop_ids)
        self.logits_calls = 0

    def encode(self, text: str) -> list[int]:
        return tokens.encode(self.tokenizer, text)

    def logits(self, ids: list[int]) -> NDArray[Any]:
        self.logits_calls += 1
        return reference.forward(self.checkpoint, self.decoder, ids)

    def generate(self, ids: list[int], max_tokens: int) -> list[int]:
        generated: list[int] = []
        while len(generated) < max_tokens and not (generated and self.stops(generated[-1])):
            logits = reference.forward(self.checkpoint, self.decoder, ids + generated)
            generated.append(int(np.argmax(logits[-1])))
        return generated

    def stops(self, token: int) -> bool:
        return token in self.stop_ids

    def close(self) -> None:
        self.checkpoint.close()


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def copy_with_scaled_tensor(source: Path, folder: Path, name: str, factor: float) -> Path:
    """Copy a checkpoint with one bf16 tensor multiplied by `factor`."""
    shutil.copytree(source, folder)
    info = Checkpoint.open(folder).tensors[name]
    with (folder / info.file).open("r+b") as stream:
        stream.seek(info.offset)
        bits = np.frombuffer(stream.read(info.nbytes), np.uint16).astype(np.uint32) << 16
        scaled = bits.view(np.float32) * np.float32(factor)
        stream.seek(info.offset)
        stream.write((scaled.view(np.uint32) >> 16).astype("<u2").tobytes())
    return folder
