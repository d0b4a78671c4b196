"""The support matrix: model by format by precision by target, of recipes, plans and families."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import msgspec

from toolkit import catalog, formats
from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder
from toolkit.errors import PhishipError
from toolkit.families import find_family, read_decoder
from toolkit.plan import Plan, find_problem, fit_shorter, make_plan
from toolkit.recipe import Recipe
from toolkit.target import Target


@dataclass(frozen=True)
class Cell:
    """A model in a format: its recipes and what was verified, or why there is none."""

    model: str
    format: str
    recipes: tuple[str, ...] = ()
    verified: str = ""
    test: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Fit:
    """A model on a target: the recipes that run and fit there, or what is in the way.

    `shorter` is a recipe that would fit with a shorter context, with that context.
    """

    model: str
    target: str
    recipes: tuple[str, ...] = ()
    shorter: str = ""
    problem: str = ""


def list_cells(models: Sequence[str]) -> list[Cell]:
    """Every model in every format."""
    return [_make_cell(model, kind) for model in models for kind in formats.names()]


def list_fits(models: Sequence[str]) -> list[Fit]:
    """Every model on every target, with the contexts that the recipes say."""
    targets = [catalog.load_target(name) for name in catalog.names("targets")]
    return [_make_fit(model, target) for target in targets for model in models]


def list_models() -> list[str]:
    """The published models; the bundled example is none."""
    names = catalog.names("models")
    return [name for name in names if catalog.load_model(name).revision != "local"]


@cache
def _decoder(model: str) -> Decoder:
    return read_decoder(_config(model))


def _config(model: str) -> Config:
    return Config(f"models/{model}.yaml", catalog.load_model(model).config)


@cache
def _plans(model: str) -> tuple[Plan, ...]:
    """The plans of a model's recipes, first choices first."""
    recipes = sorted(catalog.load_recipes(model), key=lambda recipe: not recipe.first_choice)
    return tuple(make_plan(recipe, _decoder(model)) for recipe in recipes)


def _make_cell(model: str, kind: str) -> Cell:
    names = tuple(plan.recipe.name for plan in _plans(model) if plan.recipe.format == kind)
    if not names:
        return Cell(model, kind, refusal=_find_refusal(model, kind))
    verified = find_family(_config(model)).VERIFIED[kind]
    return Cell(model, kind, names, verified.words, verified.test)


def _find_refusal(model: str, kind: str) -> str:
    """What planning says when the model is asked for in a format that it has no recipe for."""
    try:
        make_plan(_borrow_recipe(model, kind), _decoder(model))
    except PhishipError as error:
        said = str(error).split(": ", 1)[-1]
        return f"{said}; {error.advice}" if error.advice else said
    return "can be planned; no recipe is bundled"


def _borrow_recipe(model: str, kind: str) -> Recipe:
    """A first choice of the format from another model, as one of this model."""
    recipes = map(catalog.load_recipe, catalog.names("recipes"))
    found = next(one for one in recipes if one.format == kind and one.first_choice)
    return msgspec.structs.replace(found, name=model, model=model, context_length=None)


def _make_fit(model: str, target: Target) -> Fit:
    plans = _plans(model)
    names = tuple(plan.recipe.name for plan in plans if not find_problem(plan, target))
    if names:
        return Fit(model, target.name, names)
    shorter = next((words for plan in plans if (words := fit_shorter(plan, target))), "")
    runs = [plan for plan in plans if f"{plan.recipe.format}/{plan.needs.provider}" in target.runs]
    if not runs:
        return Fit(model, target.name, problem=f"{target.name} runs {', '.join(target.runs)} only")
    smallest = min(runs, key=lambda plan: plan.device_memory_bytes)
    return Fit(model, target.name, shorter=shorter, problem=find_problem(smallest, target))


def render_markdown() -> str:
    """docs/support.md."""
    models = list_models()
    cells, fits = list_cells(models), list_fits(models)
    refused = [cell for cell in cells if not cell.recipes]
    parts = [
        _HEAD,
        "## Models and formats\n",
        _table(["model", *formats.names()], _rows(models, cells)),
        *(["## What is refused\n", _table(["model", "format", "because"], (
            [cell.model, cell.format, cell.refusal] for cell in refused
        ))] if refused else []),
        "## How it was verified\n",
        _table(["models", "format", "what was compared", "by"], _evidence(cells)),
        "## Targets\n",
        *(_describe(name, fits) for name in catalog.names("targets")),
    ]  # fmt: skip
    return "\n".join(parts)


_HEAD = """# What is supported

Written by `phiship list support --markdown` from the recipes, plans and families of this version; a
test compares. Nothing here was run with real Phi weights: what was compared is random checkpoints
of each architecture, in each format's own runtime.
"""


def _rows(models: Sequence[str], cells: Sequence[Cell]) -> Iterable[list[str]]:
    found = {(cell.model, cell.format): cell for cell in cells}
    for model in models:
        yield [model, *(_shorten(found[model, kind]) for kind in formats.names())]


def _shorten(cell: Cell) -> str:
    prefix = f"{cell.model}-{cell.format}-"
    return ", ".join(name.removeprefix(prefix) for name in cell.recipes) or "refused"


def _evidence(cells: Sequence[Cell]) -> Iterable[list[str]]:
    """Models that the same evidence stands for together."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        if cell.recipes:
            found.setdefault((cell.format, cell.verified, cell.test), []).append(cell.model)
    for (kind, words, test), models in found.items():
        yield [", ".join(models), kind, words, f"`{test}`"]


def _describe(name: str, fits: Sequence[Fit]) -> str:
    target = catalog.load_target(name)
    rows = [
        [fit.model, ", ".join(one.removeprefix(f"{fit.model}-") for one in _list(fit))]
        for fit in fits
        if fit.target == name
    ]
    head = f"### {target.title} (`{name}`)\n\nVerified: {target.verified}\n"
    return "\n".join([head, _table(["model", "recipes that fit"], rows)])


def _list(fit: Fit) -> Sequence[str]:
    return fit.recipes or [fit.shorter or f"no: {fit.problem}"]


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
