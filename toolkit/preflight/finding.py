"""One result of a check, and what several checks share."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One check: what was found against what is needed, and what to do about it."""

    name: str
    verdict: Literal["ok", "warning", "refused"]
    text: str
    advice: str = ""


def join_version(version: tuple[int, ...]) -> str:
    """Write a version: (3, 11) -> 3.11."""
    return ".".join(map(str, version))
