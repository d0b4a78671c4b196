"""Faults in the bytes of finished files, which no other checkpoint would give."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import require

MATRIX = "layers.0.mlp.down_proj"


@dataclass(frozen=True)
class Packed:
    """A matrix of 4-bit codes as a file has it; writing to the arrays changes the file.

    `codes` are bytes of two codes each, `scales` the bits of floats as unsigned integers, whose
    exponent's lowest bit is `lowest`.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[Any]
    lowest: int

    def flip(self, bit: int, count: int | None = None) -> None:
        """Flip a bit of the first scales, or of all."""
        self.scales.reshape(-1)[:count] ^= self.scales.dtype.type(bit)

    @property
    def sign(self) -> int:
        """The bit of the sign."""
        return 1 << 8 * self.scales.dtype.itemsize - 1


@contextmanager
def _open_onnx(folder: Path) -> Iterator[Packed]:
    graph = require("onnx").load(folder / "model.onnx", load_external_data=False).graph
    found = {}
    for one in graph.initializer:
        if MATRIX in one.name and one.external_data:
            place = {entry.key: entry.value for entry in one.external_data}
            found[one.data_type] = (int(place["offset"]), int(place["length"]))
    content = np.memmap(folder / place["location"], np.uint8, "r+")
    scales, codes = (content[start : start + size] for start, size in map(found.get, (1, 2)))
    yield Packed(codes, scales.view(np.uint32), 0x00800000)
    content.flush()


@contextmanager
def _open_openvino(folder: Path) -> Iterator[Packed]:
    content = np.memmap(folder / "openvino_model.bin", np.uint8, "r+")
    found = {}
    for layer in ElementTree.parse(folder / "openvino_model.xml").iterfind("layers/layer"):
        data = layer.find("data")
        if MATRIX in layer.get("name", "") and data is not None and data.get("offset"):
            start, size = int(data.get("offset", 0)), int(data.get("size", 0))
            found[data.get("element_type")] = content[start : start + size]
    yield Packed(found["i4"], found["f16"].view(np.uint16), 0x0400)
    content.flush()


@contextmanager
def _open_mlx(folder: Path) -> Iterator[Packed]:
    content = np.memmap(folder / "model.safetensors", np.uint8, "r+")
    length = int.from_bytes(bytes(content[:8]), "little")
    header = json.loads(bytes(content[8 : 8 + length]))
    data = content[8 + length :]
    codes, scales = (
        data[slice(*header[f"model.{MATRIX}.{part}"]["data_offsets"])]
        for part in ("weight", "scales")
    )
    yield Packed(codes, scales.view(np.uint16), 0x0080)
    content.flush()


@contextmanager
def _open_gguf(folder: Path) -> Iterator[Packed]:
    """Q4_0: blocks of a float16 and 16 bytes."""
    gguf = require("gguf")
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")), "r+")
    (tensor,) = (one for one in reader.tensors if one.name == "blk.0.ffn_down.weight")
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
    blocks = tensor.data.reshape(-1, 18)
    yield Packed(blocks[:, 2:], blocks[:, :2].view(np.uint16), 0x0400)
    reader.data.flush()


OPEN = {"onnx": _open_onnx, "openvino": _open_openvino, "mlx": _open_mlx, "gguf": _open_gguf}
Edit = Callable[[Packed], None]


def edit_file(kind: str, folder: Path, edit: Edit) -> None:
    """Change the first layer's down projection in an artifact's file."""
    with OPEN[kind](folder) as packed:
        edit(packed)


def _swap_nibbles(packed: Packed) -> None:
    packed.codes[:] = packed.codes << 4 | packed.codes >> 4


def _shift_scales(packed: Packed) -> None:
    packed.scales[:] = np.roll(packed.scales, 1)


def _shift_codes(packed: Packed) -> None:
    packed.codes[:] = np.roll(packed.codes, 1)


def _clear_scales(packed: Packed) -> None:
    packed.scales[: len(packed.scales) // 2] = 0


FILES: Mapping[str, Edit] = {
    "file: nibbles of a byte exchanged": _swap_nibbles,
    "file: scales one block off": _shift_scales,
    "file: codes one byte off": _shift_codes,
    "file: scales negated": lambda packed: packed.flip(packed.sign),
    "file: a bit of every scale flipped": lambda packed: packed.flip(packed.lowest),
    "file: a bit of the first scale flipped": lambda packed: packed.flip(packed.sign >> 1, 1),
    "file: half of the scales 0": _clear_scales,
}
