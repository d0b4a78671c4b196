"""Budget: bits for each matrix, so that an artifact is as good as its size allows, or the reverse.

Every matrix starts in the smallest type that the recipe's overrides can give it; then bytes go
where they save most (mixing.py says how much). What comes out is a recipe with overrides.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from toolkit.checkpoint import Checkpoint
from toolkit.console import Console, format_bytes
from toolkit.errors import PlanError
from toolkit.families import read_decoder
from toolkit.mixing import Mix, Mixture, Options, Steps
from toolkit.overrides import overrides_of, path_of, resolve
from toolkit.quality.gate import round_up
from toolkit.recipe import Recipe
from toolkit.report import Report

# `check` reads another text, over whose tokens the mean differs by some hundredths.
MARGIN = 0.9
# What runtimes add by rounding activations to 8 bits, measured with mixes of the bundled example.
ROUNDING_KL = {"gguf": 6e-4, "onnx": 2e-4}
ENOUGH = 0.9  # of the allowed KL: nearer to it is not worth another round
ROUNDS = 4
LEAST_KL = 1e-12
PADDING_BYTES = 4096  # of a tensor, at most
OWN_TYPE = "the recipe's own type"


@dataclass(frozen=True)
class Budget:
    """What an artifact may take: bytes of all its files, or a mean KL in nats a token; one."""

    size_bytes: int | None = None
    kl: float | None = None


def fit_budget(
    recipe: Recipe,
    checkpoint: Checkpoint,
    budget: Budget,
    console: Console,
    report: Report,
    *,
    context_length: int | None = None,
    text: Path | None = None,
) -> Mix:
    """Choose the recipe's overrides within the budget; a KL is also the new limit of its gate.

    What the recipe's own overrides say stays. `text` is the user's, instead of a part of Python's
    manual that neither the gate nor `check` reads. PlanError when there is nothing to choose, or
    the budget cannot be met: it says what can.
    """
    decoder = read_decoder(checkpoint.config)
    checkpoint.check(decoder)
    with report.step("mix") as step:
        mixture = Mixture(recipe, checkpoint, decoder, context_length, text, console)
        if budget.size_bytes is not None:
            mix = spend(mixture, budget.size_bytes)
        else:
            mix = reach(mixture, budget.kl or 0.0)
        names = name_choices(mix.recipe, mixture)
        counts = [f"{kind}: {len(some)} of the matrices" for kind, some in names.items()]
        step.measured = "\n".join(
            [
                format_bytes(mix.size_bytes),
                f"predicted mean KL {mix.kl:.3g}, on the gate's text {mix.gate_kl:.3g}",
                *counts,
            ]
        )
    most_kl = mixture.smallest.limits.max_kl or math.inf
    if mix.gate_kl > most_kl:
        console.note(
            f"the gate may refuse it: predicted is a mean KL of {mix.gate_kl:.3g}, its limit "
            f"{most_kl:g}"
        )
    for kind, some in names.items():
        if kind != OWN_TYPE:
            console.note(f"{kind}: {', '.join(some)}")
    overrides = msgspec.to_builtins(overrides_of(mix.recipe))
    console.event(
        "mix", size_bytes=mix.size_bytes, kl=mix.kl, gate_kl=mix.gate_kl, overrides=overrides
    )
    return mix


def spend(mixture: Mixture, size_bytes: int) -> Mix:
    """The best mix of so many bytes; PlanError when the smallest takes more."""
    least = mixture.smallest.artifact_bytes
    if least > size_bytes:
        raise PlanError(
            f"--max-size {format_bytes(size_bytes)}: the smallest mix of {mixture.recipe.name} "
            f"takes {least} bytes",
            advice=f"give --max-size {-(-least // 1000)}kB or more, or a recipe of fewer bits",
        )
    # Padding between tensors moves with them, so their bytes add up to some more or less.
    spare_bytes = size_bytes - least + PADDING_BYTES * len(mixture.options)
    while True:
        steps = choose(mixture.options, spare_bytes=spare_bytes)
        beyond = mixture.plan_of(steps).artifact_bytes - size_bytes
        if beyond <= 0:
            return mixture.predict(steps)
        spare_bytes -= beyond


def reach(mixture: Mixture, limit: float) -> Mix:
    """The smallest of a few mixes whose KL keeps the limit, which becomes the recipe's own.

    PlanError when the finest mix does not.
    """
    rounding_kl = ROUNDING_KL.get(mixture.recipe.format, 0.0)
    most_kl = mixture.smallest.limits.max_kl or math.inf
    if not 0 < limit <= most_kl:
        raise PlanError(
            f"--max-kl: got {limit:g}; {mixture.recipe.name}: the limit of its precision, or its "
            f"check.max_kl, allows {most_kl:g} at most"
        )
    target = wanted = max(limit * MARGIN - rounding_kl, limit / 2)
    fits, fails = 0.0, math.inf
    fitting: list[Mix] = []
    for _ in range(ROUNDS):
        steps = choose(mixture.options, kl=wanted)
        mix = mixture.predict(steps)
        if mix.worst_kl <= target:
            fitting.append(mix)
            fits = wanted
            if mix.worst_kl >= ENOUGH * target or not steps:
                break
        else:
            fails = wanted
        # What single costs add up to, and what is found for a mix, differ by a factor.
        wanted = add_up(mixture.options, steps) * target / max(mix.worst_kl, LEAST_KL)
        if not fits < wanted < fails:
            wanted = math.sqrt(fits * fails)
    if fitting:
        found = min(fitting, key=lambda mix: mix.size_bytes)
    else:
        found = _finest(mixture, limit, target, rounding_kl)
    limits = msgspec.structs.replace(found.recipe.check, max_kl=limit)
    return replace(found, recipe=msgspec.structs.replace(found.recipe, check=limits))


def _finest(mixture: Mixture, limit: float, target: float, rounding_kl: float) -> Mix:
    finest = mixture.predict(choose(mixture.options))
    if finest.worst_kl > target:
        reachable = min((finest.worst_kl + rounding_kl) / MARGIN, 2 * finest.worst_kl)
        raise PlanError(
            f"--max-kl {limit:g}: the finest mix of {mixture.recipe.name}, "
            f"{format_bytes(finest.size_bytes)}, is predicted to have a mean KL of "
            f"{finest.worst_kl:.3g}, and some is kept for its runtime",
            advice=f"give --max-kl {round_up(reachable)} or more",
        )
    return finest


def choose(
    options: Options, *, spare_bytes: float = float("inf"), kl: float | None = None
) -> Steps:
    """Steps to larger types, each the one that then saves most KL a byte.

    They end when `spare_bytes` beyond the smallest types hold no more, or the sum is at most `kl`;
    steps that it does not need after all are then taken back.
    """
    current = {name: some[0] for name, some in options.items()}
    steps: Steps = []
    while kl is None or sum(option.kl for option in current.values()) > kl:
        best, best_rate = None, 0.0
        for name, some in options.items():
            for option in some:
                extra = option.size_bytes - current[name].size_bytes
                rate = (current[name].kl - option.kl) / max(extra, 1)
                if extra <= spare_bytes and rate > best_rate:
                    best, best_rate = (name, option), rate
        if best is None:
            break
        name, option = best
        spare_bytes -= option.size_bytes - current[name].size_bytes
        current[name] = option
        steps.append(best)
    return steps if kl is None else _trim(options, steps, kl)


def add_up(options: Options, steps: Steps) -> float:
    """The costs of all matrices after some steps."""
    first = {name: some[0] for name, some in options.items()}
    return sum(option.kl for option in (first | dict(steps)).values())


def _trim(options: Options, steps: Steps, kl: float) -> Steps:
    """Without the steps, last ones first, that the sum does not need to be at most `kl`."""

    for place in reversed(range(len(steps))):
        fewer = steps[:place] + steps[place + 1 :]
        if add_up(options, fewer) <= kl:
            steps = fewer
    return steps


def name_choices(recipe: Recipe, mixture: Mixture) -> dict[str, list[str]]:
    """Paths of the matrices by what an override says of them, or that none does."""
    overrides = resolve(overrides_of(recipe), mixture.decoder)
    found: dict[str, list[str]] = {}
    for name in mixture.choices:
        found.setdefault(spell(overrides.get(name)), []).append(path_of(name))
    return found


def spell(setting: Any) -> str:
    """How a choice is called."""
    if setting is None:
        return OWN_TYPE
    return setting if isinstance(setting, str) else f"{setting.bits} bits"
