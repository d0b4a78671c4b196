"""Checkpoints for GGUF tests: every variant, and shapes that llama-quantize treats apart."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import VARIANTS, random_weights, write_random_checkpoint, write_safetensors
from tests.formats.writing import write_artifact
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.families import read_decoder
from toolkit.formats.gguf.recipe import GgufQuantization, GgufRecipe

PRECISIONS = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_xs", "q4_0")

# What each case changes in the config of the variant "mha".
SHAPES: Mapping[str, Mapping[str, Any]] = {
    # Rows that are no multiple of 256: other types with smaller blocks.
    "narrow": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3,
               "intermediate_size": 288},
    "narrow_tied": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 3,
                    "intermediate_size": 256, "tie_word_embeddings": True},
    # LongRoPE as in Phi-3.5: the switch at a multiple of 256, to which llama.cpp rounds contexts.
    # 20 factors take 80 bytes, so that what follows must be aligned.
    "long_context": {**VARIANTS["longrope"], "max_position_embeddings": 1024,
                     "original_max_position_embeddings": 256, "partial_rotary_factor": 0.625,
                     "rope_scaling": {"type": "longrope", "original_max_position_embeddings": 256,
                                      "short_factor": [1 + 0.02 * i for i in range(20)],
                                      "long_factor": [1 + 0.15 * i for i in range(20)]}},
    # Enough layers for all of the mix: first and last eighth, every third between.
    "deep": {"num_hidden_layers": 11},
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


@dataclass(frozen=True)
class Written:
    """A case's checkpoint and its artifact in one precision."""

    checkpoint: Checkpoint
    decoder: Decoder
    folder: Path


class Artifacts:
    """Artifacts of all cases, each written when first asked for, once per test process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checkpoints: dict[str, Checkpoint] = {}
        self._written: dict[tuple[str, str], Written] = {}

    def checkpoint(self, case: str) -> Checkpoint:
        """The checkpoint of a case."""
        if case not in self._checkpoints:
            folder = write_case(self._folder / case, case)
            self._checkpoints[case] = Checkpoint.open(folder)
        return self._checkpoints[case]

    def get(self, case: str, precision: str) -> Written:
        """The artifact of a case in one precision."""
        if (case, precision) not in self._written:
            checkpoint = self.checkpoint(case)
            folder = self._folder / f"{case}-{precision}"
            folder.mkdir()
            decoder = read_decoder(checkpoint.config)
            write_artifact(make_recipe(precision, is_long=decoder.rope.is_long), checkpoint, folder)
            written = Written(checkpoint, decoder, folder)
            self._written[case, precision] = written
        return self._written[case, precision]


def make_recipe(precision: str, model: str = "phi-3-test", *, is_long: bool = False) -> GgufRecipe:
    """A recipe of one precision, `a+b` with embedding and head in type b; for long contexts."""
    base, _, ends = precision.partition("+")
    quantization = GgufQuantization(
        precision=base,  # type: ignore[arg-type]
        embedding=ends or None,  # type: ignore[arg-type]
        head=ends or None,  # type: ignore[arg-type]
    )
    return GgufRecipe(
        name=f"x-gguf-{precision}", model=model, title="x", quantization=quantization,
        rope_factors="long" if is_long else "short",
    )  # fmt: skip


_artifacts: list[Artifacts] = []


def share_artifacts(factory: pytest.TempPathFactory) -> Artifacts:
    """The test process's artifacts, for several test files."""
    if not _artifacts:
        _artifacts.append(Artifacts(factory.mktemp("gguf")))
    return _artifacts[0]
