"""Small random LoRA adapters for the checkpoints of checkpoints.py, as PEFT saves them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import Dtype, write_safetensors

RANK = 4
# What each case says besides rank 4 and alpha 8, and the ranks of the modules it names.
CASES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"down_proj": 2, "layers.0.self_attn.qkv_proj": 8},
        "alpha_pattern": {r"layers\.1\..*o_proj": 3, "gate_up_proj": 12},
    },
}
RANKS = {"patterns": {"down_proj": 2, "layers.0.self_attn.qkv_proj": 8}}
MODULES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
# Of Phi-3.5-MoE and Phi-3-small.
OTHERS = ("k_proj", "w1", "w3", "query_key_value", "up_proj")
# B A of rank 4 has entries of twice the square of this: half the spread of the weights.
STD = 0.12

Arrays = dict[str, NDArray[np.float32]]


def describe_adapter(**changes: Any) -> dict[str, Any]:
    """adapter_config.json, with the keys that PEFT writes."""
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": "somewhere/else",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": RANK,
        "rank_pattern": {},
        "target_modules": list(MODULES),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        **changes,
    }


def make_adapter(
    shapes: Mapping[str, tuple[int, ...]], ranks: Mapping[str, int] | None = None, seed: int = 1,
    modules: Sequence[str] = (*MODULES, *OTHERS),
) -> Arrays:  # fmt: skip
    """A and B of every matrix in `shapes` with such a name, by the names that PEFT writes."""
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or not module.endswith(tuple(modules)):
            continue
        fits = (rank for end, rank in (ranks or {}).items() if module.endswith(end))
        rank = next(fits, RANK)
        for part, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            key = f"base_model.model.{module}.lora_{part}.weight"
            arrays[key] = rng.standard_normal(size, np.float32) * np.float32(STD)
    return arrays


def write_adapter(
    folder: Path, arrays: Mapping[str, NDArray[np.float32]], dtype: Dtype = "f32", **changes: Any
) -> Path:
    """Write an adapter's two files into `folder` and return it."""
    folder.mkdir(parents=True)
    config = describe_adapter(**changes)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "adapter_model.safetensors", arrays, dtype)
    return folder


def write_case(folder: Path, case: str, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """Write the adapter of a case for a checkpoint with tensors of these shapes."""
    return write_adapter(folder, make_adapter(shapes, RANKS.get(case)), **CASES[case])


def write_adapter_of(checkpoint: Path, folder: Path, lora_alpha: int) -> Path:
    """Write one for a checkpoint whose weights are smaller than random ones."""
    from toolkit.checkpoint import Checkpoint  # not where goldens are made with torch

    shapes = {name: info.shape for name, info in Checkpoint.open(checkpoint).tensors.items()}
    return write_adapter(folder, make_adapter(shapes), lora_alpha=lora_alpha)
