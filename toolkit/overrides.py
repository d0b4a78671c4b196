"""Overrides: what a recipe says of single matrices, by patterns of their module paths.

A path is a tensor's name in the checkpoint without `.weight`, whatever the format calls it; `*`
stands for anything, and of several patterns that match one path the last counts.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import msgspec

from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.recipe import Recipe

Setting = TypeVar("Setting")


def path_of(name: str) -> str:
    """The module that a tensor of the checkpoint belongs to."""
    return name.removesuffix(".weight")


def list_matrices(decoder: Decoder) -> list[str]:
    """Matrices whose type can be chosen, in order of use; a tied head is the embedding.

    A router is none of them: what it picks may turn on its last bits.
    """
    matrices = (name for name, shape in decoder.shapes().items() if len(shape) == 2)
    return [name for name in matrices if decoder.kind_of(name) != "router"]


def overrides_of(recipe: Recipe) -> dict[str, Any]:
    """A recipe's overrides; every format's quantization is a struct of its own that has them."""
    found: dict[str, Any] = recipe.quantization.overrides  # type: ignore[attr-defined]
    return found


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """The same recipe with other overrides."""
    quantization = msgspec.structs.replace(recipe.quantization, overrides=dict(overrides))
    return msgspec.structs.replace(recipe, quantization=quantization)


def resolve(overrides: Mapping[str, Setting], decoder: Decoder) -> dict[str, Setting]:
    """What the overrides say, by the names of the matrices that they match."""
    found: dict[str, Setting] = {}
    for pattern, setting in overrides.items():
        found |= dict.fromkeys(_match(pattern, list_matrices(decoder)), setting)
    return found


def check_patterns(where: str, overrides: Iterable[str], decoder: Decoder) -> None:
    """PlanError when a pattern matches no matrix; `where` names the recipe and the key."""
    for pattern in overrides:
        if not _match(pattern, list_matrices(decoder)):
            raise PlanError(
                f"{where}: {pattern!r} matches no module; this model has "
                f"{', '.join(_spell(decoder))}"
            )


def _match(pattern: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if fnmatchcase(path_of(name), pattern)]


def _spell(decoder: Decoder) -> list[str]:
    """Every kind of matrix once, `*` for the layer."""
    names = decoder.names
    per_layer = (pattern for pattern, kind in decoder.kinds.items() if kind != "router")
    outer = dict.fromkeys((names.embedding, decoder.head_name))
    return [path_of(name.format("*", "*")) for name in (*outer, *per_layer)]
