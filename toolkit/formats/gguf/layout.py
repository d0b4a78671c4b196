"""Where every tensor lies in model.gguf, and its name there; computed from shapes alone."""

from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import Decoder
from toolkit.formats.gguf.encoder import choose_encoder
from toolkit.formats.gguf.mix import GgmlType, choose_types
from toolkit.formats.gguf.recipe import GgufRecipe
from toolkit.stream import Constant, DataFile, Fold, Piece

DATA_FILE = "model.gguf"
ALIGN_BYTES = 32  # GGUF's default, general.alignment is not written
Sources = dict[str, tuple[str, ...]]
ROUTER_SCALE, DOWN_SCALE = 2.0**-9, 2.0


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: GGUF name, type, shape [out, in] and offset in the data."""

    name: str
    kind: GgmlType
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes without padding."""
        return prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])


def place(recipe: GgufRecipe, decoder: Decoder) -> tuple[list[Stored], int]:
    """Every tensor in the order it lies, rotary factors first; and the data's size in bytes."""
    types = choose_types(recipe.quantization, decoder)
    shapes = decoder.shapes()
    factors = (len(decoder.rope.short_factors),)
    entries: list[tuple[str, GgmlType, tuple[int, ...]]]
    entries = [(name, GgmlType.F32, factors) for name in rope_factors(decoder)]
    for name, sources in source_names(decoder).items():
        shape = shapes[sources[0]]
        stacked = (len(sources), *shape) if len(sources) > 1 else shape
        entries.append((name, types[sources[0]], stacked))
    stored: list[Stored] = []
    end = 0
    for name, kind, shape in entries:
        stored.append(Stored(name, kind, shape, end))
        end += -(-stored[-1].nbytes // ALIGN_BYTES) * ALIGN_BYTES
    return stored, end


def lay_out(recipe: GgufRecipe, decoder: Decoder) -> DataFile:
    """The data file: each tensor's rows go through the encoder of its type."""
    stored, size_bytes = place(recipe, decoder)
    sources, factors = source_names(decoder), rope_factors(decoder)
    folds = list_folds(decoder)
    pieces: list[Piece] = []
    constants: list[Constant] = []
    for tensor in stored:
        if tensor.name in factors:
            make = partial(_float32, factors[tensor.name])
            constants.append(Constant(tensor.offset, make))
            continue
        encoder, columns = choose_encoder(tensor.kind), tensor.shape[-1]
        rows = prod(tensor.shape[:-1]) // len(sources[tensor.name])
        for number, source in enumerate(sources[tensor.name]):
            first, fold = number * rows, folds.get(source)
            piece = Piece(source, 0, rows, columns, encoder, (tensor.offset,), first, fold=fold)
            pieces.append(piece)
    return DataFile(DATA_FILE, size_bytes, tuple(pieces), tuple(constants))


def source_names(decoder: Decoder) -> Sources:
    """GGUF name -> the checkpoint's tensors, several for experts (gguf-py, tensor_mapping.py)."""
    names = decoder.names
    found: Sources = {"token_embd.weight": (names.embedding,)}
    for layer in range(decoder.layers):
        block = f"blk.{layer}"
        found |= _with_bias(f"{block}.attn_norm", names.attention_norm.format(layer), decoder)
        parts = decoder.qkv(layer)
        for part, kind in zip(parts, "qkv" if len(parts) > 1 else ("qkv",), strict=True):
            found |= _with_bias(f"{block}.attn_{kind}", part.tensor, decoder)
        found |= _with_bias(f"{block}.attn_output", names.attention_out.format(layer), decoder)
        found |= _with_bias(f"{block}.ffn_norm", names.mlp_norm.format(layer), decoder)
        if decoder.experts:
            found |= _list_experts(block, decoder, layer)
        else:
            found[f"{block}.ffn_up.weight"] = (names.gate_up.format(layer),)
            found[f"{block}.ffn_down.weight"] = (names.down.format(layer),)
    found |= _with_bias("output_norm", names.final_norm, decoder)
    if not decoder.is_tied:
        found |= _with_bias("output", names.head, decoder)
    return found


def _with_bias(name: str, source: str, decoder: Decoder) -> Sources:
    found: Sources = {f"{name}.weight": (source,)}
    bias = decoder.bias_of(source)
    return found | {f"{name}.bias": (bias,)} if bias else found


def _list_experts(block: str, decoder: Decoder, layer: int) -> Sources:
    numbers = range(decoder.experts.count if decoder.experts else 0)
    gates = tuple(part.tensor for n in numbers for part in decoder.gate(layer, n))
    ups = tuple(part.tensor for n in numbers for part in decoder.up(layer, n))
    return {
        f"{block}.ffn_gate_inp.weight": (decoder.names.router.format(layer),),
        f"{block}.ffn_gate_exps.weight": gates,
        f"{block}.ffn_up_exps.weight": ups,
        f"{block}.ffn_down_exps.weight": tuple(decoder.down(layer, n) for n in numbers),
    }


def list_folds(decoder: Decoder) -> dict[str, Fold]:
    """What makes llama.cpp's phimoe nearly the source; empty for other models.

    It has RMSNorm where the source has LayerNorm, which are the same where the mean is zero: so
    everything that is added to the hidden states is given a mean of zero. And it has weights of the
    picked experts sum to 1, by a softmax, where the source's are mostly 1 and 1: a router that says
    next to nothing makes them a half each, of answers that are doubled.
    """
    folds: dict[str, Fold] = {}
    if not decoder.experts:
        return folds
    folds[decoder.names.embedding] = Fold("rows")
    for layer in range(decoder.layers):
        out = decoder.names.attention_out.format(layer)
        folds[out] = Fold("columns")
        if bias := decoder.bias_of(out):
            folds[bias] = Fold("rows")
        folds[decoder.names.router.format(layer)] = Fold(scale=ROUTER_SCALE)
        for expert in range(decoder.experts.count):
            folds[decoder.down(layer, expert)] = Fold("columns", DOWN_SCALE)
    return folds


def rope_factors(decoder: Decoder) -> dict[str, tuple[float, ...]]:
    """GGUF name -> values of the rotary factors, for long and short texts; empty without them."""
    if not decoder.rope.short_factors:
        return {}
    return {
        "rope_factors_long.weight": decoder.rope.long_factors or decoder.rope.short_factors,
        "rope_factors_short.weight": decoder.rope.short_factors,
    }


def _float32(values: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(values, np.float32)
