"""A small checkpoint with artifacts of it in every format, and readers made of its own tensors."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import write_random_checkpoint, write_safetensors
from tests.formats.writing import write_artifact
from toolkit import formats
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.decoder import Decoder
from toolkit.families import read_decoder
from toolkit.quality import comparing
from toolkit.quality.comparing import Source
from toolkit.quality.weightonly import Read
from toolkit.recipe import Recipe

FORMATS = ("onnx", "openvino", "mlx", "gguf")
QUANTIZATIONS: Mapping[str, Mapping[str, Any]] = {
    "onnx": {"precision": "int4"},
    "openvino": {"precision": "int4", "group_size": 32},
    "mlx": {"bits": 4, "group_size": 32},
    "gguf": {"precision": "q4_0"},
}
SEQUENCES = tuple(
    tuple((seed + 13 * place * place) % 1900 for place in range(24)) for seed in (7, 400)
)


def make_recipe(kind: str, **changes: Any) -> Recipe:
    """A recipe of a format with the lowest type, read as a YAML file's content is."""
    fields = {
        "format": kind,
        "name": "x",
        "model": "tiny-phi3",
        "title": "x",
        **({"provider": "cpu"} if kind == "mlx" else {}),
        "quantization": {**QUANTIZATIONS[kind], **changes},
    }
    recipe: Recipe = msgspec.convert(fields, formats.get(kind).RECIPE)
    return recipe


class Case:
    """A random checkpoint of a variant: its tensors, artifacts of it, and the source's states."""

    def __init__(self, folder: Path, variant: str = "gqa") -> None:
        self.folder = folder
        source = folder / f"source-{variant}"
        self.checkpoint = Checkpoint.open(write_random_checkpoint(source, variant))
        self.decoder = read_decoder(self.checkpoint.config)
        self.write = cache(self._write)

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The checkpoint's own tensors."""
        return {name: self.checkpoint.read(name) for name in self.decoder.shapes()}

    def source(self, sequences: Any = SEQUENCES) -> Source:
        """The checkpoint that has read sequences, past the cache of states."""
        states = comparing._run(self.checkpoint, self.decoder, sequences, Console())
        return Source(self.checkpoint, self.decoder, states)

    def _write(self, kind: str) -> Path:
        folder = self.folder / kind
        folder.mkdir()
        write_artifact(make_recipe(kind), self.checkpoint, folder)
        return folder

    def copy(self, folder: Path, changes: Mapping[str, NDArray[np.float32]]) -> Checkpoint:
        """A float32 checkpoint with some tensors replaced."""
        write_random_checkpoint(folder, "gqa")
        write_safetensors(folder / "model.safetensors", {**self.tensors(), **changes}, "f32")
        return Checkpoint.open(folder)


def reader_of(tensors: Mapping[str, NDArray[np.float32]]) -> Read:
    """Yields these tensors in their order."""
    return lambda: iter(tensors.items())


def in_order(tensors: Mapping[str, NDArray[np.float32]], key: Callable[[str], Any]) -> Read:
    """Yields these tensors sorted by `key` of their names."""
    return lambda: ((name, tensors[name]) for name in sorted(tensors, key=key))


def count_reads(read: Read, started: list[int]) -> Read:
    """The same reader; notes every start."""

    def start() -> Iterator[tuple[str, NDArray[Any]]]:
        started.append(1)
        return read()

    return start


def shape_bytes(decoder: Decoder, names: list[str]) -> int:
    """Bytes of tensors as float32."""
    return sum(4 * int(np.prod(decoder.shapes()[name])) for name in names)
