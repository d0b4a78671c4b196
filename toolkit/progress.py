"""How long work tells how far it is."""

from collections.abc import Callable

Advance = Callable[[int], None]


def ignore(_: int) -> None:
    """An Advance for nobody."""
