"""Checkpoints for GGUF tests: every variant, and shapes that llama-quantize treats apart."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.checkpoints import VARIANTS, random_weights, write_random_checkpoint, write_safetensors

# What each case changes in the config of the variant "mha".
SHAPES: Mapping[str, Mapping[str, Any]] = {
    # Rows that are no multiple of 256: other types with smaller blocks.
    "narrow": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3,
               "intermediate_size": 288},
    "narrow_tied": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3,
                    "intermediate_size": 256, "tie_word_embeddings": True},
    # Enough layers for all of the mix: first and last eighth, every third between.
    "deep": {"num_hidden_layers": 19},
}  # fmt: skip
CASES = (*VARIANTS, *SHAPES)


def write_case(folder: Path, case: str) -> Path:
    """Write the checkpoint of a case into `folder` and return `folder`."""
    if case in VARIANTS:
        return write_random_checkpoint(folder, case)
    write_random_checkpoint(folder, "mha")
    config = json.loads((folder / "config.json").read_text("utf-8")) | SHAPES[case]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", random_weights(config), "bf16")
    return folder
