"""Failures that the runner expects; they cross the wire as JSON, never as a traceback."""

from __future__ import annotations

from typing import Any


class Failure(Exception):
    """An expected failure: `kind` is for programs, the message and `advice` for people."""

    def __init__(self, kind: str, message: str, advice: str = "", **details: Any) -> None:
        super().__init__(message)
        self.kind = kind
        self.advice = advice
        self.details = details

    def to_json(self) -> dict[str, Any]:
        """Return the object that is printed under the key `error`."""
        return {
            "kind": self.kind,
            "message": str(self),
            "advice": self.advice,
            **self.details,
        }


def disk_full(found: str) -> Failure:
    """Return the failure of a write that had no room; `found` says what is free and needed."""
    return Failure(
        "disk_full",
        f"the device's disk is full: {found}",
        "free some space there, or choose a folder on another disk: `root:` in devices.yaml",
    )
