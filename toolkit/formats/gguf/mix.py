"""Which tensor gets which ggml type.

Follows llama-quantize (llama.cpp, src/llama-quant.cpp: llama_tensor_get_type_impl and
tensor_type_fallback) for the phi3 architecture without an importance matrix, and
convert_hf_to_gguf.py for f16 and bf16.
"""

from collections.abc import Iterator
from enum import IntEnum

from toolkit.decoder import Decoder
from toolkit.formats.gguf.recipe import GgufQuantization, Precision, TensorType
from toolkit.overrides import list_matrices, resolve


class GgmlType(IntEnum):
    """ggml_type (ggml.h), those that are written here."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    BF16 = 30

    @property
    def block_weights(self) -> int:
        """Weights a block holds; a row is a whole number of blocks."""
        return BLOCKS[self][0]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        weights, size_bytes = BLOCKS[self]
        return columns // weights * size_bytes


# (weights, bytes) of a block: ggml-common.h
BLOCKS = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.BF16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
    GgmlType.IQ4_NL: (32, 18),
    GgmlType.IQ4_XS: (256, 136),
}
BASE_TYPES: dict[Precision, GgmlType] = {
    "iq4_xs": GgmlType.IQ4_XS,
    "f16": GgmlType.F16,
    "bf16": GgmlType.BF16,
    "q4_0": GgmlType.Q4_0,
    "q4_1": GgmlType.Q4_1,
    "q8_0": GgmlType.Q8_0,
    "q4_k_m": GgmlType.Q4_K,
    "q5_k_m": GgmlType.Q5_K,
    "q6_k": GgmlType.Q6_K,
}
# llama_ftype (llama.h), as general.file_type
FILE_TYPES: dict[Precision, int] = {
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q4_k_m": 15,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq4_xs": 30,
    "bf16": 32,
}
UNQUANTIZED = (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
# Where a row is no multiple of 256
SMALL_BLOCK = {
    GgmlType.IQ4_XS: GgmlType.IQ4_NL,
    GgmlType.Q4_K: GgmlType.Q5_0,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
}

# Types that a budget chooses among, in order of size; those of 4 bits differ in speed and in what
# runs them, so the recipe's own is the only one.
MORE_BITS: tuple[TensorType, ...] = ("q5_k", "q6_k", "q8_0")
LADDERS: dict[Precision, tuple[TensorType, ...]] = {
    "iq4_xs": ("iq4_xs", *MORE_BITS),
    "q4_0": ("q4_0", *MORE_BITS),
    "q4_1": ("q4_1", *MORE_BITS),
    "q4_k_m": ("q4_k", *MORE_BITS),
    "q5_k_m": MORE_BITS,
    "q6_k": MORE_BITS[1:],
}
SMALL_LADDERS: dict[Precision, tuple[TensorType, ...]] = {
    "iq4_xs": ("iq4_nl", "q8_0"),
    "q4_0": ("q4_0", "q8_0"),
    "q4_1": ("q4_1", "q8_0"),
    "q4_k_m": ("q4_0", "q8_0"),
    "q5_k_m": ("q8_0",),
    "q6_k": ("q8_0",),
}


def choose_types(settings: GgufQuantization, decoder: Decoder) -> dict[str, GgmlType]:
    """Type of every tensor, by checkpoint name; rows must be multiples of 32 to be quantized."""
    return _wanted_types(settings, decoder) | find_fallbacks(settings, decoder)


def list_choices(settings: GgufQuantization, decoder: Decoder) -> dict[str, tuple[TensorType, ...]]:
    """What overrides can say of each matrix, smallest first; empty where 8 bits are the least."""
    ladder = LADDERS.get(settings.precision, ())
    found, shapes = dict[str, tuple[TensorType, ...]](), decoder.shapes()
    for name in list_matrices(decoder) if ladder else ():
        columns = shapes[name][-1]
        fits = [kind for kind in ladder if columns % GgmlType[kind.upper()].block_weights == 0]
        if len(fits) < len(ladder):  # rows that are no multiple of 256
            small = SMALL_LADDERS[settings.precision]
            fits = [kind for kind in small if columns % GgmlType[kind.upper()].block_weights == 0]
        found[name] = tuple(fits)
    return found


def find_fallbacks(settings: GgufQuantization, decoder: Decoder) -> dict[str, GgmlType]:
    """Tensors whose rows are no multiple of 256, and the type with smaller blocks they get.

    What the recipe names itself has no fallback.
    """
    shapes, chosen = decoder.shapes(), _chosen_types(settings, decoder)
    return {
        name: SMALL_BLOCK[kind]
        for name, kind in _wanted_types(settings, decoder).items()
        if kind in SMALL_BLOCK and shapes[name][-1] % kind.block_weights and name not in chosen
    }


def _wanted_types(settings: GgufQuantization, decoder: Decoder) -> dict[str, GgmlType]:
    base, shapes = BASE_TYPES[settings.precision], decoder.shapes()
    wanted = {name: base if len(shape) > 1 else GgmlType.F32 for name, shape in shapes.items()}
    if decoder.experts:
        routers = (decoder.names.router.format(layer) for layer in range(decoder.layers))
        wanted |= dict.fromkeys(routers, GgmlType.F32)
    else:
        wanted |= _sensitive_types(settings.precision, decoder)
    if base not in (*UNQUANTIZED, GgmlType.Q8_0):
        wanted[decoder.head_name] = GgmlType.Q6_K
    return wanted | _chosen_types(settings, decoder)


def _chosen_types(settings: GgufQuantization, decoder: Decoder) -> dict[str, GgmlType]:
    """What the recipe names itself: embedding, head, overrides."""
    chosen: dict[str, str | None]
    chosen = {decoder.names.embedding: settings.embedding, decoder.head_name: settings.head}
    chosen |= resolve(settings.overrides, decoder)
    return {name: GgmlType[kind.upper()] for name, kind in chosen.items() if kind}


def _sensitive_types(precision: Precision, decoder: Decoder) -> dict[str, GgmlType]:
    """What a mix stores in more bits than the rest."""
    names, layers = decoder.names, decoder.layers
    found: dict[str, GgmlType] = {}
    if precision in ("q4_k_m", "q5_k_m"):
        for layer in _sensitive_layers(layers):
            found[names.qkv.format(layer)] = GgmlType.Q6_K
            found[names.down.format(layer)] = GgmlType.Q6_K
    if precision == "iq4_xs":
        found = {names.down.format(layer): GgmlType.Q5_K for layer in range(layers // 8)}
        if decoder.heads // decoder.kv_heads >= 4:
            found |= {names.qkv.format(layer): GgmlType.Q5_K for layer in range(layers)}
    return found


def _sensitive_layers(layers: int) -> Iterator[int]:
    """The first and the last eighth of the layers, and every third between (use_more_bits)."""
    eighth = layers // 8
    for layer in range(layers):
        if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2:
            yield layer
