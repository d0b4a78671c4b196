"""The report of a run: ordered steps with what was measured against what limit."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Step:
    """One step: `measured` says what was found, `limit` what was allowed."""

    name: str
    ok: bool = False
    seconds: float = 0.0
    measured: str = ""
    limit: str = ""
    advice: str = ""


@dataclass
class Report:
    """Steps in the order they ran; `ok` when every one of them is."""

    title: str
    steps: list[Step] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when at least one step ran and none failed."""
        return bool(self.steps) and all(step.ok for step in self.steps)

    @contextmanager
    def step(self, name: str, limit: str = "") -> Iterator[Step]:
        """Time a step; it is ok when its block ends without an error."""
        step = Step(name, limit=limit)
        self.steps.append(step)
        started_s = time.monotonic()
        try:
            yield step
            step.ok = True
        finally:
            step.seconds = time.monotonic() - started_s
