"""Seeded faults: what a converter, a file or a runtime may get wrong, made on purpose."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tests.quality.seeding import Changes, configure
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.families import read_decoder
from toolkit.quality.reference import Array

BLOCK = 32
FORMATS = ("onnx", "openvino", "mlx", "gguf")
EXACT = ("onnx", "openvino")  # those whose graphs hold multipliers and windows


class Model:
    """The tensors of one layer of a checkpoint, by their kind."""

    def __init__(self, checkpoint: Checkpoint, decoder: Decoder, layer: int = 0) -> None:
        self.checkpoint, self.decoder = checkpoint, decoder
        names = decoder.names
        self.qkv, self.out, self.gate_up, self.down = (
            name.format(layer, 0)
            for name in (names.qkv, names.attention_out, names.gate_up, names.down)
        )
        self.norm, self.mlp_norm = (
            name.format(layer) for name in (names.attention_norm, names.mlp_norm)
        )
        self.other_out = names.attention_out.format(layer + 1)

    def read(self, name: str) -> Array:
        return self.checkpoint.read(name)

    def split_qkv(self) -> tuple[Array, Array, Array]:
        queries = self.decoder.heads * self.decoder.head_dim
        keys = self.decoder.kv_heads * self.decoder.head_dim
        q, k, v = np.split(self.read(self.qkv), [queries, queries + keys])
        return q, k, v


Make = Callable[[Model], Changes]
TENSORS: dict[str, Make] = {}  # an empty mapping where a model cannot have the fault


def fault(name: str) -> Callable[[Make], Make]:
    """Enter a fault of stored tensors into the table."""

    def enter(make: Make) -> Make:
        TENSORS[name] = make
        return make

    return enter


def _blocks(weights: Array) -> Array:
    return weights.reshape(len(weights), -1, BLOCK)


def _scales(weights: Array) -> Array:
    return np.abs(_blocks(weights)).max(axis=2, keepdims=True)


@fault("scales one block off")
def _shift_scales(model: Model) -> Changes:
    down = model.read(model.down)
    scales = _scales(down)
    return {model.down: (_blocks(down) / scales * np.roll(scales, 1, axis=1)).reshape(down.shape)}


@fault("scales of the next row")
def _shift_row_scales(model: Model) -> Changes:
    down = model.read(model.down)
    scales = _scales(down)
    return {model.down: (_blocks(down) / scales * np.roll(scales, 1, axis=0)).reshape(down.shape)}


@fault("scales twice as large")
def _double(model: Model) -> Changes:
    return {model.out: 2 * model.read(model.out)}


@fault("scales negated")
def _negate(model: Model) -> Changes:
    return {model.down: -model.read(model.down)}


@fault("zero points one off")
def _shift_zeros(model: Model) -> Changes:
    down = model.read(model.down)
    return {model.down: (_blocks(down) + _scales(down) / 7.5).reshape(down.shape)}


@fault("nibbles exchanged")
def _swap_nibbles(model: Model) -> Changes:
    down = model.read(model.down)
    return {model.down: down.reshape(len(down), -1, 2)[:, :, ::-1].reshape(down.shape)}


@fault("halves of blocks exchanged")
def _swap_halves(model: Model) -> Changes:
    return {model.down: np.roll(_blocks(d := model.read(model.down)), 16, 2).reshape(d.shape)}


@fault("columns one block off")
def _roll_columns(model: Model) -> Changes:
    return {model.out: np.roll(model.read(model.out), BLOCK, axis=1)}


@fault("rows in reverse order")
def _reverse_rows(model: Model) -> Changes:
    return {model.out: model.read(model.out)[::-1].copy()}


@fault("a matrix transposed")
def _transpose(model: Model) -> Changes:
    return {model.out: model.read(model.out).T.copy()}


@fault("a tensor of another layer")
def _take_other_layer(model: Model) -> Changes:
    return {model.out: model.read(model.other_out)}


@fault("the last rows never written")
def _leave_rows_out(model: Model) -> Changes:
    down = model.read(model.down)
    down[-len(down) // 8 :] = 0
    return {model.down: down}


@fault("rows of q and k as interleaved RoPE has them")
def _interleave(model: Model) -> Changes:
    q, k, v = model.split_qkv()
    half = model.decoder.head_dim // 2

    def weave(rows: Array) -> Array:
        heads = rows.reshape(-1, 2, half, rows.shape[1])
        return heads.swapaxes(1, 2).reshape(rows.shape)

    return {model.qkv: np.concatenate([weave(q), weave(k), v])}


@fault("k and v exchanged")
def _swap_kv(model: Model) -> Changes:
    q, k, v = model.split_qkv()
    return {model.qkv: np.concatenate([q, v, k])}


@fault("v before q and k")
def _rotate_qkv(model: Model) -> Changes:
    q, k, v = model.split_qkv()
    return {model.qkv: np.concatenate([v, q, k])}


@fault("key heads in another order")
def _roll_kv_heads(model: Model) -> Changes:
    q, k, v = model.split_qkv()
    return {model.qkv: np.concatenate([q, np.roll(k, model.decoder.head_dim, axis=0), v])}


@fault("gate and up exchanged")
def _swap_gate(model: Model) -> Changes:
    gate_up = model.read(model.gate_up)
    return {model.gate_up: np.roll(gate_up, len(gate_up) // 2, axis=0)}


@fault("gate and up interleaved")
def _weave_gate(model: Model) -> Changes:
    gate_up = model.read(model.gate_up)
    halves = gate_up.reshape(2, -1, gate_up.shape[1])
    return {model.gate_up: halves.swapaxes(0, 1).reshape(gate_up.shape)}


@fault("scales a seventh too large")
def _enlarge(model: Model) -> Changes:
    return {model.down: model.read(model.down) * np.float32(8 / 7)}


@fault("bfloat16 read as float16")
def _misread(model: Model) -> Changes:
    bits = (model.read(model.out).view(np.uint32) >> 16).astype(np.uint16)
    return {model.out: bits.view(np.float16).astype(np.float32)}


@fault("gate twice, up never")
def _repeat_gate(model: Model) -> Changes:
    gate = np.split(model.read(model.gate_up), 2)[0]
    return {model.gate_up: np.concatenate([gate, gate])}


@fault("two layers exchanged")
def _swap_layers(model: Model) -> Changes:
    first, second = (model.decoder.layer_tensors(layer) for layer in (0, 1))
    return {
        one: model.read(other)
        for some, others in ((first, second), (second, first))
        for one, other in zip(some, others, strict=True)
    }


@fault("a layer's norm missing (ones)")
def _drop_norm(model: Model) -> Changes:
    return {model.norm: np.ones_like(model.read(model.norm))}


@fault("the last norm missing (ones)")
def _drop_last_norm(model: Model) -> Changes:
    name = model.decoder.names.final_norm
    return {name: np.ones_like(model.read(name))}


@fault("norms of attention and MLP exchanged")
def _swap_norms(model: Model) -> Changes:
    first, second = model.norm, model.mlp_norm
    return {first: model.read(second), second: model.read(first)}


@fault("a norm plus one, as Gemma's")
def _add_to_norm(model: Model) -> Changes:
    return {model.norm: 1 + model.read(model.norm)}


@fault("embedding one row off")
def _roll_embedding(model: Model) -> Changes:
    name = model.decoder.names.embedding
    return {name: np.roll(model.read(name), 1, axis=0)}


@fault("head one row off")
def _roll_head(model: Model) -> Changes:
    name = model.decoder.head_name
    return {name: np.roll(model.read(name), 1, axis=0)}


@fault("a head that is not tied, the embedding")
def _tie(model: Model) -> Changes:
    names = model.decoder.names
    return {} if model.decoder.is_tied else {names.head: model.read(names.embedding)}


def _rope(**changes: Any) -> Callable[[Decoder], Decoder]:
    return lambda decoder: replace(decoder, rope=replace(decoder.rope, **changes))


def _swap_factors(decoder: Decoder) -> Decoder:
    rope = decoder.rope
    swapped = replace(rope, short_factors=rope.long_factors, long_factors=rope.short_factors)
    return replace(decoder, rope=swapped)


def set_window(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of config.json that give any Phi-3 a sliding window."""
    return {"sliding_window": 32}


