"""Recipes, targets and models by name (bundled) or by path (the user's own)."""

import difflib
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from toolkit import formats, yamlfile
from toolkit.decoder import Decoder
from toolkit.errors import SettingsError
from toolkit.model import Model
from toolkit.recipe import Recipe
from toolkit.target import Target

T = TypeVar("T")


def load_recipe(name: str) -> Recipe:
    """Load a recipe by name or path; SettingsError when it is unknown or wrong."""
    recipe: Recipe = _load("recipes", name, _any_recipe())
    if recipe.adapter is None:
        return recipe
    adapter = str(Path(name).parent / Path(recipe.adapter).expanduser())
    return msgspec.structs.replace(recipe, adapter=adapter)


@cache
def load_recipes(model: str) -> tuple[Recipe, ...]:
    """Every bundled recipe of a model, in order of name."""
    prefix = f"{model}-"  # recipes are named <model>-<format>-...
    found = [load_recipe(name) for name in names("recipes") if name.startswith(prefix)]
    return tuple(recipe for recipe in found if recipe.model == model)


def find_recipes(model: str, decoder: Decoder) -> tuple[Recipe, ...]:
    """A model's bundled recipes; of one that is not bundled those for any model, as its own."""
    if model in names("models"):
        return load_recipes(model)
    return tuple(recipe.bind(model, decoder) for recipe in _load_general_recipes())


@cache
def _load_general_recipes() -> tuple[Recipe, ...]:
    """The bundled recipes for any model, in order of name."""
    found = (load_recipe(name) for name in names("recipes") if name.startswith(_list_formats()))
    return tuple(recipe for recipe in found if not recipe.model)


def _list_formats() -> tuple[str, ...]:
    return tuple(formats.names())


@cache
def _any_recipe() -> Any:
    """The union of the recipes of all formats."""
    return reduce(or_, [formats.get(name).RECIPE for name in formats.names()])


def load_target(name: str) -> Target:
    """Load a target by name or path; SettingsError when it is unknown or wrong."""
    return _load("targets", name, Target)


def load_model(name: str) -> Model:
    """Load a model by name or path; SettingsError when it is unknown or wrong."""
    return _load("models", name, Model)


def names(kind: str) -> list[str]:
    """Names of the bundled files of a kind: recipes, targets or models."""
    return sorted(path.stem for path in folder(kind).glob("*.yaml"))


@cache
def folder(kind: str) -> Path:
    """The folder of bundled files: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    bundled = package / "data" / kind
    return bundled if bundled.is_dir() else package.parent / kind


def _load(kind: str, name: str, struct: type[T]) -> T:
    is_path = name.endswith((".yaml", ".yml")) or "/" in name
    path = Path(name) if is_path else folder(kind) / f"{name}.yaml"
    if not is_path and not path.is_file():
        close = difflib.get_close_matches(name, names(kind), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else ""
        raise SettingsError(
            f"{name!r} is not one of the bundled {kind}",
            advice=f"{hint} `phiship list` shows all; a path to a .yaml file works too".strip(),
        )
    return yamlfile.load(path, struct, given={"name": path.stem})
