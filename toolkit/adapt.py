"""Adapt: recipes as a build is asked to change them: engine, way to choose codes, a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.budget import Budget, fit_budget
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.decoder import Decoder
from toolkit.errors import PlanError, SettingsError
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.recipe import Engine, Method, Recipe
from toolkit.report import Report


@dataclass(frozen=True)
class Wanted:
    """What is asked instead of what recipes say; None keeps that.

    `calibration` is a text for choosing codes, and for the budget, which goes with one recipe.
    """

    engine: Engine | None = None
    method: Method | None = None
    equalize: bool | None = None
    calibration: Path | None = None
    budget: Budget | None = None


def adapt_recipes(
    recipes: Sequence[Recipe], checkpoint: Checkpoint, wanted: Wanted, console: Console,
    report: Report, context_length: int | None = None,
) -> list[Recipe]:  # fmt: skip
    """Change recipes as wanted; PlanError when one cannot be, or cannot keep the budget."""
    engine = wanted.engine
    changed = [one.with_engine(engine) if engine else one for one in recipes]
    changed = _choose_codes(changed, read_decoder(checkpoint.config), wanted, console)
    if wanted.budget is None:
        return changed
    (recipe,) = changed
    mix = fit_budget(
        recipe, checkpoint, wanted.budget, console, report, context_length=context_length,
        text=wanted.calibration,
    )  # fmt: skip
    return [mix.recipe]


def _choose_codes(
    recipes: Sequence[Recipe], decoder: Decoder, wanted: Wanted, console: Console
) -> list[Recipe]:
    """Have codes chosen another way; of several recipes those without codes stay as they are.

    SettingsError when a calibration text is given that none of them takes.
    """
    chosen = []
    for recipe in recipes:
        changed = recipe.with_codes(wanted.method, wanted.equalize)
        if changed != recipe:
            try:
                make_plan(changed, decoder)
            except PlanError as error:
                if len(recipes) == 1:
                    raise
                console.note(f"{error}; its recipe is taken as it is")
                changed = recipe
        chosen.append(changed)
    takes_text = wanted.budget or any(one.quantization.is_calibrated for one in chosen)
    if wanted.calibration and not takes_text:
        raise SettingsError(
            f"--calibration {wanted.calibration}: what is built chooses no codes on a text",
            advice="give --method gptq or --equalize too",
        )
    return chosen