def set_long_rope(checkpoint: Checkpoint) -> dict[str, Any]:
    """Fields of config.json that give any Phi-3 LongRoPE, from 32 tokens on.

    The gate reads at most some 120 tokens of a sequence.
    """
    pairs = read_decoder(checkpoint.config).head_dim // 2
    return {
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1 + 0.01 * pair for pair in range(pairs)],
            "long_factor": [1 + pair / (pairs - 1) for pair in range(pairs)],
        },
        "sliding_window": None,
    }


def _exchange(first: str, second: str) -> Make:
    """Exchange two tensors of the first layer."""

    def make(model: Model) -> Changes:
        one, other = f"model.layers.0.{first}", f"model.layers.0.{second}"
        return {one: model.read(other), other: model.read(one)}

    return make


def _scale(name: str) -> Make:
    """Scale the columns of a matrix, as equalization does, without what feeds it."""

    def make(model: Model) -> Changes:
        matrix = model.read(getattr(model, name))
        steps = np.arange(matrix.shape[1], dtype=np.float32) % 5 - 2
        return {getattr(model, name): matrix * np.exp2(steps / 4)}

    return make


EQUALIZED: Mapping[str, Make] = {
    "equalized: a norm not divided": _scale("qkv"),
    "equalized: values not divided": _scale("out"),
    "equalized: up not divided": _scale("down"),
}
"""Faults of tensors that equalization changes."""
_EXPERTS = "block_sparse_moe.experts"
EXPERTS: Mapping[str, Make] = {
    "two experts' ups exchanged": _exchange(f"{_EXPERTS}.0.w3.weight", f"{_EXPERTS}.1.w3.weight"),
    "two experts' downs exchanged": _exchange(f"{_EXPERTS}.0.w2.weight", f"{_EXPERTS}.1.w2.weight"),
    "an expert's gate and up exchanged": _exchange(
        f"{_EXPERTS}.0.w1.weight", f"{_EXPERTS}.0.w3.weight"
    ),
    "biases of two norms exchanged": _exchange(
        "input_layernorm.bias", "post_attention_layernorm.bias"
    ),
    "the router's rows in reverse order": lambda model: {
        (name := "model.layers.0.block_sparse_moe.gate.weight"): model.read(name)[::-1].copy()
    },
}
"""Faults of a Phi-3.5-MoE's tensors."""
EXPERT_FORMATS = ("onnx", "openvino", "mlx")  # llama.cpp's experts are others: distance only


