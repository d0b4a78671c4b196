"""A checkpoint's config.json, normalized once: every spelling in, one spelling out.

Follows transformers' Phi3Config and its rope validation: `rope_theta` may stand at the top or in
`rope_parameters`; LongRoPE may be called "su" or "longrope", under `type` or `rope_type`, in
`rope_scaling` or `rope_parameters`.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from toolkit.decoder import Rope
from toolkit.errors import CheckpointError, UnsupportedError

LONGROPE_NAMES = ("longrope", "su")
MAX_COUNT = 1 << 53  # Larger ones do not survive the trip through a float.
MAX_NUMBER = sys.float_info.max


@dataclass(frozen=True)
class Config:
    """The fields of config.json, types checked on reading; `where` names the file in errors."""

    where: str
    fields: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """First name in `architectures`; empty when there is none."""
        names = self.fields.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else ""

    @property
    def model_type(self) -> str:
        """`model_type`, by which families are found."""
        return str(self.fields.get("model_type", ""))

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number > 0; CheckpointError otherwise."""
        value = self.fields.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_COUNT:
            raise self.error(key, value, "a whole number above 0")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; `default` when absent; CheckpointError otherwise."""
        value = self.fields.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number > 0; CheckpointError otherwise."""
        value = self.fields.get(key)
        value = default if value is None else value
        if not _is_positive(value):
            raise self.error(key, value, "a number above 0")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers > 0; CheckpointError otherwise."""
        values = self.fields.get(key)
        allowed = f"a list of {count} numbers above 0"
        if not isinstance(values, list):
            raise self.error(key, values, allowed)
        if len(values) != count:
            raise CheckpointError(
                f"{self.where}: {key}: got {len(values)} values; allowed {allowed}"
            )
        for value in values:
            if not _is_positive(value):
                raise self.error(key, value, allowed)
        return tuple(map(float, values))

    def error(self, key: str, found: object, allowed: str) -> CheckpointError:
        """A CheckpointError that names file, key, found and allowed."""
        return CheckpointError(f"{self.where}: {key}: got {found!r}; allowed {allowed}")


def _is_positive(value: object) -> TypeGuard[float]:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_NUMBER
    )


def read_config(path: Path) -> Config:
    """Read config.json; CheckpointError when it is missing or not a JSON object."""
    return Config(str(path), read_json(path))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError when the file is missing or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing", advice="give --checkpoint a folder as Hugging Face stores a model"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found {type(data).__name__}; allowed a JSON object")
    return data


def normalize_rope(config: Config, head_dim: int) -> Rope:
    """Return the rotary embedding; UnsupportedError names a scaling that is not known.

    Where a value is given twice, the one that transformers 5 uses for Phi-3 wins.
    """
    scaling = _rope_scaling(config)
    kind = scaling.fields.get("rope_type") or scaling.fields.get("type") or "default"
    theta = scaling.number("rope_theta", config.number("rope_theta", 10000.0))
    share = config.number("partial_rotary_factor", 1.0)
    share = scaling.number("partial_rotary_factor", share)
    context = config.integer("max_position_embeddings")
    rotary_dim = int(head_dim * share)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise config.error("partial_rotary_factor", share, f"what makes {head_dim} x it even")
    if kind == "default":
        return Rope(theta, rotary_dim, context)
    if kind not in LONGROPE_NAMES:
        raise UnsupportedError(
            f"{scaling.where}: type: got {kind!r}; supported: none, {', '.join(LONGROPE_NAMES)}"
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


def _rope_scaling(config: Config) -> Config:
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
