"""What each choice in GPTQ is worth: python -m bench.gptq_variants CHECKPOINT

Mean KL from the source on held-out text, weights alone (MatMulNBits' grid), for small checkpoints.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from toolkit.checkpoint import Checkpoint
from toolkit.families import read_decoder
from toolkit.formats.onnx.encoders import Blocks
from toolkit.quality import measures, reference
from toolkit.quality.chat import read_chat
from toolkit.quality.texts import read_text
from toolkit.quantize import gptq
from toolkit.quantize.grids import decode, nearest

GRIDS = {"32 symmetric": (32, True), "32 asymmetric": (32, False), "128 symmetric": (128, True)}
Codes = Callable[[Any, Any, Blocks], Any]


class Model:
    """A checkpoint in memory; `choose`, where given, replaces each matrix once its inputs show."""

    def __init__(self, tensors: dict[str, Any], choose: Callable[[str, Any], Any] | None) -> None:
        self.tensors, self.choose = dict(tensors), choose

    def look_up(self, name: str, ids: Sequence[int]) -> Any:
        return self.tensors[name][list(ids)]

    def read(self, name: str) -> Any:
        return self.tensors[name]

    def project(self, name: str, inputs: Any) -> Any:
        if self.choose:
            self.tensors[name] = self.choose(name, inputs)
        return inputs @ self.tensors[name].T


def round_to_nearest(weights: Any, _: Any, encoder: Blocks) -> Any:
    """Each weight's nearest value."""
    grid = encoder.fit(weights)
    return decode(nearest(weights, grid, encoder.bits), grid)


def choose(weights: Any, gram: Any, encoder: Blocks) -> Any:
    """As the product does."""
    grid = encoder.fit(weights)
    return decode(gptq.choose_codes(weights, grid, encoder.bits, gptq.factor(gram)), grid)


# What is done, and the constants and functions of gptq.py that differ meanwhile.
VARIANTS: dict[str, tuple[Codes, dict[str, Any]]] = {
    "round to nearest": (round_to_nearest, {}),
    "GPTQ, columns as they stand, no sweep": (
        choose,
        {"rank_columns": lambda importance: np.arange(len(importance)), "SWEEPS": 0},
    ),
    "GPTQ, weightiest column first, no sweep": (choose, {"SWEEPS": 0}),
    "and one sweep (the product)": (choose, {}),
    "two sweeps": (choose, {"SWEEPS": 2}),
    "three sweeps": (choose, {"SWEEPS": 3}),
    "damping 0.001": (choose, {"DAMPING": 0.001}),
    "damping 0.1": (choose, {"DAMPING": 0.1}),
}


def main() -> None:
    """Print one table for all grids."""
    checkpoint = Checkpoint.open(Path(sys.argv[1]))
    decoder = read_decoder(checkpoint.config)
    chat = read_chat(checkpoint)
    calibration = read_text(checkpoint, chat, "calibration", tokens=8192, length=512)
    evaluation = read_text(checkpoint, chat, "evaluation", tokens=4096, length=512)
    tensors = {name: checkpoint.read(name) for name in decoder.shapes()}
    grams: dict[str, Any] = {}

    def run(model: Model, sequences: Sequence[Sequence[int]]) -> Any:
        states = reference.final_states_of(model, decoder, sequences)
        return model.project(decoder.head_name, states.reshape(-1, decoder.hidden))

    def record(name: str, inputs: Any) -> Any:
        grams[name] = inputs.T @ inputs
        return tensors[name]

    run(Model(tensors, record), calibration.sequences)
    expected = run(Model(tensors, None), evaluation.sequences)
    ids = [token for sequence in evaluation.sequences for token in sequence]

    def measure(model: Model) -> str:
        found = measures.compare_logits(expected, run(model, evaluation.sequences), ids)
        return f"{found.mean_kl:.5f}"

    print("| |" + "|".join(GRIDS) + "|\n|---|" + "---|" * len(GRIDS))
    for label, (codes, changes) in VARIANTS.items():
        cells = []
        for size, symmetric in GRIDS.values():
            encoder = Blocks(4, size, symmetric, "float32")
            with mock.patch.multiple(gptq, **{"SWEEPS": gptq.SWEEPS, **changes}):
                chosen = {n: codes(tensors[n], gram, encoder) for n, gram in grams.items()}
            cells.append(measure(Model({**tensors, **chosen}, None)))
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
    cells = []
    for size, symmetric in GRIDS.values():
        encoder = Blocks(4, size, symmetric, "float32")
        after = Model(
            tensors, lambda name, x, encoder=encoder: choose(tensors[name], x.T @ x, encoder)
        )
        run(after, calibration.sequences)
        cells.append(measure(Model(after.tensors, None)))
    print(f"| on the outputs of coded layers, not the source's | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
