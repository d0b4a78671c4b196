"""Small random Phi-3 checkpoints, one per architecture variant, for tests of every area.

    folder = write_random_checkpoint(tmp_path / "gqa", "gqa")

Each is a complete local checkpoint (config, generation config, tokenizer, safetensors) which
transformers loads strictly. The weights are seeded noise whose spread keeps the next-token
distribution informative: far from uniform and from one-hot; int4 moves it by a KL of 0.06 to 0.12.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Dtype = Literal["bf16", "f16", "f32"]
Weights = dict[str, NDArray[np.float32]]

TINY_PHI3 = Path(__file__).resolve().parent.parent / "examples" / "tiny-phi3"
_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

HEAD_DIM = 64
_ROTARY_PAIRS = HEAD_DIM // 2

# The keys and spellings of the published Phi-3-mini-4k config.json, less what tiny-phi3 decides.
_BASE: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "model_type": "phi3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 256,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.41.2",
    "use_cache": True,
}


def _long_rope(spelling: Mapping[str, Any], pairs: int = _ROTARY_PAIRS) -> dict[str, Any]:
    """Return LongRoPE keys: short factors up to 64 tokens, long ones up to 256.

    `spelling` differs among the published revisions. transformers 5 accepts type "su" only where
    rope_scaling itself says original_max_position_embeddings.
    """
    short = [round(1.0 + 0.01 * pair, 4) for pair in range(pairs)]
    long = [round(1.0 + 3.0 * pair / (pairs - 1), 4) for pair in range(pairs)]
    return {
        "original_max_position_embeddings": 64,
        "rope_scaling": {"long_factor": long, "short_factor": short, **spelling},
        # Published with the 128k models: wider than the context, hence without effect.
        "sliding_window": 512,
    }


VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "longrope": _long_rope({"type": "su", "original_max_position_embeddings": 64}),
    "longrope_gqa": {"num_key_value_heads": 2, **_long_rope({"type": "longrope"})},
    "partial_rotary_tied": {"partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "window": {
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 128,
        "sliding_window": 32,
    },
    # Phi-4-mini's architecture: 24 heads to 8 as 6 to 2, 96 of 128 values rotated as 48 of 64.
    "phi4_mini": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        **_long_rope({"type": "longrope"}, pairs=24),
    },
}
"""What each variant changes in the base config (256 wide, 2 layers, 4 heads of 64)."""

# Spreads of the weights. An RMS norm stands in front of every linear layer, so one of 256 inputs
# answers with 16 times its spread: attention scores near 1, logits near 1.6. Embeddings of 0.5
# weigh as much in the residual as a layer's answer; tied ones must not, or each token would
# predict itself.
_STD_EMBEDDING = 0.5
_STD_LOGITS = 0.1
_STD_LINEAR = 0.06
_STD_NORM = 0.1

_TORCH_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def write_random_checkpoint(
    folder: Path, variant: str, *, dtype: Dtype = "bf16", shards: int = 1, seed: int = 0
) -> Path:
    """Write the checkpoint of `variant` (a key of VARIANTS) into `folder` and return `folder`.

    The same variant and seed give the same weights, rounded to `dtype`. `shards` > 1 splits
    them as the published checkpoints are split, with a model.safetensors.index.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = variant_config(variant, dtype)
    copy_tokenizer(folder)
    _write_json(folder / "config.json", config)
    _write_shards(folder, random_weights(config, seed), dtype, shards)
    return folder


def copy_tokenizer(folder: Path) -> None:
    """Copy what tiny-phi3 has beside its weights, but for config.json."""
    for name in _COPIED_FILES:
        if (TINY_PHI3 / name).exists():
            shutil.copyfile(TINY_PHI3 / name, folder / name)


def variant_config(variant: str, dtype: Dtype = "bf16") -> dict[str, Any]:
    """Return config.json of `variant` as a new dict, with the token ids of tiny-phi3."""
    tiny = json.loads((TINY_PHI3 / "config.json").read_text("utf-8"))
    token_ids = {key: tiny[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"vocab_size": tiny["vocab_size"], "torch_dtype": _TORCH_DTYPES[dtype]}
    return {**_BASE, **token_ids, **sizes, **VARIANTS[variant]}


def weight_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a Phi3ForCausalLM of `config` stores."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    qkv = (heads + 2 * config["num_key_value_heads"]) * head_dim
    vocabulary = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocabulary}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "self_attn.qkv_proj.weight"] = (qkv, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, heads * head_dim)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_up_proj.weight"] = (2 * inner, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = vocabulary
    return shapes


def random_weights(config: Mapping[str, Any], seed: int = 0) -> Weights:
    """Return the float32 weights of `config` before they are rounded to the stored dtype."""
    rng = np.random.default_rng(seed)
    shapes = weight_shapes(config)
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        weight *= np.float32(_std(name, config))
        if name.endswith("norm.weight"):
            weight += 1
    return weights


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: Dtype) -> None:
    """Write `tensors`, rounded to `dtype`, as one file of the safetensors format.

    Source: the format section of the README of huggingface/safetensors.
    """
    payloads = {name: encode(tensor, dtype) for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, payload in payloads.items():
        start, end = end, end + len(payload)
        header[name] = {
            "dtype": dtype.upper(),
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(payloads.values()))


def encode(tensor: NDArray[np.float32], dtype: Dtype) -> bytes:
    """Return `tensor` rounded to nearest even in `dtype`, little-endian, in row order."""
    if dtype == "f32":
        return tensor.astype("<f4").tobytes()
    if dtype == "f16":
        return tensor.astype("<f2").tobytes()
    bits = tensor.astype("<f4").view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def _std(name: str, config: Mapping[str, Any]) -> float:
    if name.endswith("norm.weight"):
        return _STD_NORM
    # More inputs than 256 add up to more.
    share = math.sqrt(256 / max(256, config["hidden_size"]))
    if name == "lm_head.weight" or (name.endswith("embed_tokens.weight") and _is_tied(config)):
        return _STD_LOGITS * share
    return _STD_EMBEDDING if name.endswith("embed_tokens.weight") else _STD_LINEAR * share


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(config["tie_word_embeddings"])


def _write_shards(folder: Path, weights: Weights, dtype: Dtype, shards: int) -> None:
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    names = list(weights)
    per_shard = math.ceil(len(names) / shards)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = names[shard * per_shard : (shard + 1) * per_shard]
        file_name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        write_safetensors(folder / file_name, {name: weights[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file_name)
    total_bytes = sum(len(encode(tensor, dtype)) for tensor in weights.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
