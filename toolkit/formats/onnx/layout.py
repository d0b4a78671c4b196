"""Where every tensor lies in model.onnx.data; computed from shapes alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import MASKED_LOGIT, Decoder, Experts, Parts, Rope, Rows, name_bias
from toolkit.formats.onnx.encoders import ITEM_BYTES, Blocks, Picked, Plain, Transposed
from toolkit.formats.onnx.recipe import OnnxRecipe
from toolkit.formats.onnx.schemes import Schemes, choose_schemes
from toolkit.formats.onnx.sparse import COLUMNS, ROWS, make_tables
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
    """Initializers in the order they lie, and how each is filled; `linears` are for products."""

    recipe: OnnxRecipe
    decoder: Decoder
    context_length: int
    schemes: Schemes
    end: int = 0
    stored: dict[str, Stored] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    linears: dict[str, Parts] = field(default_factory=dict)

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

    def add_plain(self, name: str, source: str, dtype: str, factor: float = 1.0) -> None:
        """A tensor, times a factor, stored row by row in a float type."""
        shape = self.decoder.shapes()[source]
        offset = self.place(name, dtype, shape)
        whole = Rows(source, 0, prod(shape[:-1]))
        self._fill((whole,), shape[-1], Plain(dtype, factor), (offset,))

    def add_norm(self, name: str, source: str) -> None:
        """A norm's weight and, if any, bias; the last one's times the logits' scale."""
        is_last = source == self.decoder.names.final_norm
        factor = self.decoder.logit_scale if is_last else 1.0
        self.add_plain(f"{name}.weight", source, self.recipe.io_dtype, factor)
        if bias := self.decoder.bias_of(source):
            self.add_plain(f"{name}.bias", bias, self.recipe.io_dtype, factor)

    def add_linear(self, name: str, parts: Parts) -> None:
        """An [out, in] matrix put together of rows, and its bias, if any.

        Blocks for MatMulNBits, or transposed where the schemes leave a float type.
        """
        self.linears[name] = parts
        rows = sum(part.count for part in parts)
        columns = self.decoder.shapes()[parts[0].tensor][-1]
        if bits := self.schemes.bits_of(parts[0].tensor):
            shape = (rows, columns // self.recipe.quantization.block_size, -1)
            self.add_blocks(f"{name}.weight", parts, shape, bits)
        else:
            self.add_transposed(f"{name}.weight", parts, self.recipe.io_dtype)
        if self.decoder.bias_of(parts[0].tensor):
            self._add_bias(f"{name}.bias", parts, rows)

    def add_transposed(self, name: str, parts: Parts, dtype: str) -> None:
        """An [in, out] matrix of floats for MatMul."""
        rows = sum(part.count for part in parts)
        columns = self.decoder.shapes()[parts[0].tensor][-1]
        offset = self.place(name, dtype, (columns, rows))
        self._fill(parts, columns, Transposed(dtype, rows), (offset,))

    def add_experts(self, name: str, experts: Experts, layer: int) -> None:
        """All experts' matrices one after the other: QMoE's fc1, rows of gate and up in turn, fc2.

        Codes [experts, rows, bytes] and scales [experts, rows, blocks], as MatMulNBits' own.
        """
        decoder, gated, downs = self.decoder, [], []
        for expert in range(experts.count):
            (gate,), (up,) = decoder.gate(layer, expert), decoder.up(layer, expert)
            gated.append((gate.tensor, up.tensor))
            downs.append((decoder.down(layer, expert), ""))
        self._add_stack(f"{name}.fc1.weight", gated)
        self._add_stack(f"{name}.fc2.weight", downs)

    def _add_stack(self, name: str, sources: Sequence[tuple[str, str]]) -> None:
        """Matrices of one shape as one tensor; of a pair the rows in turn."""
        size, dtype = self.recipe.quantization.block_size, self.recipe.io_dtype
        bits = self.schemes.bits_of(sources[0][0])
        rows, columns = self.decoder.shapes()[sources[0][0]]
        shape = (len(sources), 2 * rows if sources[0][1] else rows)
        offsets = (
            self.place(f"{name}_Q{bits}", "uint8", (*shape, columns * bits // 8)),
            self.place(f"{name}_scales", dtype, (*shape, columns // size)),
        )
        encoder = Blocks(bits, size, True, dtype)
        for number, (source, woven) in enumerate(sources):
            first = number * rows
            piece = Piece(source, 0, rows, columns, encoder, offsets, first, woven=woven)
            self.pieces.append(piece)

    def _add_bias(self, name: str, parts: Parts, rows: int) -> None:
        dtype = self.recipe.io_dtype
        offset, item_bytes = self.place(name, dtype, (rows,)), ITEM_BYTES[dtype]
        for part in parts:
            bias = name_bias(part.tensor)
            columns = self.decoder.shapes()[bias][0]
            encoder = Picked(dtype, part.span)
            self.pieces.append(Piece(bias, 0, 1, columns, encoder, (offset,)))
            offset += part.count * item_bytes

    def add_blocks(self, name: str, parts: Parts, shape: tuple[int, ...], bits: int) -> None:
        """Codes of `shape` (rows first, -1 for the rest), scales and, if any, zero points."""
        columns = self.decoder.shapes()[parts[0].tensor][-1]
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
        self._fill(parts, columns, encoder, tuple(offsets))

    def share_blocks(self, name: str, other: str, shape: tuple[int, ...], bits: int) -> None:
        """The bytes of `other` once more under `name`, the codes in another shape."""
        for part in (f"_Q{bits}", "_scales", "_zero_points"):
            if found := self.stored.get(other + part):
                dims = shape if part.startswith("_Q") else found.shape
                self.stored[name + part] = replace(found, name=name + part, shape=dims)

    def add_computed(self, name: str, dtype: str, shape: tuple[int, ...], make: Any) -> None:
        """A small array that `make` computes when it is written."""
        self.constants.append(Constant(self.place(name, dtype, shape), make))

    def _fill(self, parts: Parts, columns: int, encoder: Encoder, offsets: tuple[int, ...]) -> None:
        first = 0
        for tensor, start, rows, step in ((p.tensor, p.start, p.count, p.step) for p in parts):
            self.pieces.append(Piece(tensor, start, rows, columns, encoder, offsets, first, step))
            first += rows


def lay_out(recipe: OnnxRecipe, decoder: Decoder, context_length: int) -> Layout:
    """Place every tensor of the decoder, in order of use."""
    layout = Layout(recipe, decoder, context_length, choose_schemes(recipe, decoder))
    names = decoder.names
    _add_embedding(layout)
    _add_rope(layout)
    for layer in range(decoder.layers):
        _add_layer(layout, layer)
    layout.add_norm("model.norm", names.final_norm)
    _add_head(layout)
    if decoder.masked_tokens:
        make = partial(_mask_tokens, decoder, recipe.io_dtype)
        layout.add_computed("lm_head.bias", recipe.io_dtype, (decoder.vocab,), make)
    if decoder.sparse:
        tables = make_tables(decoder.sparse, context_length)
        for name, table in ((ROWS, tables.rows), (COLUMNS, tables.columns)):
            layout.add_computed(name, "int32", table.shape, partial(np.copy, table))
    return layout


def _mask_tokens(decoder: Decoder, dtype: str) -> NDArray[Any]:
    """What is added to the logits: nothing, but for tokens that are never said."""
    bias = np.zeros(decoder.vocab, dtype)
    bias[list(decoder.masked_tokens)] = MASKED_LOGIT
    return bias


def _add_embedding(layout: Layout) -> None:
    recipe, decoder = layout.recipe, layout.decoder
    source, bits = decoder.names.embedding, layout.schemes.embedding
    if bits:
        layout.add_blocks(EMBEDDING, (Rows(source, 0, decoder.vocab),), (decoder.vocab, -1), bits)
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
    layout.add_linear("lm_head", (Rows(decoder.head_name, 0, decoder.vocab),))


def _add_layer(layout: Layout, layer: int) -> None:
    decoder, names = layout.decoder, layout.decoder.names
    prefix = f"model.layers.{layer}"
    out = Rows(names.attention_out.format(layer), 0, decoder.hidden)
    layout.add_norm(f"{prefix}.input_layernorm", names.attention_norm.format(layer))
    layout.add_linear(f"{prefix}.attn.qkv_proj", decoder.qkv(layer))
    layout.add_linear(f"{prefix}.attn.o_proj", (out,))
    if decoder.experts:
        router = Rows(names.router.format(layer), 0, decoder.experts.count)
        layout.add_transposed(f"{prefix}.moe.router.weight", (router,), "float32")
        layout.add_experts(f"{prefix}.moe", decoder.experts, layer)
    else:
        layout.add_linear(f"{prefix}.mlp.gate_proj", decoder.gate(layer))
        layout.add_linear(f"{prefix}.mlp.up_proj", decoder.up(layer))
        down = Rows(decoder.down(layer), 0, decoder.hidden)
        layout.add_linear(f"{prefix}.mlp.down_proj", (down,))
    layout.add_norm(f"{prefix}.post_attention_layernorm", names.mlp_norm.format(layer))


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
