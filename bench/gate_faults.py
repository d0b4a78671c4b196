"""Which part of the gate catches which fault: python -m bench.gate_faults [--checkpoint DIR]

Makes every fault of tests/quality/faults.py in an artifact of each format, written by the product's
own writer, and prints a table in Markdown: what caught it, its value and its limit. Without a
checkpoint small random ones are used. Of a deeper one tensors are changed in the first two layers,
and no others are written; faults of graphs are run through all. DIR is a Phi-3 of any size.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.checkpoints import write_random_checkpoint
from tests.moe_checkpoints import write_moe_checkpoint
from tests.quality.artifacts import make_recipe
from tests.quality.faults import (
    EQUALIZED,
    EXPERT_FORMATS,
    EXPERTS,
    FORMATS,
    GRAPHS,
    TENSORS,
    Graph,
    Make,
    Model,
)
from tests.quality.file_faults import FILES, Edit, edit_file
from tests.quality.seeding import Case, Caught, configure
from toolkit.checkpoint import Checkpoint

LAYERS = 2
NONE = "-"
SHORT = {
    "cosine with the checkpoint's": "cosine",
    "cosine of a row with the checkpoint's": "row's cosine",
    "relative change of size": "size",
    "relative error": "error",
    "factors of blocks": "block factors",
    "offsets of blocks": "block offsets",
    "factors of columns": "column factors",
}
Judge = Callable[[str], Caught | None]  # of a format; ValueError where it cannot have the fault


class Bench:
    """A checkpoint and the cases made of it."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        self.checkpoint, self.folder = checkpoint, folder
        layers = min(LAYERS, checkpoint.config.integer("num_hidden_layers"))
        self.shallow = configure(checkpoint, {"num_hidden_layers": layers})

    def change_tensors(self, make: Make, kind: str, equalize: bool = False) -> Caught | None:
        """Write wrong tensors and look at them."""
        case = Case(make_recipe(kind, equalize=equalize), self.shallow, self.folder)
        changes = make(Model(self.shallow, case.plan.decoder))
        if not changes:
            raise ValueError
        case.write(changes)
        return case.judge_tensors()

    def change_file(self, edit: Edit, kind: str) -> Caught | None:
        """Write right tensors, change the file and look at them."""
        case = Case(make_recipe(kind), self.shallow, self.folder)
        case.write({})
        edit_file(kind, self.folder, edit)
        return case.judge_tensors()

    def change_graph(self, graph: Graph, kind: str) -> Caught | None:
        """Write a wrong graph and run it."""
        case = Case(make_recipe(kind), graph.make_source(self.checkpoint), self.folder)
        wrong, decoder = graph.apply(case.checkpoint)
        if kind not in graph.formats or decoder == case.plan.decoder:
            raise ValueError
        case.write({}, wrong, decoder)
        return case.judge(case.plan_of(decoder))[0]

    def change_nothing(self, kind: str) -> Caught:
        """Write and run a correct artifact."""
        case = Case(make_recipe(kind), self.checkpoint, self.folder)
        case.write({})
        caught, runtime = case.judge()
        assert caught is None
        return runtime

    def rows(self) -> Iterator[tuple[str, Judge]]:
        """Every fault by its name, and how an artifact of a format fares with it."""
        for name, make in TENSORS.items():
            yield name, partial(self.change_tensors, make)
        for name, make in EQUALIZED.items():
            yield name, partial(self.change_tensors, make, equalize=True)
        for name, edit in FILES.items():
            yield name, partial(self.change_file, edit)
        for name, graph in GRAPHS.items():
            yield name, partial(self.change_graph, graph)
        yield "nothing is wrong", self.change_nothing


def list_expert_rows(bench: Bench) -> Iterator[tuple[str, Judge]]:
    """The same of a mixture of experts."""

    def judge(make: Make, kind: str) -> Caught | None:
        if kind not in EXPERT_FORMATS:
            raise ValueError
        return bench.change_tensors(make, kind)

    for name, make in EXPERTS.items():
        yield name, partial(judge, make)


def tell(judge: Judge, kind: str) -> str:
    """A cell of the table."""
    try:
        caught = judge(kind)
    except ValueError:
        return NONE
    if caught is None:
        return "**passes**"
    if caught.part == "reader":
        return "a tensor is missing"
    return f"{SHORT.get(caught.measure, caught.measure)} {say(caught.value)} ({say(caught.limit)})"


def say(value: float) -> str:
    """Two digits, without exponents of large numbers."""
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="a Phi-3; without, random ones")
    given: Path | None = parser.parse_args().checkpoint
    print("| fault | " + " | ".join(FORMATS) + " |\n|" + "---|" * (1 + len(FORMATS)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = given or write_random_checkpoint(folder / "source", "gqa")
        rows = list(Bench(Checkpoint.open(source), folder / "out").rows())
        if given is None:
            experts = Checkpoint.open(write_moe_checkpoint(folder / "experts"))
            rows[-1:-1] = list_expert_rows(Bench(experts, folder / "out"))
        for title, judge in rows:
            cells = (tell(judge, kind) for kind in FORMATS)
            print(f"| {title} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
