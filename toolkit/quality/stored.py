"""Are the stored tensors the checkpoint's? Each is held against its source, some rows of it.

Rounding, however coarse, leaves a tensor's direction and spreads its errors over a block. A tensor
of another layer, rows in another order or exchanged nibbles turn it; scales that belong to another
block have all weights of a block off by one factor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from toolkit.checkpoint import Checkpoint, to_float32
from toolkit.quality.reference import Array
from toolkit.quality.weightonly import Read

ROWS = 64  # of a matrix that are compared, at even distances
BLOCK = 32
# Cosine of a tensor with its source: 2 bits leave 0.9, anything else in its place is near 0.
LEAST_COSINE = 0.75
LEAST_ROW_COSINE = 0.4
# Variance of the factors of blocks over what independent errors make of them: 1 for rounding.
MOST_COMMON = 12.0
VECTOR_ERROR = 0.01  # of norms and biases, relative: float16 and bfloat16 round by less
FAINT = 1e-3  # rows below this part of the usual length say nothing


@dataclass
class Watch:
    """Looks at an artifact's tensors as they are read; `faults` says which are not the source's."""

    checkpoint: Checkpoint
    faults: dict[str, str] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    def over(self, read: Read) -> Read:
        """The same reader, whose tensors are looked at on the way."""

        def start() -> Iterator[tuple[str, Array]]:
            for name, values in read():
                self._look(name, values)
                yield name, values

        return start

    def _look(self, name: str, values: Array) -> None:
        if name in self.faults or name not in self.checkpoint.tensors:
            return
        self.seen.add(name)
        if fault := compare(self.checkpoint, name, values):
            self.faults[name] = fault


def compare(checkpoint: Checkpoint, name: str, values: Array) -> str:
    """What is wrong with a stored tensor, float32 of the source's shape; empty when nothing is."""
    shape = checkpoint.tensors[name].shape
    if values.shape != shape:
        return f"its shape is {list(values.shape)}; the checkpoint's {list(shape)}"
    if len(shape) != 2:
        return _compare_vector(to_float32(checkpoint.read(name)), values)
    step = max(1, shape[0] // ROWS)
    places = range(0, shape[0], step)
    own = np.concatenate(
        [to_float32(raw) for row in places for _, raw in checkpoint.read_rows(name, row, 1)]
    )
    return compare_rows(own, values[::step])


def compare_rows(own: Array, stored: Array) -> str:
    """The same for rows [n, columns] of a matrix and of its source."""
    cosine = float(_divide(np.vdot(own, stored), np.linalg.norm(own) * np.linalg.norm(stored)))
    if cosine < LEAST_COSINE:
        return f"its cosine with the checkpoint's is {cosine:.2f}; limit {LEAST_COSINE}"
    lengths = np.linalg.norm(own, axis=1)
    cosines = _divide(np.einsum("ij,ij->i", own, stored), lengths * np.linalg.norm(stored, axis=1))
    heard = lengths > FAINT * lengths.mean()
    if heard.any() and (least := float(cosines[heard].min())) < LEAST_ROW_COSINE:
        return f"the cosine of a row with the checkpoint's is {least:.2f}; limit {LEAST_ROW_COSINE}"
    common = measure_common(own, stored)
    if common > MOST_COMMON:
        return f"the errors of a block have a common factor ({common:.0f}; limit {MOST_COMMON:g})"
    return ""


def measure_common(own: Array, stored: Array) -> float:
    """How much the errors of BLOCK weights have in common: 1 when they are independent.

    Variance of the factors by which the blocks of `stored` are those of `own`, over the variance
    that their remaining errors, if independent, would give the factors.
    """
    columns = own.shape[1] // BLOCK * BLOCK
    if not columns:
        return 0.0
    own, stored = (one[:, :columns].reshape(-1, BLOCK) for one in (own, stored))
    squares = np.einsum("ij,ij->i", own, own)
    kept = squares > FAINT**2 * squares.mean()
    own, stored, squares = own[kept], stored[kept], squares[kept]
    factors = np.einsum("ij,ij->i", own, stored) / squares
    rest = stored - factors[:, None] * own
    expected = np.einsum("ij,ij->i", rest, rest) / (BLOCK - 1) / squares
    return float(_divide(factors.var(), expected.mean()))


def _compare_vector(own: Array, stored: Array) -> str:
    error = float(_divide(np.linalg.norm(stored - own), np.linalg.norm(own)))
    return "" if error <= VECTOR_ERROR else f"it is {error:.2g} off; limit {VECTOR_ERROR}"


def _divide(value: Any, by: Any) -> Any:
    """Divide; what is divided by nothing is 0 where it is 0 itself, and infinite otherwise."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.divide(value, by), nan=0.0, posinf=np.inf)
