"""Adapt: recipes as a build is asked to change them: engine, way to choose codes, a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.budget import Budget, fit_budget
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.merged import find_adapter
from toolkit.console import Console
from toolkit.errors import PlanError, SettingsError
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.recipe import Engine, Method, Recipe
from toolkit.report import Report


@dataclass(frozen=True)
class Wanted:
    """What is asked instead of what recipes say; None keeps that.

    `calibration` is a text for choosing codes, and for the budget, which goes with one recipe.
    `adapter_apart` leaves the checkpoint's adapter a file of its own, as a recipe can too.
    """

    engine: Engine | None = None
    method: Method | None = None
    equalize: bool | None = None
    calibration: Path | None = None
    budget: Budget | None = None
    adapter_apart: bool = False


def adapt_recipes(
    recipes: Sequence[Recipe], checkpoint: Checkpoint, wanted: Wanted, console: Console,
    report: Report, context_length: int | None = None,
) -> list[Recipe]:  # fmt: skip
    """Change recipes as wanted; PlanError when one cannot be, or cannot keep the budget."""
    engine = wanted.engine
    changed = [one.with_engine(engine) if engine else one for one in recipes]
    if wanted.adapter_apart:
        changed = [one.with_adapter_apart() for one in changed]
    changed = _choose_codes(changed, checkpoint, wanted, console)
    if wanted.budget is None:
        return changed
    (recipe,) = changed
    if recipe.adapter_apart:
        raise PlanError(
            f"{recipe.name}: adapter_apart: a budget would choose the bits for the checkpoint with "
            "its adapter merged, and the weights would no longer be those without it",
            advice="build the checkpoint alone with the budget, and write the overrides that it "
            "names into a recipe",
        )
    mix = fit_budget(
        recipe, checkpoint, wanted.budget, console, report, context_length=context_length,
        text=wanted.calibration,
    )  # fmt: skip
    return [mix.recipe]


def _choose_codes(
    recipes: Sequence[Recipe], checkpoint: Checkpoint, wanted: Wanted, console: Console
) -> list[Recipe]:
    """Have codes chosen another way; of several recipes those without codes stay as they are.

    SettingsError when a calibration text is given that none of them takes.
    """
    decoder, adapter = read_decoder(checkpoint.config), find_adapter(checkpoint)
    chosen = []
    for recipe in recipes:
        changed = recipe.with_codes(wanted.method, wanted.equalize)
        can_equalize = not (decoder.specials or recipe.adapter_apart)
        if wanted.method == "gptq" and wanted.equalize is None and can_equalize:
            changed = changed.with_equalization()
        if changed != recipe:
            try:
                make_plan(changed, decoder, adapter=adapter)
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