@dataclass(frozen=True)
class Graph:
    """A fault of the graph or of metadata: other fields of config.json, or of the decoder.

    `source` gives the source itself other fields, where the checkpoint has no such feature.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    decoder: Callable[[Decoder], Decoder] = lambda decoder: decoder
    source: Callable[[Checkpoint], Mapping[str, Any]] = lambda checkpoint: {}
    formats: tuple[str, ...] = FORMATS

    def make_source(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint that artifacts are held against."""
        return configure(checkpoint, self.source(checkpoint))

    def apply(self, source: Checkpoint) -> tuple[Checkpoint, Decoder]:
        """The wrong config.json and architecture of a source."""
        wrong = configure(source, self.fields)
        return wrong, self.decoder(read_decoder(wrong.config))


GRAPHS: Mapping[str, Graph] = {
    "eps 0.1": Graph({"rms_norm_eps": 1e-1}),
    "a head that is not tied, left out": Graph({"tie_word_embeddings": True}),
    "RoPE base 1,000": Graph({"rope_theta": 1000.0}),
    "RoPE base 1,000,000": Graph({"rope_theta": 1e6}),
    "half of each head rotated": Graph({"partial_rotary_factor": 0.5}),
    "scores a tenth larger": Graph(
        decoder=lambda one: replace(one, attention_scale=1.1 * one.score_scale), formats=EXACT
    ),
    "scores not scaled": Graph(
        decoder=lambda one: replace(one, attention_scale=1.0), formats=EXACT
    ),
    "embeddings twice as large": Graph(
        decoder=lambda one: replace(one, embedding_scale=2.0), formats=EXACT
    ),
    "logits a tenth smaller": Graph(
        decoder=lambda one: replace(one, logit_scale=0.9), formats=EXACT
    ),
    "window missing": Graph({"sliding_window": None}, source=set_window),
    "window one too long": Graph({"sliding_window": 33}, source=set_window, formats=EXACT),
    "window half as long": Graph({"sliding_window": 16}, source=set_window, formats=EXACT),
    "short and long factors exchanged": Graph(decoder=_swap_factors, source=set_long_rope),
    "LongRoPE's scale missing": Graph(
        decoder=_rope(short_scale=1.0, long_scale=1.0),
        source=set_long_rope,
        formats=("onnx", "openvino", "gguf"),  # mlx-lm works it out
    ),
    "long factors from another length on": Graph(
        decoder=_rope(original_context=126), source=set_long_rope, formats=EXACT
    ),
    "LongRoPE missing": Graph({"rope_scaling": None}, source=set_long_rope),
}
