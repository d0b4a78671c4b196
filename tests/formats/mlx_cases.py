"""Recipes and artifacts for MLX tests."""

from pathlib import Path
from typing import Any

from tests.checkpoints import random_weights, write_safetensors
from tests.formats.writing import write_artifact
from tests.golden.make_mlx import write_case
from toolkit.checkpoint import Checkpoint
from toolkit.families import read_decoder
from toolkit.formats.mlx.recipe import MlxOverride, MlxQuantization, MlxRecipe

# As the golden schemes are called.
SCHEMES: dict[str, dict[str, Any]] = {
    "bf16": {"bits": 16},
    **{
        f"{bits}bit-group{size}": {"bits": bits, "group_size": size}
        for bits in (2, 3, 4, 5, 6, 8)
        for size in (32, 64, 128)
    },
    "mixed_4_6": {"bits": 4, "sensitive_bits": 6},
    "mixed_3_6": {"bits": 3, "sensitive_bits": 6},
}


def make_recipe(
    scheme: str, checkpoint: Checkpoint, rope_factors: str | None = None, **changes: Any
) -> MlxRecipe:
    """A recipe of one scheme that suits the checkpoint; with LongRoPE its short factors."""
    is_long = read_decoder(checkpoint.config).rope.is_long
    factors = rope_factors or ("short" if is_long else None)
    settings = {**SCHEMES[scheme], **changes}
    overrides = {k: MlxOverride(**v) for k, v in settings.pop("overrides", {}).items()}
    return MlxRecipe(
        name="x", model="tiny-phi3", title="x", provider="cpu",
        rope_factors=factors,  # type: ignore[arg-type]
        context_length=64 if factors == "short" else None,
        quantization=MlxQuantization(overrides=overrides, **settings),
    )  # fmt: skip


def write(folder: Path, recipe: MlxRecipe, checkpoint: Checkpoint, workers: int = 1) -> Path:
    """Write an artifact's files into a new folder and return it."""
    folder.mkdir()
    write_artifact(recipe, checkpoint, folder, workers)
    return folder


class Checkpoints:
    """One small random checkpoint of each case, written when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, Checkpoint] = {}

    def get(self, case: str, dtype: str = "bf16") -> Checkpoint:
        """The checkpoint of a case, its weights in bf16 or, from the same noise, in `dtype`."""
        key = f"{case}-{dtype}"
        if key not in self._opened:
            folder = write_case(self._folder / key, case)
            checkpoint = Checkpoint.open(folder)
            if dtype != "bf16":
                weights = random_weights(checkpoint.config.fields)
                write_safetensors(folder / "model.safetensors", weights, dtype)  # type: ignore[arg-type]
                checkpoint = Checkpoint.open(folder)
            self._opened[key] = checkpoint
        return self._opened[key]
