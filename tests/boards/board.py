"""Boards as JSON: what a probe reads there, and the facts that are right.

Recording needs the standard library only, and Python 3.9, as the probes themselves do.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.runner.agent.facts import read_facts
from toolkit.runner.agent.layout import Layout
from toolkit.runner.agent.probes.interpreter import Interpreter

if TYPE_CHECKING:
    from toolkit.device import Facts

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


@dataclass(frozen=True)
class Board:
    """`files` by path below the root, a folder's path ending in /; `commands` by their words."""

    what: str
    source: str
    files: dict[str, str]
    commands: dict[str, str]
    python: dict[str, Any]
    facts: dict[str, Any]
    asked: list[str] = field(default_factory=list)

    def lay_out(self, root: Path) -> None:
        """Make the files below a folder."""
        for name, text in self.files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                path.mkdir(exist_ok=True)
            else:
                path.write_bytes(text.encode())

    def run(self, words: list[str]) -> str | None:
        """Give a program's recorded answer; the board has no other programs."""
        self.asked.append(" ".join(words))
        return self.commands.get(" ".join(words))

    def read(self, root: Path) -> dict[str, Any]:
        """Read the facts with the device's own code, as JSON brings them to the host."""
        python = Interpreter(**self.python)
        found = read_facts(Layout(Path(python.root)), root, self.run, python)
        replayed: dict[str, Any] = json.loads(json.dumps(found))
        return replayed


def load_board(name: str) -> Board:
    """Load a board by the name of its file."""
    return Board(**json.loads((FOLDER / f"{name}.json").read_text("utf-8")))


def load_facts(name: str) -> Facts:
    """Return a board's facts as the host has them."""
    import msgspec

    from toolkit.device import Facts

    return msgspec.convert(load_board(name).facts, Facts)


def to_json(board: Board) -> str:
    """Write a board as its file has it."""
    fields = dataclasses.asdict(board)
    del fields["asked"]
    return json.dumps(fields, indent=1)
