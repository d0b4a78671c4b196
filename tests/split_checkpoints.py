"""Random checkpoints of Llama and Mistral, and Phi-3's with their projections taken apart.

    folder = write_split_checkpoint(tmp_path / "llama", "llama3")

Weights are those of tests/checkpoints.py, so that a split checkpoint has a fused one beside it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.checkpoints import (
    Dtype,
    Weights,
    copy_tokenizer,
    random_weights,
    variant_config,
    write_safetensors,
)

PAIRS = 32
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
# What each variant changes in the base config of tests/checkpoints.py: 2 layers of 256, heads of
# 64, 256 tokens. With keys of transformers 4 and of transformers 5.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**LLAMA, "num_key_value_heads": 2},
    "linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        **LLAMA,
        "num_key_value_heads": 2,
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3},
        "tie_word_embeddings": True,
    },
    "longrope": {
        **LLAMA,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "long_factor": [round(1.0 + 3.0 * pair / (PAIRS - 1), 4) for pair in range(PAIRS)],
            "short_factor": [round(1.0 + 0.01 * pair, 4) for pair in range(PAIRS)],
            "type": "longrope",
        },
    },
    "window": {**MISTRAL, "num_key_value_heads": 1, "sliding_window": 32},
    # Heads of 64 in a model of 256, but only two: as Mistral Nemo.
    "narrow": {**MISTRAL, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
}


def split_config(variant: str) -> dict[str, Any]:
    """config.json of a variant as a new dict; original_max_position_embeddings only if it says."""
    config = variant_config("mha")
    del config["original_max_position_embeddings"]
    config |= VARIANTS[variant]
    return {key: value for key, value in config.items() if key != "rope_theta" or value}


def split_weights(weights: Weights, config: Mapping[str, Any]) -> Weights:
    """The same weights with qkv_proj and gate_up_proj taken apart, as Llama stores them."""
    found: Weights = {}
    for name, weight in weights.items():
        root, _, last = name.removesuffix(".weight").rpartition(".")
        if last == "qkv_proj":
            head_dim = config.get("head_dim") or (
                config["hidden_size"] // config["num_attention_heads"]
            )
            queries = config["num_attention_heads"] * head_dim
            keys = config["num_key_value_heads"] * head_dim
            for part, start, rows in (
                ("q_proj", 0, queries),
                ("k_proj", queries, keys),
                ("v_proj", queries + keys, keys),
            ):
                found[f"{root}.{part}.weight"] = weight[start : start + rows]
        elif last == "gate_up_proj":
            half = len(weight) // 2
            found[f"{root}.gate_proj.weight"] = weight[:half]
            found[f"{root}.up_proj.weight"] = weight[half:]
        else:
            found[name] = weight
    return found


def write_split_checkpoint(
    folder: Path, variant: str, *, dtype: Dtype = "bf16", seed: int = 0
) -> Path:
    """Write the checkpoint of `variant` (a key of VARIANTS) into `folder` and return `folder`."""
    config = split_config(variant)
    weights = split_weights(random_weights(config, seed), config)
    return write_parts(folder, config, weights, dtype)


def write_parts(
    folder: Path, config: Mapping[str, Any], weights: Weights, dtype: Dtype = "bf16"
) -> Path:
    """Write a checkpoint of these tensors with the tokenizer of tiny-phi3."""
    folder.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(folder / "model.safetensors", weights, dtype)
    return folder
