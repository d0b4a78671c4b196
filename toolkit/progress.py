"""How long work tells how far it is."""

from collections.abc import Callable
from typing import Protocol

Advance = Callable[[int], None]


class Bar(Protocol):
    """Takes bytes done; `show` says which part is under way, such as a file."""

    def __call__(self, count: int) -> None:
        """Count bytes."""

    def show(self, part: str) -> None:
        """Name the part."""


class Ignored:
    """A Bar for nobody."""

    def __call__(self, count: int) -> None:
        """Nothing."""

    def show(self, part: str) -> None:
        """Nothing."""


def ignore(_: int) -> None:
    """An Advance for nobody."""
