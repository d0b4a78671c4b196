"""config.json and generation_config.json as mlx-lm reads them.

mlx-lm's phi3 (mlx_lm/models/phi3.py) knows one spelling of the rotary settings: rope_theta,
partial_rotary_factor and original_max_position_embeddings at the top, LongRoPE under rope_scaling
with `type`. Every spelling of the source becomes that one.
"""

import math
from collections.abc import Mapping
from typing import Any

from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.formats.mlx.modules import list_tensors
from toolkit.formats.mlx.recipe import MlxRecipe
from toolkit.formats.mlx.schemes import Scheme, choose_schemes
from toolkit.overrides import path_of

TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# What is said in another way, or names files that an artifact does not have.
LEFT_OUT = ("_name_or_path", "auto_map", "dtype", "quantization", "quantization_config",
            "rope_parameters", "rope_scaling")  # fmt: skip
SCALE_TOLERANCE = 1e-6  # a rounding in the float64 that config.json holds, no more


def make_config(recipe: MlxRecipe, decoder: Decoder, checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's config.json with the rotary settings, types and quantization of the artifact."""
    source = checkpoint.config.fields
    config = {key: value for key, value in source.items() if key not in LEFT_OUT}
    config |= {
        "eos_token_id": list(checkpoint.stop_ids),
        "torch_dtype": TORCH_DTYPES[recipe.quantization.dtype],
        **_spell_rope(recipe, decoder, source),
    }
    if decoder.experts:  # whose defaults in mlx-lm are others than the source's
        jitter = decoder.experts.jitter
        config |= {"rms_norm_eps": decoder.norm_epsilon, "router_jitter_noise": jitter}
    if decoder.vision:
        config["vision_config"] = {}  # mlx-vlm looks it up; its tower has one size
    if quantization := describe_quantization(recipe, decoder):
        # mlx-lm reads the first; the second is what Hugging Face's pages show.
        config |= {"quantization": quantization, "quantization_config": quantization}
    return config


def make_generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """generation_config.json with every stop id: for mlx-lm it wins over config.json."""
    return {**checkpoint.generation, "eos_token_id": list(checkpoint.stop_ids)}


def describe_quantization(recipe: MlxRecipe, decoder: Decoder) -> dict[str, Any]:
    """Group size and bits of all modules, then of each that differs; empty when none is quantized.

    A module that is not named and has no scales in the file is unquantized for mlx-lm.
    """
    chosen = choose_schemes(recipe, decoder)
    found = ((n, chosen.get(path_of(some[0]))) for n, some in list_tensors(decoder).items())
    schemes = {path_of(name): one for name, one in found if one and one.is_quantized}
    if not schemes:
        return {}
    common = Scheme(recipe.quantization.bits, recipe.quantization.group_size)
    if not common.is_quantized:
        common = next(iter(schemes.values()))
    different = {path: _spell(scheme) for path, scheme in schemes.items() if scheme != common}
    return {**_spell(common), **different}


def check_rope(recipe: MlxRecipe, decoder: Decoder) -> None:
    """PlanError when `rope_factors` does not suit the model, or mlx-lm lacks its rotary scale."""
    rope, where = decoder.rope, f"{recipe.name}: rope_factors"
    if not rope.is_long:
        if recipe.rope_factors:
            raise PlanError(
                f"{where}: got {recipe.rope_factors!r}; this model has no LongRoPE; allowed none"
            )
        return
    if not recipe.rope_factors:
        raise PlanError(
            f"{where}: missing; this model has LongRoPE, and mlx-lm one list of factors for all "
            f"lengths; allowed short (up to {rope.original_context} tokens) or long (beyond)"
        )
    wanted = rope.short_scale if recipe.rope_factors == "short" else rope.long_scale
    if decoder.experts:  # whose model in mlx-lm takes the scale from the configuration
        return
    computed = _scale_of_mlx_lm(decoder.context, rope.original_context)
    if abs(wanted - computed) > SCALE_TOLERANCE:
        raise PlanError(
            f"{recipe.name}: mlx-lm computes LongRoPE's scale from the contexts, {computed:.6g}; "
            f"this model has {wanted:.6g} for its {recipe.rope_factors} factors"
        )


def _scale_of_mlx_lm(context: int, original: int) -> float:
    """SuScaledRoPE in mlx_lm/models/rope_utils.py."""
    factor = context / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _spell(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}


def _spell_rope(recipe: MlxRecipe, decoder: Decoder, source: Mapping[str, Any]) -> dict[str, Any]:
    rope = decoder.rope
    scaling = source.get("rope_scaling") or source.get("rope_parameters") or {}
    share = scaling.get("partial_rotary_factor", source.get("partial_rotary_factor"))
    spelled: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if share is not None:
        spelled["partial_rotary_factor"] = share
    if rope.short_factors:
        short = list(rope.short_factors)
        is_one = recipe.rope_factors == "short" or not rope.is_long
        spelled["original_max_position_embeddings"] = rope.original_context
        spelled["rope_scaling"] = {
            # The same for mlx-lm and mlx-vlm; transformers, which reads this file for its
            # tokenizer's sake, knows no phi3_v, and fails on longrope then.
            "type": "su" if decoder.vision else "longrope",
            # For transformers, which reads the file for its tokenizer's sake and prints a page
            # about a missing factor; it is what it would compute.
            "factor": decoder.context / rope.original_context,
            "short_factor": short,
            "long_factor": short if is_one else list(rope.long_factors),
        }
        if decoder.experts:
            scale = rope.short_scale if recipe.rope_factors == "short" else rope.long_scale
            spelled["rope_scaling"] |= {"short_mscale": scale, "long_mscale": scale}
    return spelled
