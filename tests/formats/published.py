"""Narrow random checkpoints with the published numbers of position: head widths, contexts, windows.

Errors far out in a text do not show at 64 tokens: rounding of large angles, an edge that is off by
one at 2,047, a table that ends at 4,096. The factors are those of Phi-3.5-mini's config.json; those
of medium-128k, 64 to a head, are stretched from them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import random_weights, write_random_checkpoint, write_safetensors

GOLDEN = Path(__file__).parent.parent / "golden" / "published_logits.npz"

# Two decimals, as they were found; the file spells their float32 values out.
_SHORT = [
    1.0, 1.02, 1.03, 1.03, 1.05, 1.05, 1.05, 1.05, 1.05, 1.07, 1.1, 1.11, 1.16, 1.16, 1.17, 1.29,
    1.34, 1.68, 1.79, 1.82, 1.85, 1.88, 1.91, 1.94, 1.99, 2.02, 2.02, 2.02, 2.02, 2.02, 2.02, 2.03,
    2.03, 2.03, 2.03, 2.03, 2.03, 2.03, 2.03, 2.03, 2.08, 2.09, 2.19, 2.22, 2.59, 2.73, 2.75, 2.84,
]  # fmt: skip
_LONG = [
    1.08, 1.11, 1.14, 1.34, 1.59, 1.6, 1.62, 2.62, 3.23, 3.23, 4.79, 7.4, 7.7, 9.09, 12.2, 17.67,
    24.46, 28.57, 30.42, 30.84, 32.59, 32.93, 42.32, 44.96, 50.34, 50.45, 57.55, 57.93, 58.21,
    60.14, 62.61, 62.62, 62.71, 63.14, 63.14, 63.77, 63.93, 63.96, 63.97, 64.03, 64.07, 64.08,
    64.12, 64.41, 64.48, 64.51, 64.53, 64.84,
]  # fmt: skip


def _stretch(factors: list[float], count: int) -> list[float]:
    places = np.linspace(0, len(factors) - 1, count)
    return [round(float(value), 2) for value in np.interp(places, range(len(factors)), factors)]


def _long_rope(pairs: int) -> dict[str, Any]:
    scaling = {"type": "longrope", "short_factor": _stretch(_SHORT, pairs),
               "long_factor": _stretch(_LONG, pairs)}  # fmt: skip
    return {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
            "rope_scaling": scaling}  # fmt: skip


_MINI = {"hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 2,
         "num_key_value_heads": 2}  # fmt: skip

# What each changes in the config of the variant "mha".
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "mini-4k": {**_MINI, "max_position_embeddings": 4096, "sliding_window": 2047,
                "original_max_position_embeddings": 4096},
    "phi-3.5-mini": {**_MINI, **_long_rope(48), "sliding_window": 262144},
    "medium-128k": {**_long_rope(64), "hidden_size": 256, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "sliding_window": 131072},
}  # fmt: skip

# On both sides of the window's edge and of LongRoPE's switch.
LENGTHS = {"mini-4k": (2047, 2048, 2300), "phi-3.5-mini": (4096, 4097), "medium-128k": (4096, 4097)}


def write_published(folder: Path, shape: str) -> Path:
    """Write the checkpoint of a shape into `folder` and return `folder`."""
    write_random_checkpoint(folder, "mha")
    config = json.loads((folder / "config.json").read_text("utf-8")) | SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", random_weights(config), "bf16")
    return folder
