"""Small random Phi-3.5-MoE checkpoints: names, config keys and ratios of shapes as published.

    folder = write_moe_checkpoint(tmp_path / "moe")

Which experts a token goes to is a comparison: two that are nearly as good make it chaotic, and a
runtime's last bits decide. So what a layer adds is weak beside the embedding, and noise in one
layer moves the next router's logits little; tests/golden/moe_cases.py says how wide the gaps of
the recorded texts are.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import (
    Dtype,
    Weights,
    copy_tokenizer,
    variant_config,
    write_safetensors,
)

HEAD_DIM, PAIRS = 64, 32
SHORT_SCALE, LONG_SCALE = 1.243163121016122, 1.15

# The keys of the published config.json where they differ from the Phi-3's.
_CHANGES: dict[str, Any] = {
    "architectures": ["PhiMoEForCausalLM"],
    "model_type": "phimoe",
    "attention_bias": True,
    "lm_head_bias": True,
    "hidden_dropout": 0.0,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "router_jitter_noise": 0.01,
    "input_jitter_noise": 0.01,
    "router_aux_loss_coef": 0.0,
    "output_router_logits": False,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 64,
    "sliding_window": 256,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [round(1.0 + 0.05 * pair, 4) for pair in range(PAIRS)],
        "long_factor": [round(1.0 + 0.9 * pair, 4) for pair in range(PAIRS)],
        "short_mscale": SHORT_SCALE,
        "long_mscale": LONG_SCALE,
        "original_max_position_embeddings": 64,
    },
}


def moe_config(dtype: Dtype = "bf16", **changes: Any) -> dict[str, Any]:
    """Return config.json as a new dict, with the token ids of tiny-phi3."""
    return {**variant_config("mha", dtype), **_CHANGES, **changes}


def write_moe_checkpoint(
    folder: Path, *, dtype: Dtype = "bf16", seed: int = 0, **changes: Any
) -> Path:
    """Write a whole checkpoint into `folder`, with `changes` of its config, and return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = moe_config(dtype, **changes)
    copy_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", moe_weights(config, seed), dtype)
    return folder


def moe_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that a PhiMoEForCausalLM of `config` stores."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    rows = {"q": hidden, "k": config["num_key_value_heads"] * HEAD_DIM}
    rows |= {"v": rows["k"], "o": hidden}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{prefix}{norm}.weight": (hidden,), f"{prefix}{norm}.bias": (hidden,)}
        for part, count in rows.items():
            name = f"{prefix}self_attn.{part}_proj"
            shapes |= {f"{name}.weight": (count, hidden), f"{name}.bias": (count,)}
        moe = f"{prefix}block_sparse_moe."
        shapes[f"{moe}gate.weight"] = (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            shapes |= {
                f"{moe}experts.{expert}.w1.weight": (inner, hidden),
                f"{moe}experts.{expert}.w2.weight": (hidden, inner),
                f"{moe}experts.{expert}.w3.weight": (inner, hidden),
            }
    shapes |= {"model.norm.weight": (hidden,), "model.norm.bias": (hidden,)}
    return shapes | {
        "lm_head.weight": (config["vocab_size"], hidden),
        "lm_head.bias": (config["vocab_size"],),
    }


def moe_weights(config: Mapping[str, Any], seed: int = 0) -> Weights:
    """Return the float32 weights of `config` before they are rounded to the stored dtype."""
    rng = np.random.default_rng(seed)
    shapes = moe_shapes(config)
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        weight *= np.float32(_std(name, weight.shape))
        if name.endswith("norm.weight"):
            weight += 1
        if name.endswith("embed_tokens.weight"):
            weight += np.float32(0.3)  # so that taking the mean away matters
    return weights


def _std(name: str, shape: tuple[int, ...]) -> float:
    if len(shape) == 1:
        return 0.2
    if name.endswith("embed_tokens.weight"):
        return 1.0
    gains = {"o_proj": 0.4, "w2": 0.4, "gate": 1.5, "lm_head": 1.6}
    return gains.get(name.split(".")[-2], 1.3) / math.sqrt(shape[1])
