"""A checkpoint's config.json: its fields, checked for their types as they are read."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from toolkit.errors import CheckpointError

# What transformers' AutoModelForCausalLM makes of a model_type, whatever `architectures` says.
CAUSAL_MODELS: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phimoe": "PhiMoEForCausalLM",
}
MAX_COUNT = 1 << 53  # Larger ones do not survive the trip through a float.
MAX_NUMBER = sys.float_info.max


@dataclass(frozen=True)
class Config:
    """The fields of config.json, types checked on reading; `where` names the file in errors."""

    where: str
    fields: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """The model class to read; empty when nothing names one.

        As in transformers `model_type` decides between several names, and where there is none.
        """
        found = self.fields.get("architectures") or []
        if not isinstance(found, list):
            return ""
        names = [str(name) for name in found]
        causal = CAUSAL_MODELS.get(self.model_type, "")
        if not names or causal in names or names[0] in CAUSAL_MODELS.values():
            return causal or (names[0] if names else "")
        return names[0]

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
