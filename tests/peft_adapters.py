"""Adapters of every kind that PEFT writes, for the random checkpoint `llama` and a tied one.

Names of tensors are those that PEFT 0.21's save_pretrained writes; tests/golden/make_peft.py has
PEFT load each of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.adapters import RANK, STD, Arrays, write_adapter
from tests.checkpoints import Weights, random_weights
from tests.split_checkpoints import split_config, split_weights, write_parts

SEED = 7
BASE, TIED = "llama", "llama3"
MORE_TOKENS = 8
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
NORM, DOWN = "model.layers.0.input_layernorm", "model.layers.1.mlp.down_proj"
TOKENS = (3, 5, 1999)


@dataclass(frozen=True)
class Case:
    """Settings, the ends of modules with a linear update, and what else there is."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    linear: tuple[str, ...] = ("q_proj", "up_proj")
    saved: tuple[str, ...] = ()
    embedded: bool = False
    tokens: tuple[str, ...] = ()
    is_tied: bool = False
    is_resized: bool = False
    is_unmerged: bool = False  # the golden is of the adapter as it was trained


CASES: Mapping[str, Case] = {
    "split": Case(linear=LINEAR),
    "dora": Case({"use_dora": True, "use_rslora": True}, linear=LINEAR),
    "saved": Case({"modules_to_save": ["embed_tokens", "lm_head", "layers.0.input_layernorm",
                                  "layers.1.mlp.down_proj"]},
                  saved=(EMBEDDING, HEAD, NORM, DOWN)),
    "embedding": Case(linear=("q_proj", HEAD), embedded=True),
    "dora_embedding": Case({"use_dora": True}, embedded=True),
    "tokens": Case({"trainable_token_indices": {"embed_tokens": [*TOKENS], "lm_head": [*TOKENS]}},
                   tokens=(EMBEDDING, HEAD)),
    "resized": Case(saved=(EMBEDDING, HEAD), is_resized=True),
    "tied_saved": Case({"modules_to_save": ["embed_tokens"]}, saved=(EMBEDDING,), is_tied=True),
    "tied_tokens": Case({"trainable_token_indices": [*TOKENS]}, tokens=(EMBEDDING,), is_tied=True),
    # merge_and_unload would add the update of the embedding to the head too.
    "tied_embedding": Case(embedded=True, is_tied=True, is_unmerged=True),
    "tied_head": Case(linear=("q_proj", HEAD), is_tied=True, is_unmerged=True),
}  # fmt: skip


def base_weights(case: str) -> tuple[dict[str, Any], Weights]:
    """config.json and the split weights of a case's checkpoint."""
    config = split_config(TIED if CASES[case].is_tied else BASE)
    config["torch_dtype"] = "float32"
    return config, split_weights(random_weights(config, SEED), config)


def write_base(folder: Path, case: str) -> Path:
    """Write a case's checkpoint, in float32, and return its folder."""
    config, weights = base_weights(case)
    return write_parts(folder, config, weights, "f32")


def make_arrays(case: str, seed: int = 3) -> Arrays:
    """The tensors of a case's adapter, by the names that PEFT writes."""
    wanted, rng = CASES[case], np.random.default_rng(seed)
    _, weights = base_weights(case)
    weights.setdefault(f"{HEAD}.weight", weights[f"{EMBEDDING}.weight"])

    def draw(*shape: int, spread: float = STD) -> NDArray[np.float32]:
        return rng.standard_normal(shape, np.float32) * np.float32(spread)

    arrays: Arrays = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        rows = len(weight)
        if module.endswith(wanted.linear):
            arrays[f"{module}.lora_A.weight"] = draw(RANK, weight.shape[1])
            arrays[f"{module}.lora_B.weight"] = draw(rows, RANK)
            if wanted.settings.get("use_dora"):
                norms = np.linalg.norm(weight, axis=1)
                arrays[f"{module}.lora_magnitude_vector"] = norms * (1 + draw(rows))
        if wanted.embedded and module == EMBEDDING:
            arrays[f"{module}.lora_embedding_A"] = draw(RANK, rows)
            arrays[f"{module}.lora_embedding_B"] = draw(weight.shape[1], RANK)
            arrays[f"{module}.base_layer.weight"] = weight
            if wanted.settings.get("use_dora"):
                norms = np.linalg.norm(weight, axis=0)
                arrays[f"{module}.lora_magnitude_vector"] = norms * (1 + draw(len(norms)))
        if module in wanted.saved:
            saved = weight + draw(*weight.shape, spread=0.05)
            if wanted.is_resized:
                saved = np.concatenate([saved, draw(MORE_TOKENS, weight.shape[1], spread=0.3)])
            arrays[name] = saved
        if module in wanted.tokens:
            key = f"{module}.token_adapter.trainable_tokens_delta"
            arrays[key] = draw(len(TOKENS), weight.shape[1], spread=0.5)
    return {f"base_model.model.{name}": array for name, array in arrays.items()}


def write_case(folder: Path, case: str, **changes: Any) -> Path:
    """Write a case's adapter and return its folder."""
    wanted = CASES[case]
    targets = [*wanted.linear, *(["embed_tokens"] if wanted.embedded else [])]
    settings = {"target_modules": targets, **wanted.settings, **changes}
    return write_adapter(folder, make_arrays(case), **settings)
