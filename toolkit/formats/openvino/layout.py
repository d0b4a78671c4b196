"""Where every tensor lies in openvino_model.bin; computed from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Literal

import numpy as np

from toolkit.decoder import Decoder
from toolkit.formats.openvino.encoders import DTYPES, Asymmetric, Plain, Symmetric
from toolkit.formats.openvino.recipe import Kind, OpenvinoQuantization, OpenvinoRecipe
from toolkit.overrides import resolve
from toolkit.stream import Constant, DataFile, Encoder, Piece

MAIN_FILE = "openvino_model.xml"
DATA_FILE = "openvino_model.bin"
ALIGN_BYTES = 64
BITS = {"f32": 32, "f16": 16, "i64": 64, "i32": 32, "u8": 8, "i4": 4, "u4": 4, "boolean": 8}


@dataclass(frozen=True)
class Stored:
    """A constant whose bytes lie in the data file; `dtype` is OpenVINO's name of the type."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return (prod(self.shape) * BITS[self.dtype] + 7) // 8


@dataclass
class Layout:
    """Constants in the order they lie, and how each is filled.

    Offsets count from `start`, which is where the file begins in all that is streamed.
    """

    quantization: OpenvinoQuantization
    shapes: dict[str, tuple[int, ...]]
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    start: int = 0
    end: int = 0
    stored: dict[str, Stored] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    def data_file(self) -> DataFile:
        """The data file this layout describes."""
        return DataFile(DATA_FILE, self.end, tuple(self.pieces), tuple(self.constants))

    def add_plain(self, name: str, dtype: Literal["f16", "f32"], factor: float = 1.0) -> None:
        """A tensor of the checkpoint, times a factor, in a float type."""
        offset = self._place(name, dtype, self.shapes[name])
        self._fill(name, Plain(dtype, factor), offset)

    def add_stack(self, name: str, sources: Sequence[str], kind: Kind) -> None:
        """Matrices of one shape as one constant [sources, out, in]."""
        self.shapes[name] = (len(sources), *self.shapes[sources[0]])
        self.sources[name] = tuple(sources)
        self.add_matrix(name, kind)

    def add_matrix(self, name: str, kind: Kind) -> None:
        """An [..., out, in] matrix: float16, or codes with scales and, if any, zero points."""
        if kind == "f16":
            self.add_plain(name, "f16")
        elif kind == "int4" and self.quantization.symmetric:
            size, codes, groups = self._group(name, self.quantization.group_size)
            offsets = [self._place(name, "i4", codes), self._place_scales(name, groups)]
            self._fill(name, Symmetric(size), *offsets)
        else:
            self._add_asymmetric(name, 4 if kind == "int4" else 8)

    def add_values(
        self, name: str, dtype: str, shape: tuple[int, ...], values: tuple[float, ...]
    ) -> None:
        """A small array that is known without the checkpoint."""
        offset = self._place(name, dtype, shape)
        make = partial(np.array, values, DTYPES[dtype])
        self.constants.append(Constant(self.start + offset, make))

    def _add_asymmetric(self, name: str, bits: Literal[4, 8]) -> None:
        whole = bits == 8 or self.quantization.group_size == -1
        size, codes, groups = self._group(name, -1 if whole else self.quantization.group_size)
        # Packed zero points of a row must fill whole bytes, for rows are written in any order.
        point_bits: Literal[4, 8] = 8 if bits == 8 or self.shapes[name][-1] // size % 2 else 4
        offsets = [
            self._place(name, f"u{bits}", codes),
            self._place_scales(name, groups),
            self._place(f"{name}/zero_point", f"u{point_bits}", groups),
        ]
        self._fill(name, Asymmetric(bits, size, point_bits), *offsets)

    def _group(self, name: str, size: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Weights a group, shape of codes, shape of scales; -1 is one group a row."""
        *rows, columns = self.shapes[name]
        if size == -1:
            return columns, (*rows, columns), (*rows, 1)
        return size, (*rows, columns // size, size), (*rows, columns // size, 1)

    def _place_scales(self, name: str, shape: tuple[int, ...]) -> int:
        return self._place(f"{name}/scale", "f16", shape)

    def _place(self, name: str, dtype: str, shape: tuple[int, ...]) -> int:
        """Reserve aligned space; returns its offset."""
        offset = -(-self.end // ALIGN_BYTES) * ALIGN_BYTES
        self.stored[name] = Stored(name, dtype, shape, offset)
        self.end = offset + self.stored[name].nbytes
        return offset

    def _fill(self, name: str, encoder: Encoder, *offsets: int) -> None:
        first = 0
        for source in self.sources.get(name, (name,)):
            shape = self.shapes[source]
            rows = prod(shape[:-1])
            places = tuple(self.start + offset for offset in offsets)
            self.pieces.append(Piece(source, 0, rows, shape[-1], encoder, places, first))
            first += rows


def lay_out(recipe: OpenvinoRecipe, decoder: Decoder) -> Layout:
    """Place every tensor of the decoder, in order of use; what else a network needs comes after."""
    quantization, names = recipe.quantization, decoder.names
    layout = Layout(quantization, dict(decoder.shapes()))
    sources = list_stacks(decoder)
    stacks = {name: stack for stack, some in sources.items() for name in some}
    kinds = {names.embedding: quantization.embedding, names.head: quantization.head}
    kinds |= resolve(quantization.overrides, decoder)
    for name, shape in decoder.shapes().items():
        kind = kinds.get(name) or quantization.precision
        if name == names.embedding and decoder.vision and not decoder.is_tied:
            continue  # a network of its own has it
        if len(shape) == 1 or decoder.kind_of(name) == "router":
            layout.add_plain(name, "f32", factor_of(decoder, name))
        elif name not in stacks:
            layout.add_matrix(name, kind)
        elif stacks[name] not in layout.stored:
            layout.add_stack(stacks[name], sources[stacks[name]], kind)
    return layout


def factor_of(decoder: Decoder, name: str) -> float:
    """What a tensor is multiplied with: the last norm by the logits' scale."""
    last = decoder.names.final_norm
    return decoder.logit_scale if name in (last, decoder.bias_of(last)) else 1.0


def list_stacks(decoder: Decoder) -> dict[str, tuple[str, ...]]:
    """The constants that hold all experts of a layer, and the tensors that they are made of."""
    found: dict[str, tuple[str, ...]] = {}
    for layer in range(decoder.layers if decoder.experts else 0):
        for pattern in stack_names(decoder):
            numbers = range(decoder.experts.count if decoder.experts else 0)
            names = (pattern.format(layer, expert) for expert in numbers)
            found[pattern.format(layer, "*")] = tuple(names)
    return found


def stack_names(decoder: Decoder) -> tuple[str, str, str]:
    """Patterns of gate, up and down; with `*` for the expert they name a stack."""
    (gate,), (up,) = decoder.gate_parts, decoder.up_parts
    return gate.tensor, up.tensor, decoder.names.down
