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
from toolkit.stream import Constant, DataFile, Piece

DATA_FILE = "model.gguf"
ALIGN_BYTES = 32  # GGUF's default, general.alignment is not written


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
    """Every tensor in the order it lies, LongRoPE's factors first; and the data's size in bytes."""
    types = choose_types(recipe.quantization, decoder)
    shapes = decoder.shapes()
    factors = (len(decoder.rope.long_factors),)
    entries: list[tuple[str, GgmlType, tuple[int, ...]]]
    entries = [(name, GgmlType.F32, factors) for name in rope_factors(decoder)]
    entries += [(n, types[source], shapes[source]) for n, source in source_names(decoder).items()]
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
    pieces: list[Piece] = []
    constants: list[Constant] = []
    for tensor in stored:
        if tensor.name in factors:
            make = partial(_float32, factors[tensor.name])
            constants.append(Constant(tensor.offset, make))
            continue
        rows, columns = prod(tensor.shape[:-1]), tensor.shape[-1]
        encoder = choose_encoder(tensor.kind)
        source = sources[tensor.name]
        pieces.append(Piece(source, 0, rows, columns, encoder, (tensor.offset,)))
    return DataFile(DATA_FILE, size_bytes, tuple(pieces), tuple(constants))


def source_names(decoder: Decoder) -> dict[str, str]:
    """GGUF name -> checkpoint name of every tensor (gguf-py, tensor_mapping.py: PHI3)."""
    names = decoder.names
    found = {"token_embd.weight": names.embedding}
    for layer in range(decoder.layers):
        found |= {
            f"blk.{layer}.attn_norm.weight": names.attention_norm.format(layer),
            f"blk.{layer}.attn_qkv.weight": names.qkv.format(layer),
            f"blk.{layer}.attn_output.weight": names.attention_out.format(layer),
            f"blk.{layer}.ffn_norm.weight": names.mlp_norm.format(layer),
            f"blk.{layer}.ffn_up.weight": names.gate_up.format(layer),
            f"blk.{layer}.ffn_down.weight": names.down.format(layer),
        }
    found["output_norm.weight"] = names.final_norm
    if not decoder.is_tied:
        found["output.weight"] = names.head
    return found


def rope_factors(decoder: Decoder) -> dict[str, tuple[float, ...]]:
    """GGUF name -> values of LongRoPE's factors; empty without it."""
    if not decoder.rope.is_long:
        return {}
    return {
        "rope_factors_long.weight": decoder.rope.long_factors,
        "rope_factors_short.weight": decoder.rope.short_factors,
    }


def _float32(values: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(values, np.float32)
