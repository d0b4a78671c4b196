"""Levels of a divergence, whose bounds are round numbers down from the largest value."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEVELS = 8
HALF_DECADES = (1, 3)  # four decades in all
THIRDS = (1, 2, 5)  # less than three: what is far below the worst is left pale


@dataclass(frozen=True)
class Scale:
    """Levels 0 to LEVELS; level n >= 1 begins at `bounds[n - 1]`, 0 is all below."""

    bounds: tuple[float, ...]

    def level(self, value: float) -> int:
        """The level of a value; one that is no number has the highest."""
        if math.isnan(value):
            return LEVELS
        return sum(value >= bound for bound in self.bounds)

    def describe(self, level: int) -> str:
        """The range of a level, as a legend says it."""
        if level == 0:
            return f"below {write_short(self.bounds[0])}"
        return f"from {write_short(self.bounds[level - 1])}"


def make_scale(values: Iterable[float], steps: Sequence[int]) -> Scale:
    """A scale whose highest level holds the largest value; `steps` are its bounds in a decade."""
    largest = max((v for v in values if math.isfinite(v) and v > 0), default=1.0)
    decade = math.floor(math.log10(largest))
    bounds = [float(f"{step}e{power}") for power in range(decade - LEVELS, decade + 1)
              for step in steps]  # fmt: skip
    below = [bound for bound in bounds if bound <= largest]
    return Scale(tuple(below[-LEVELS:]))


def write_short(value: float) -> str:
    """At most two figures: 0.0003, 5.6e-5, 0."""
    if not value or not math.isfinite(value) or 1e-4 <= abs(value) < 1e4:
        return f"{value:.2g}"
    mantissa, _, power = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"
