"""Are the stored tensors the checkpoint's? Each is held against its source, some rows of it.

Rounding, however coarse, leaves a tensor's direction and size, and spreads its errors evenly. A
tensor of another layer, rows in another order or exchanged nibbles turn it. Scales that belong to
another block have all weights of a block off by one factor, a wrong zero point by one offset; a
norm's factors that are missing in a matrix have a column off. The limits leave what was measured a
factor of 2, and are measured in docs/quality.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np

from toolkit.checkpoint import Checkpoint, to_float32
from toolkit.quality.reference import Array
from toolkit.quality.weightonly import Read

ROWS = 64  # of a matrix that are compared, at even distances
BLOCK = 32
# Cosine of a tensor, and of each row, with its source: 2 bits by GPTQ leave 0.6 and 0.47, anything
# else in its place is near 0.
LEAST_COSINE = 0.3
# The mean factor of blocks is 1 give or take SIZE, and SHRINK times what the cosine's square lacks:
# codes that are chosen for a layer's outputs make a tensor smaller as their errors grow.
SIZE, SHRINK = 0.1, 2.0
# Over what independent errors give: variance of the factors of blocks, and of columns; mean square
# of the blocks' mean errors.
MOST_FACTORS = 13.0
MOST_OFFSETS = 60.0
VECTOR_ERROR = 0.01  # of norms and biases, relative: float16 and bfloat16 round by less
FAINT = 1e-3  # rows below this part of the usual length say nothing
WEAK = 0.1  # as do blocks and columns whose squares are below this part of the mean


class Fault(NamedTuple):
    """What is wrong with a tensor, by how much, and what is allowed."""

    what: str
    value: float
    limit: float

    def __str__(self) -> str:
        """As the gate's error ends."""
        return f"{self.what} {self.value:.2g}, limit {self.limit:.2g}"


@dataclass
class Watch:
    """Looks at an artifact's tensors as they are read; `faults` says which are not the source's."""

    checkpoint: Checkpoint
    faults: dict[str, Fault] = field(default_factory=dict)
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


def compare(checkpoint: Checkpoint, name: str, values: Array) -> Fault | None:
    """What is wrong with a stored tensor, float32; None when nothing is."""
    shape = checkpoint.tensors[name].shape
    if values.shape != shape:
        return Fault(
            f"shape {list(values.shape)} for {list(shape)}, weights", values.size, prod(shape)
        )
    if len(shape) != 2:
        return _compare_vector(to_float32(checkpoint.read(name)), values)
    step = max(1, shape[0] // ROWS)
    own = [
        to_float32(raw)
        for row in range(0, shape[0], step)
        for _, raw in checkpoint.read_rows(name, row, 1)
    ]
    with np.errstate(over="ignore", invalid="ignore"):  # of values that are far off
        return compare_rows(np.concatenate(own), values[::step])


def compare_rows(own: Array, stored: Array) -> Fault | None:
    """The same for rows [n, columns] of a matrix and of its source."""
    cosine = float(_divide(np.vdot(own, stored), np.linalg.norm(own) * np.linalg.norm(stored)))
    if not cosine >= LEAST_COSINE:
        return Fault("cosine with the checkpoint's", cosine, LEAST_COSINE)
    lengths = np.linalg.norm(own, axis=1)
    cosines = _divide(np.einsum("ij,ij->i", own, stored), lengths * np.linalg.norm(stored, axis=1))
    heard = lengths > FAINT * lengths.mean()
    if heard.any() and (least := float(cosines[heard].min())) < LEAST_COSINE:
        return Fault("cosine of a row with the checkpoint's", least, LEAST_COSINE)
    return _compare_blocks(own, stored, SIZE + SHRINK * (1 - min(1.0, cosine) ** 2))


def _compare_blocks(own: Array, stored: Array, room: float) -> Fault | None:
    """The same by what errors have in common; `room` is how far the size may be from 1."""
    squares = np.square(own).mean(axis=0)
    strong = squares > WEAK * squares.mean()
    blocks = measure_blocks(own, stored)
    columns = measure_blocks(own[:, strong].T, stored[:, strong].T)
    faults = []
    if blocks:
        faults.append(Fault("relative change of size", abs(blocks.factor - 1), room))
        faults.append(Fault("factors of blocks", blocks.factors, MOST_FACTORS))
        faults.append(Fault("offsets of blocks", blocks.offsets, MOST_OFFSETS))
    if columns:
        faults.append(Fault("factors of columns", columns.factors, MOST_FACTORS))
    return next((one for one in faults if not one.value <= one.limit), None)


@dataclass(frozen=True)
class Blocks:
    """What the errors of a block's weights have in common.

    `factor` is the mean one by which blocks of the source became those that are stored. `factors`
    is the variance of these, and `offsets` the mean square of the blocks' mean errors, each over
    what independent errors of the same size would give: 1 for ideal rounding.
    """

    factor: float
    factors: float
    offsets: float


def measure_blocks(own: Array, stored: Array) -> Blocks | None:
    """Compare rows [n, columns] in blocks of BLOCK columns; None where there are none."""
    columns = own.shape[1] // BLOCK * BLOCK
    if not own[:, :columns].any():
        return None
    own, stored = (one[:, :columns].reshape(-1, BLOCK) for one in (own, stored))
    squares = np.einsum("ij,ij->i", own, own)
    strong = squares > WEAK * squares.mean()
    own, stored, squares = own[strong], stored[strong], squares[strong]
    factors = np.einsum("ij,ij->i", own, stored) / squares
    rest = np.square(stored - factors[:, None] * own).sum(axis=1) / (BLOCK - 1) / squares
    means = (stored - own).mean(axis=1)
    spread = (stored - own).var(axis=1, ddof=1)
    return Blocks(
        float(factors.mean()),
        float(_divide(factors.var(), rest.mean())),
        float(_divide(BLOCK * np.square(means).mean(), spread.mean())),
    )


def _compare_vector(own: Array, stored: Array) -> Fault | None:
    error = float(_divide(np.linalg.norm(stored - own), np.linalg.norm(own)))
    return None if error <= VECTOR_ERROR else Fault("relative error", error, VECTOR_ERROR)


def _divide(value: Any, by: Any) -> Any:
    """Divide; 0 divided by anything is 0, and anything else by 0 infinite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.equal(value, 0), 0.0, np.divide(value, by))
