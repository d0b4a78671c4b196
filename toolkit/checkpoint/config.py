"""A checkpoint's config.json, normalized once: every spelling in, one spelling out.

Follows transformers' Phi3Config and its rope validation: `rope_theta` may stand at the top or in
`rope_parameters`; LongRoPE may be called "su" or "longrope", under `type` or `rope_type`, in
`rope_scaling` or `rope_parameters`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.decoder import Rope
from toolkit.errors import CheckpointError, UnsupportedError

LONGROPE_NAMES = ("longrope", "su")


@dataclass(frozen=True)
class Config:
    """The fields of config.json, types checked on reading; `where` names the file in errors."""

    where: str
    fields: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """First name in `architectures`; empty when there is none."""
        names = self.fields.get("architectures") or [""]
        return str(names[0])

    @property
    def model_type(self) -> str:
        """`model_type`, by which families are found."""
        return str(self.fields.get("model_type", ""))

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number > 0; CheckpointError otherwise."""
        value = self.fields.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise self.error(key, value, "a whole number above 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number > 0; CheckpointError otherwise."""
        value = self.fields.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(key, value, "a number above 0")
        return float(value)

    def error(self, key: str, found: object, allowed: str) -> CheckpointError:
        """A CheckpointError that names file, key, found and allowed."""
        return CheckpointError(f"{self.where}: {key}: got {found!r}; allowed {allowed}")


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
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found {type(data).__name__}; allowed a JSON object")
    return data


def normalize_rope(config: Config, head_dim: int) -> Rope:
    """Return the rotary embedding; UnsupportedError names a scaling that is not known."""
    settings = _rope_settings(config)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    theta = config.fields.get("rope_theta") or settings.get("rope_theta") or 10000.0
    factor = config.fields.get("partial_rotary_factor") or settings.get("partial_rotary_factor")
    context = config.integer("max_position_embeddings")
    original = config.fields.get("original_max_position_embeddings")
    original = original or settings.get("original_max_position_embeddings") or context
    rotary_dim = int(head_dim * (factor or 1.0))
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise config.error("partial_rotary_factor", factor, f"what makes {head_dim} x it even")
    if kind == "default":
        return Rope(float(theta), rotary_dim, context)
    if kind not in LONGROPE_NAMES:
        raise UnsupportedError(
            f"{config.where}: rope_scaling: got type {kind!r}; "
            f"supported: none, {', '.join(LONGROPE_NAMES)}"
        )
    scale = settings.get("attention_factor") or _attention_scale(context, int(original))
    return Rope(
        theta=float(theta),
        rotary_dim=rotary_dim,
        original_context=int(original),
        short_factors=_factors(config, settings, "short_factor", rotary_dim // 2),
        long_factors=_factors(config, settings, "long_factor", rotary_dim // 2),
        short_scale=float(settings.get("short_mscale") or scale),
        long_scale=float(settings.get("long_mscale") or scale),
    )


def _rope_settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = config.fields.get(key)
        if value is not None and not isinstance(value, dict):
            raise config.error(key, value, "a mapping or null")
        settings |= value or {}
    return settings


def _attention_scale(context: int, original: int) -> float:
    """LongRoPE's factor on cos and sin (Ding et al. 2024, as in transformers)."""
    if context <= original:
        return 1.0
    return math.sqrt(1 + math.log(context / original) / math.log(original))


def _factors(
    config: Config, settings: Mapping[str, Any], key: str, count: int
) -> tuple[float, ...]:
    values = settings.get(key)
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, list) else repr(values)
        raise CheckpointError(
            f"{config.where}: rope_scaling.{key}: got {found}; allowed a list of {count} numbers"
        )
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in values):
        raise CheckpointError(f"{config.where}: rope_scaling.{key}: allowed numbers above 0")
    return tuple(map(float, values))
