"""Small random Phi-3-small checkpoints, with the published names of tensors, keys and files.

    folder = write_small_checkpoint(tmp_path / "small")

The tokenizer is tests/golden/small.tiktoken, of the same structure as cl100k_base. Blocks of 16
tokens, of which two are local, make the attention sparse from the 33rd token on; the published
ones, of 64 and 16, from the 1,025th. Few layers, heads that share keys, a limit on gegelu that
weights reach.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import Dtype, Weights, write_safetensors
from tests.golden.make_tiktoken import COUNT, RANKS, VOCAB
from toolkit.checkpoint.ranks import RANKS_FILE

ENDOFTEXT, END = COUNT + 1, COUNT + 10
DUMMIES = [COUNT, *range(COUNT + 2, COUNT + 5), COUNT + 8, COUNT + 9, *range(COUNT + 11, VOCAB)]
HEAD_DIM = 32
PAIRS = HEAD_DIM // 2

# The keys and spellings of the published Phi-3-small-8k config.json.
BASE: dict[str, Any] = {
    "architectures": ["Phi3SmallForCausalLM"],
    "attention_bias": False,
    "attention_dropout_prob": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3_small.Phi3SmallForCausalLM"},
    "blocksparse_block_size": 16,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_num_local_blocks": 2,
    "blocksparse_triton_kernel_block_size": 16,
    "blocksparse_vert_stride": 4,
    "bos_token_id": ENDOFTEXT,
    "dense_attention_every_n_layers": 2,
    "dummy_token_indices": DUMMIES,
    "embedding_dropout_prob": 0.1,
    "eos_token_id": ENDOFTEXT,
    "ff_dim_multiplier": None,
    "ff_intermediate_size": 384,
    "ffn_dropout_prob": 0.1,
    "gegelu_limit": 2.0,
    "gegelu_pad_to_256": True,
    "hidden_act": "gegelu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 512,
    "model_type": "phi3small",
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_use_scaling": True,
    "mup_width_multiplier": 8.0,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_sequence_to_multiple_of_64": True,
    "reorder_and_upcast_attn": False,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.1",
    "use_cache": True,
    "vocab_size": VOCAB,
}
LONG = {
    "original_max_position_embeddings": 64,
    "rope_scaling": {
        "long_factor": [round(1 + 3 * pair / (PAIRS - 1), 4) for pair in range(PAIRS)],
        "long_mscale": 1.19,
        "original_max_position_embeddings": 64,
        "short_factor": [round(1 + 0.01 * pair, 4) for pair in range(PAIRS)],
        "short_mscale": 1.05,
        "type": "su",
    },
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "8k": {},
    "128k": LONG,
    # Every head alike, wider strides than heads, dense layers at other places.
    "homo": {
        "blocksparse_homo_head_pattern": True,
        "dense_attention_every_n_layers": 3,
        "mup_use_scaling": False,
    },
    "wide_stride": {"blocksparse_vert_stride": 16, "blocksparse_num_local_blocks": 1},
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + "
    "message['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TOKENS = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
TOKENIZER_CONFIG = {
    "added_tokens_decoder": {},
    "auto_map": {"AutoTokenizer": ["tokenization_phi3_small.Phi3SmallTokenizer", None]},
    "chat_template": TEMPLATE,
    "clean_up_tokenization_spaces": True,
    "model_max_length": 8192,
    "tokenizer_class": "Phi3SmallTokenizer",
    **TOKENS,
}

# Spreads: scores near 1, each branch as large as what it is added to, logits near 1. The final
# norm's weights have both signs, or each token would predict itself, for the head is tied.
STD = {
    "embed_tokens": 0.5,
    "query_key_value": 0.15,
    "dense": 0.6,
    "up_proj": 0.1,
    "down_proj": 0.3,
    "layernorm": 0.2,
    "final_layernorm": 1.6,
    "bias": 0.2,
}


def write_small_checkpoint(
    folder: Path, variant: str = "8k", *, dtype: Dtype = "bf16", seed: int = 0, **changes: Any
) -> Path:
    """Write the checkpoint of `variant`, `changes` made to its config, and return `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**BASE, **VARIANTS[variant], **changes}
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("special_tokens_map.json", TOKENS),
        ("generation_config.json", {"eos_token_id": [ENDOFTEXT, END], "bos_token_id": ENDOFTEXT}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(RANKS, folder / RANKS_FILE)
    write_safetensors(folder / "model.safetensors", make_weights(config, seed), dtype)
    return folder


def list_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a Phi3SmallForCausalLM of `config` stores."""
    hidden, inner = config["hidden_size"], config["ff_intermediate_size"]
    head_dim = hidden // config["num_attention_heads"]
    qkv = hidden + 2 * config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        for name, rows, columns in (
            ("self_attn.query_key_value", qkv, hidden),
            ("self_attn.dense", hidden, hidden),
            ("mlp.up_proj", 2 * inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            shapes[f"model.layers.{layer}.{name}.weight"] = (rows, columns)
            shapes[f"model.layers.{layer}.{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            for part in ("weight", "bias"):
                shapes[f"model.layers.{layer}.{name}.{part}"] = (hidden,)
    shapes["model.final_layernorm.weight"] = shapes["model.final_layernorm.bias"] = (hidden,)
    return shapes


def make_weights(config: Mapping[str, Any], seed: int = 0) -> Weights:
    """The float32 weights of `config` before they are rounded to the stored dtype."""
    rng = np.random.default_rng(seed)
    weights: Weights = {}
    for name, shape in list_shapes(config).items():
        module, part = name.split(".")[-2:]
        kind = "bias" if part == "bias" else module
        std = STD[kind if kind in STD else "layernorm"]
        weights[name] = rng.standard_normal(shape, np.float32) * np.float32(std)
        if kind.endswith("_layernorm") and kind != "final_layernorm":
            weights[name] += 1
    return weights
