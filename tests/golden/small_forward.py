"""Phi-3-small once more, position by position in float64: what the reference is held against.

A transcription of what modeling_phi3_small.py and triton_blocksparse_attention_layer.py, published
with the checkpoints, compute; nothing of the toolkit takes part. transformers has no Phi-3-small.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def read_tensors(folder: Path) -> dict[str, Array]:
    """Every tensor of a folder's model.safetensors (bf16 or float32)."""
    raw = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            bits = np.frombuffer(raw[begin:end], "<u2").astype(np.uint32) << 16
            values = bits.view(np.float32)
        else:
            values = np.frombuffer(raw[begin:end], "<f4")
        tensors[name] = values.reshape(entry["shape"]).astype(np.float64)
    return tensors


def forward(folder: Path, ids: Sequence[int]) -> Array:
    """Logits after every position: float64 [len(ids), vocab]."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tensors = read_tensors(folder)
    embedding = tensors["model.embed_tokens.weight"]
    states = [embedding[token] * config["mup_embedding_multiplier"] for token in ids]
    for layer in range(config["num_hidden_layers"]):
        states = run_layer(config, tensors, layer, states)
    logits = []
    for state in states:
        normed = normalize(config, tensors, "model.final_layernorm", state)
        row = embedding @ normed / config["mup_width_multiplier"]
        row[config["dummy_token_indices"]] = np.finfo(np.float32).min
        logits.append(row)
    return np.array(logits)


def run_layer(
    config: dict[str, Any], tensors: dict[str, Array], layer: int, states: list[Array]
) -> list[Array]:
    """One layer, one position after the other."""
    prefix = f"model.layers.{layer}."
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shared = heads // kv_heads
    queries: list[list[Array]] = []
    keys: list[list[Array]] = []
    values: list[list[Array]] = []
    out = []
    for position, state in enumerate(states):
        normed = normalize(config, tensors, prefix + "input_layernorm", state)
        fused = project(tensors, prefix + "self_attn.query_key_value", normed)
        # One group a key head: the query heads that share it, the key, the value.
        groups = fused.reshape(kv_heads, shared + 2, -1)
        turn = make_rotation(config, position, len(states), groups.shape[-1])
        queries.append([rotate(groups[h // shared, h % shared], turn) for h in range(heads)])
        keys.append([rotate(groups[g, shared], turn) for g in range(kv_heads)])
        values.append([groups[g, shared + 1] for g in range(kv_heads)])
        mixed = []
        for head in range(heads):
            seen = [k for k in range(position + 1) if sees(config, layer, head, position, k)]
            scores = [queries[position][head] @ keys[k][head // shared] for k in seen]
            scaled = np.array(scores) * scale_of(config, groups.shape[-1])
            shares = np.exp(scaled - scaled.max())
            shares /= shares.sum()
            own = np.array([values[k][head // shared] for k in seen])
            mixed.append(shares @ own)
        state = state + project(tensors, prefix + "self_attn.dense", np.concatenate(mixed))
        normed = normalize(config, tensors, prefix + "post_attention_layernorm", state)
        out.append(state + run_mlp(config, tensors, prefix + "mlp.", normed))
    return out


def sees(config: dict[str, Any], layer: int, head: int, query: int, key: int) -> bool:
    """True when a query's block sees a key's: dense layers, near blocks, every stride-th."""
    if (layer + 1) % config["dense_attention_every_n_layers"] == 0:
        return True
    size, stride = config["blocksparse_block_size"], config["blocksparse_vert_stride"]
    query_block, key_block = query // size, key // size
    if query_block - key_block < config["blocksparse_num_local_blocks"]:
        return True
    if config["blocksparse_homo_head_pattern"]:
        return key_block % stride == stride - 1
    step = max(1, int(stride / config["num_attention_heads"]))
    return (key_block + head * step + 1) % stride == 0


def run_mlp(config: dict[str, Any], tensors: dict[str, Array], prefix: str, normed: Array) -> Array:
    """gegelu: even rows through gelu, odd rows linear, both limited."""
    both, limit = project(tensors, prefix + "up_proj", normed), config["gegelu_limit"]
    inner = []
    for gelu, linear in zip(both[0::2], both[1::2], strict=True):
        gate = min(gelu, limit)
        inner.append(gate / (1 + math.exp(-1.702 * gate)) * (min(max(linear, -limit), limit) + 1))
    return project(tensors, prefix + "down_proj", np.array(inner))


def scale_of(config: dict[str, Any], head_dim: int) -> float:
    """What scores are multiplied with."""
    if config["mup_use_scaling"]:
        return float(config["mup_attn_multiplier"] / head_dim)
    return 1 / math.sqrt(head_dim)


def make_rotation(
    config: dict[str, Any], position: int, length: int, head_dim: int
) -> tuple[Array, Array]:
    """cos and sin of a position, [head_dim / 2] each; long factors beyond the original context."""
    scaling = config.get("rope_scaling")
    factors, scale = [1.0] * (head_dim // 2), 1.0
    if scaling:
        kind = "long" if length > config["original_max_position_embeddings"] else "short"
        factors, scale = scaling[f"{kind}_factor"], scaling[f"{kind}_mscale"]
    angles = [
        position / (factor * config["rope_embedding_base"] ** (2 * pair / head_dim))
        for pair, factor in enumerate(factors)
    ]
    return np.cos(angles) * scale, np.sin(angles) * scale


def rotate(state: Array, turn: tuple[Array, Array]) -> Array:
    """Rotate-half of one head's state."""
    low, high = np.split(state, 2)
    cos, sin = turn
    return np.concatenate([low * cos - high * sin, high * cos + low * sin])


def normalize(config: dict[str, Any], tensors: dict[str, Array], name: str, state: Array) -> Array:
    """LayerNorm with weight and bias."""
    centred = state - state.mean()
    deviation = math.sqrt((centred**2).mean() + config["layer_norm_epsilon"])
    return centred / deviation * tensors[name + ".weight"] + tensors[name + ".bias"]


def project(tensors: dict[str, Array], name: str, state: Array) -> Array:
    """A linear with its bias."""
    return tensors[name + ".weight"] @ state + tensors[name + ".bias"]
