"""The rotary embedding that a config.json describes: every spelling in, one description out.

Follows transformers' modeling_rope_utils: `rope_theta` may stand at the top or in
`rope_parameters`; LongRoPE may be called "su" or "longrope", under `type` or `rope_type`, in
`rope_scaling` or `rope_parameters`. "linear" and "llama3" divide frequencies by constants, which is
one list of factors for every length.
"""

import math

import numpy as np

from toolkit.checkpoint.config import Config
from toolkit.decoder import Rope
from toolkit.errors import UnsupportedError

LONGROPE_NAMES = ("longrope", "su")
MAX_ROTARY = 1 << 16  # far above any model's: a damaged number must not fill the memory
NAMES = ("none", "linear", "llama3", *LONGROPE_NAMES)


def normalize_rope(config: Config, head_dim: int) -> Rope:
    """Return the rotary embedding; UnsupportedError names a scaling that is not known.

    Where a value is given twice, the one that transformers 5 uses for Phi-3 wins.
    """
    scaling = read_scaling(config)
    kind = scaling.fields.get("rope_type") or scaling.fields.get("type") or "default"
    theta = scaling.number("rope_theta", config.number("rope_theta", 10000.0))
    share = config.number("partial_rotary_factor", 1.0)
    share = scaling.number("partial_rotary_factor", share)
    context = config.integer("max_position_embeddings")
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise config.error("partial_rotary_factor", share, f"what makes {head_dim} x it even")
    if rotary_dim > MAX_ROTARY:
        raise config.error("head_dim", head_dim, f"{MAX_ROTARY} or less")
    if kind == "default":
        return Rope(theta, rotary_dim, context)
    if kind == "linear":
        factor = scaling.number("factor")
        return Rope(theta, rotary_dim, context, short_factors=(factor,) * (rotary_dim // 2))
    if kind == "llama3":
        factors = _list_llama3(scaling, theta, rotary_dim, _original_context(config, scaling))
        return Rope(theta, rotary_dim, context, short_factors=factors)
    if kind not in LONGROPE_NAMES:
        raise UnsupportedError(
            f"{scaling.where}: type: got {kind!r}; supported: {', '.join(NAMES)}",
            advice="none that depends on the length of a text is; where the model was trained "
            "without the scaling, remove it from config.json and set max_position_embeddings to "
            "the context that it was trained with",
        )
    inside = scaling.fields.get("original_max_position_embeddings")
    original = config.integer("original_max_position_embeddings", inside)
    if original < 2:
        raise config.error("original_max_position_embeddings", original, "2 or more")
    scale = _attention_scale(scaling, context, original)
    return Rope(
        theta=theta,
        rotary_dim=rotary_dim,
        original_context=original,
        short_factors=scaling.numbers("short_factor", rotary_dim // 2),
        long_factors=scaling.numbers("long_factor", rotary_dim // 2),
        short_scale=scaling.number("short_mscale", scale),
        long_scale=scaling.number("long_mscale", scale),
    )


def read_scaling(config: Config) -> Config:
    """`rope_scaling` where it says something, else `rope_parameters`, else nothing."""
    for key in ("rope_scaling", "rope_parameters"):
        value = config.fields.get(key)
        if value is not None and not isinstance(value, dict):
            raise config.error(key, value, "a mapping or null")
        if value:
            scaling = Config(f"{config.where}: {key}", value)
            for inner, settings in value.items():
                if isinstance(settings, dict):
                    raise scaling.error(inner, settings, "one setting for all layers")
            return scaling
    return Config(f"{config.where}: rope_scaling", {})


def _attention_scale(scaling: Config, context: int, original: int) -> float:
    """LongRoPE's factor on cos and sin (Ding et al. 2024, as in transformers)."""
    if scaling.fields.get("attention_factor") is not None:
        return scaling.number("attention_factor")
    factor = scaling.number("factor", context / original)
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _original_context(config: Config, scaling: Config) -> int:
    """The context before scaling; the one at the top counts first, as in transformers."""
    inside = scaling.fields.get("original_max_position_embeddings")
    context = config.integer("max_position_embeddings")
    default = context if inside is None else scaling.integer("original_max_position_embeddings")
    return config.integer("original_max_position_embeddings", default)


def _list_llama3(
    scaling: Config, theta: float, rotary_dim: int, original: int
) -> tuple[float, ...]:
    """What Llama 3.1 divides each frequency by: long waves by `factor`, short ones by 1.

    float32 at every step, as transformers' _compute_llama3_parameters.
    """
    low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
    if high <= low:
        raise scaling.error("high_freq_factor", high, f"more than low_freq_factor, {low}")
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    with np.errstate(all="ignore"):  # numbers beyond float32 are refused below
        factor = np.float32(scaling.number("factor"))
        steps = np.power(theta, exponents, dtype=np.float64).astype(np.float32)
        waves = np.float32(2 * math.pi) * steps
        smooth = (np.float32(original) / waves - np.float32(low)) / np.float32(high - low)
        share = (1 - smooth) / factor + smooth
        is_long, is_short = waves > original / low, waves < original / high
        found = np.where(is_long, factor, np.where(is_short, np.float32(1), 1 / share))
    if not np.isfinite(found).all():
        raise scaling.error("factor", float(factor), "what leaves every frequency finite")
    return tuple(float(one) for one in found.astype(np.float32))
