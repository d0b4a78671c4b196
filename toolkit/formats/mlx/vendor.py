"""The vendor's way: mlx_lm.convert."""

from typing import cast

from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.formats.mlx import layout
from toolkit.formats.mlx.config import TORCH_DTYPES
from toolkit.formats.mlx.reader import dequantize
from toolkit.formats.mlx.recipe import MlxRecipe
from toolkit.formats.mlx.schemes import UNQUANTIZED
from toolkit.recipe import Recipe
from toolkit.vendor import Command, Export, Places, Vendor, measure_bf16

__all__ = ["VENDOR", "dequantize", "plan_export"]  # its files read back like ours

VENDOR = Vendor(
    name="mlx",
    title="mlx_lm.convert",
    packages=("mlx-lm", "mlx", "transformers"),
    modules=("mlx.core", "mlx_lm.convert"),
)
# 3.1 GB for 7.64 GB of bf16 weights.
MEMORY_FACTOR = 0.4
BASE_BYTES = 300_000_000
SHARD_BYTES = 5 << 30  # beyond it mlx-lm writes several files
# mlx-lm's mixed recipes, as (bits, sensitive_bits)
MIXES = {(2, 6), (3, 4), (3, 6), (4, 6)}


def plan_export(recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, places: Places) -> Export:
    """mlx-lm's command; PlanError when it has no option for what the recipe asks."""
    recipe = cast(MlxRecipe, recipe)
    if layout.lay_out(recipe, decoder).size_bytes > SHARD_BYTES:
        raise _beyond(recipe, "an artifact of more than 5 GiB comes in several files")
    if recipe.rope_factors == "short":
        raise _beyond(recipe, "rope_factors: short; mlx-lm always takes the long ones")
    result = places.scratch / "result"  # it refuses a folder that is there
    argv = (
        places.python, "-m", "mlx_lm", "convert", "--hf-path", str(checkpoint.folder),
        "--mlx-path", str(result), "--dtype", TORCH_DTYPES[recipe.quantization.dtype],
        *_quantization_options(recipe),
    )  # fmt: skip
    return Export(
        commands=(Command("mlx_lm.convert", argv),),
        memory_bytes=BASE_BYTES + round(MEMORY_FACTOR * measure_bf16(checkpoint)),
        result=result,
    )


def _quantization_options(recipe: MlxRecipe) -> list[str]:
    wanted = recipe.quantization
    if wanted.overrides or wanted.embedding_bits or wanted.head_bits:
        raise _beyond(recipe, "quantization.overrides, embedding_bits and head_bits")
    if wanted.bits == UNQUANTIZED:
        return []
    options = ["-q", "--q-bits", str(wanted.bits), "--q-group-size", str(wanted.group_size)]
    if wanted.sensitive_bits:
        if (wanted.bits, wanted.sensitive_bits) not in MIXES:
            raise _beyond(recipe, f"{wanted.bits} bits mixed with {wanted.sensitive_bits}")
        options += ["--quant-predicate", f"mixed_{wanted.bits}_{wanted.sensitive_bits}"]
    return options


def _beyond(recipe: MlxRecipe, what: str) -> PlanError:
    return PlanError(
        f"{recipe.name}: mlx_lm.convert cannot do this: {what}", advice="use `engine: native`"
    )
