"""Where every tensor lies in model.onnx.data; computed from shapes alone."""

from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import Decoder, Rope
from toolkit.formats.onnx.encoders import ITEM_BYTES, Blocks, Plain, Transposed
from toolkit.formats.onnx.recipe import OnnxRecipe
from toolkit.formats.onnx.schemes import Schemes, choose_schemes
from toolkit.stream import Constant, DataFile, Encoder, Piece

DATA_FILE = "model.onnx.data"
PAGE_BYTES = 4096  # tensors of a page and more are aligned to it, so that they can be mapped
SMALL_ALIGN_BYTES = 64
EMBEDDING = "model.embed_tokens.weight"
FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ROPE_STEP = 4096  # rows a step, to bound memory


@dataclass(frozen=True)
class Stored:
    """An initializer whose bytes lie in the data file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass
class Layout:
    """Initializers in the order they lie, and how each is filled."""

    recipe: OnnxRecipe
    decoder: Decoder
    context_length: int
    schemes: Schemes
    end: int = 0
    stored: dict[str, Stored] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    def data_file(self) -> DataFile:
        """The data file this layout describes."""
        return DataFile(DATA_FILE, self.end, tuple(self.pieces), tuple(self.constants))

    def place(self, name: str, dtype: str, shape: tuple[int, ...]) -> int:
        """Reserve aligned space for an initializer; returns its offset."""
        nbytes = prod(shape) * ITEM_BYTES[dtype]
        align = PAGE_BYTES if nbytes >= PAGE_BYTES else SMALL_ALIGN_BYTES
        offset = -(-self.end // align) * align
        self.stored[name] = Stored(name, dtype, shape, offset)
        self.end = offset + nbytes
        return offset

    def add_plain(self, name: str, source: str, dtype: str) -> None:
        """A tensor stored row by row in a float type."""
        shape = self.decoder.shapes()[source]
        offset = self.place(name, dtype, shape)
        self._fill(source, 0, prod(shape[:-1]), shape[-1], Plain(dtype), (offset,))

    def add_linear(
        self, name: str, source: str, start: int, rows: int, columns: int, bits: int
    ) -> None:
        """Rows of an [out, in] matrix: blocks for MatMulNBits, or with 0 bits transposed."""
        if bits:
            shape = (rows, columns // self.recipe.quantization.block_size, -1)
            self.add_blocks(name, source, start, shape, bits)
            return
        dtype = self.recipe.io_dtype
        offset = self.place(name, dtype, (columns, rows))
        columns_of = Transposed(dtype, rows)
        self._fill(source, start, rows, columns, columns_of, (offset,))

    def add_blocks(
        self, name: str, source: str, start: int, shape: tuple[int, ...], bits: int
    ) -> None:
        """Codes of `shape` (rows first, -1 for the rest), scales and, if any, zero points."""
        columns = self.decoder.shapes()[source][-1]
        quantization, rows = self.recipe.quantization, shape[0]
        size, scale_dtype = quantization.block_size, self.recipe.io_dtype
        blocks = columns // size
        rest = rows * columns * bits // 8 // prod(shape[:-1])
        offsets = [
            self.place(f"{name}_Q{bits}", "uint8", (*shape[:-1], rest)),
            self.place(f"{name}_scales", scale_dtype, (rows, blocks)),
        ]
        if not quantization.symmetric:
            packed = (rows, (blocks * bits + 7) // 8)
            offsets.append(self.place(f"{name}_zero_points", "uint8", packed))
        encoder = Blocks(bits, size, quantization.symmetric, scale_dtype)
        self._fill(source, start, rows, columns, encoder, tuple(offsets))

    def share_blocks(self, name: str, other: str, shape: tuple[int, ...], bits: int) -> None:
        """The bytes of `other` once more under `name`, the codes in another shape."""
        for part in (f"_Q{bits}", "_scales", "_zero_points"):
            if found := self.stored.get(other + part):
                dims = shape if part.startswith("_Q") else found.shape
                self.stored[name + part] = replace(found, name=name + part, shape=dims)

    def add_computed(self, name: str, dtype: str, shape: tuple[int, ...], make: Any) -> None:
        """A small array that `make` computes when it is written."""
        self.constants.append(Constant(self.place(name, dtype, shape), make))

    def _fill(
        self, source: str, start: int, rows: int, columns: int, encoder: Encoder,
        offsets: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.pieces.append(Piece(source, start, rows, columns, encoder, offsets))


def lay_out(recipe: OnnxRecipe, decoder: Decoder, context_length: int) -> Layout:
    """Place every tensor of the decoder, in order of use."""
    layout = Layout(recipe, decoder, context_length, choose_schemes(recipe, decoder))
    names = decoder.names
    _add_embedding(layout)
    _add_rope(layout)
    for layer in range(decoder.layers):
        _add_layer(layout, layer)
    layout.add_plain("model.norm.weight", names.final_norm, recipe.io_dtype)
    _add_head(layout)
    return layout


def _add_embedding(layout: Layout) -> None:
    recipe, decoder = layout.recipe, layout.decoder
    source, bits = decoder.names.embedding, layout.schemes.embedding
    if bits:
        layout.add_blocks(EMBEDDING, source, 0, (decoder.vocab, -1), bits)
    else:
        layout.add_plain(EMBEDDING, source, FLOATS[recipe.quantization.embedding])


def _add_head(layout: Layout) -> None:
    """The head's blocks; those of a tied embedding of the same bits are not stored twice."""
    recipe, decoder = layout.recipe, layout.decoder
    bits, size = layout.schemes.head, recipe.quantization.block_size
    if bits and decoder.is_tied and bits == layout.schemes.embedding:
        shape = (decoder.vocab, decoder.hidden // size, size * bits // 8)
        layout.share_blocks("lm_head.weight", EMBEDDING, shape, bits)
        return
    layout.add_linear("lm_head.weight", decoder.head_name, 0, decoder.vocab, decoder.hidden, bits)


def _add_layer(layout: Layout, layer: int) -> None:
    decoder, names, io_dtype = layout.decoder, layout.decoder.names, layout.recipe.io_dtype
    hidden, inner = decoder.hidden, decoder.intermediate
    queries = decoder.heads * decoder.head_dim
    prefix = f"model.layers.{layer}"
    gate_up = names.gate_up.format(layer)
    layout.add_plain(
        f"{prefix}.input_layernorm.weight", names.attention_norm.format(layer), io_dtype
    )
    for name, source, start, rows, columns in (
        ("attn.qkv_proj", names.qkv.format(layer), 0, decoder.qkv_rows, hidden),
        ("attn.o_proj", names.attention_out.format(layer), 0, hidden, queries),
        ("mlp.gate_proj", gate_up, 0, inner, hidden),
        ("mlp.up_proj", gate_up, inner, inner, hidden),
        ("mlp.down_proj", names.down.format(layer), 0, hidden, inner),
    ):
        bits = layout.schemes.layers[source]
        layout.add_linear(f"{prefix}.{name}.weight", source, start, rows, columns, bits)
    layout.add_plain(
        f"{prefix}.post_attention_layernorm.weight", names.mlp_norm.format(layer), io_dtype
    )


def _add_rope(layout: Layout) -> None:
    """Tables of cos and sin: one row a position; with LongRoPE the long rows follow the short."""
    rope, io_dtype, total = layout.decoder.rope, layout.recipe.io_dtype, layout.context_length
    rows = rope_rows(rope, total)
    for name, function in (("cos_table", np.cos), ("sin_table", np.sin)):
        make = partial(_rope_table, rope, rows, function, io_dtype)
        layout.add_computed(name, io_dtype, (sum(rows), rope.rotary_dim // 2), make)


def rope_rows(rope: Rope, context_length: int) -> tuple[int, int]:
    """Rows of short and of long factors that a context needs."""
    if not rope.is_long or context_length <= rope.original_context:
        return context_length, 0
    return rope.original_context, context_length


def _rope_table(rope: Rope, rows: tuple[int, int], function: Any, dtype: str) -> NDArray[Any]:
    """Rows for short then long factors; angles in float32 as transformers, functions exact."""
    half = rope.rotary_dim // 2
    exponents = np.arange(0, rope.rotary_dim, 2, dtype=np.float32) / np.float32(rope.rotary_dim)
    table = np.empty((sum(rows), half), dtype)
    for first, count, factors, scale in (
        (0, rows[0], rope.short_factors, rope.short_scale),
        (rows[0], rows[1], rope.long_factors, rope.long_scale),
    ):
        wide = np.array(factors or (1.0,) * half, np.float32)
        frequencies = (1 / (wide * np.float32(rope.theta) ** exponents)).astype(np.float32)
        for start in range(0, count, ROPE_STEP):
            positions = np.arange(start, min(start + ROPE_STEP, count), dtype=np.float32)
            angles = (positions[:, None] * frequencies).astype(np.float64)
            part = function(angles).astype(np.float32) * np.float32(scale)
            table[first + start : first + start + len(part)] = part
    return table
