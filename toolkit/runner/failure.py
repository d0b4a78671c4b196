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
