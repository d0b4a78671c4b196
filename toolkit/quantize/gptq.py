"""Codes that keep a matrix's outputs near to the source's on a calibration text.

With X the inputs of a matrix W on that text and G = X'X, the outputs' squared error is tr(E G E'),
E the error of the codes' values. G = U D U', U with a diagonal of ones, so the column j of E U
counts D_j: columns are coded one after the other, and each is pulled by the errors of those before
it until its own part is least. This is GPTQ (Frantar et al. 2022) in the form of LDLQ (Chee et al.
2023, QuIP), which needs one Cholesky factor and no inverse; columns go by falling importance, on
grids fixed before ("act order" with "static groups" in GPTQ's own code). A sweep of coordinate
descent over the codes, each against all others, then takes up to a tenth off the divergence.
"""

import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.quantize.grids import Grid, decode, nearest
from toolkit.quantize.kernels import Codes, Floats, load_library

DAMPING = 0.01  # of the mean importance, added to each; ten times that where it does not suffice
MOST_DAMPING = 10.0
AIM_DAMPING = 0.05  # of the mean importance, for where the source's outputs are aimed at
BLOCK_COLUMNS = 64  # their coefficients stay in the first-level cache
SWEEPS = 1
NOT_FINITE = "activations on the calibration text are not finite"
THREADS = os.cpu_count() or 1
LEAST_ROWS = 64  # a thread's share is worth waking it


@dataclass(frozen=True)
class Curvature:
    """How errors of a matrix's columns act on its outputs; columns in `order`, weightiest first.

    importance [columns], in the matrix's own order: the sums of squares of the inputs. feedback
    [columns, columns]: U above its diagonal. descent: G with each column divided by its diagonal.
    """

    importance: Floats
    order: NDArray[np.intp]
    feedback: Floats
    descent: Floats
    damping: float

    @property
    def damped_importance(self) -> Floats:
        """For formats that search by importance: no column's errors count nothing at all."""
        damped: Floats = self.importance + np.float32(self.damping) * self.importance.mean()
        return damped


def factor(gram: Floats) -> Curvature:
    """Take apart G = X'X, float32 [columns, columns].

    A direction the calibration text hardly shows is damped, not trusted. ValueError when G is not
    finite, or cannot be damped enough.
    """
    importance = np.diag(gram).copy()
    if not np.isfinite(importance).all():
        raise ValueError(NOT_FINITE)
    order = rank_columns(importance)
    mean = max(float(importance.mean(dtype=np.float64)), float(np.finfo(np.float32).tiny))
    damping = DAMPING
    ordered = np.take(np.take(gram, order, axis=0), order, axis=1)
    while True:
        found = _factor_damped(ordered, importance[order] + np.float32(damping * mean))
        if found is not None:
            return Curvature(importance, order, *found, damping)
        damping *= 10
        if damping > MOST_DAMPING:
            raise ValueError(NOT_FINITE)


def find_shift(expected: Floats, inputs: Floats, gram: Floats) -> Floats | None:
    """How weights W move to make of `inputs` what they make of `expected`: to W + W shift.

    expected [n, columns] are the source's inputs X, `inputs` those of the layers coded before, Y;
    gram = Y'Y. W + W (X - Y)'Y (Y'Y + damping)^-1 is the least squares solution (the idea of GPTAQ,
    Li et al. 2025). [columns, columns]; None when both inputs are the same.
    """
    drift = (expected - inputs).T @ inputs
    if not drift.any():
        return None
    importance = np.diag(gram)
    roots = np.sqrt(importance + np.float32(AIM_DAMPING) * importance.mean())
    # As in `factor`: a diagonal of ones keeps float32 from losing small columns.
    scaled = gram / roots
    scaled /= roots[:, None]
    np.fill_diagonal(scaled, 1)
    drift /= roots
    try:
        shift: Floats = np.linalg.solve(scaled, drift.T).T / roots
    except np.linalg.LinAlgError as error:
        raise ValueError(NOT_FINITE) from error
    return shift


def rank_columns(importance: Floats) -> NDArray[np.intp]:
    """The order in which columns are coded: later ones can make up for earlier ones' errors."""
    return np.argsort(-importance, kind="stable")


def _factor_damped(gram: Floats, diagonal: Floats) -> tuple[Floats, Floats] | None:
    """(feedback, descent) of G with another diagonal; None when it is not positive definite."""
    # A diagonal of ones keeps float32 from losing the small columns of a matrix with outliers.
    roots = np.sqrt(diagonal)
    scaled = np.divide(gram, roots, dtype=np.float32)
    scaled /= roots[:, None]
    np.fill_diagonal(scaled, 1)
    try:
        # Backwards, for the lower factor of the flipped matrix is the upper one flipped.
        lower = np.linalg.cholesky(scaled[::-1, ::-1])
    except np.linalg.LinAlgError:
        return None
    feedback: Floats = np.ascontiguousarray(lower[::-1, ::-1])
    if not np.isfinite(feedback).all():
        return None
    del lower
    feedback /= np.diag(feedback).copy() * roots
    feedback *= roots[:, None]
    np.fill_diagonal(feedback, 0)
    scaled *= roots[:, None]
    scaled /= roots
    np.fill_diagonal(scaled, 0)
    return feedback, scaled


def choose_codes(
    weights: Floats, grid: Grid, bits: int, curvature: Curvature, stretch: Floats | None = None
) -> Codes:
    """Return codes [rows, columns], one a byte, for weights of that shape on a fixed grid.

    `stretch` [columns]: the grid holds the weights times this (equalization folds it elsewhere).
    """
    rows, columns = weights.shape
    order, size = curvature.order, columns // grid.steps.shape[1]
    state = _State(
        weights=np.take(weights, order, axis=1),  # ten times as fast as an index
        errors=np.zeros((rows, columns), np.float32),
        codes=np.empty((rows, columns), np.uint8),
        groups=(order // size).astype(np.int32),
        stretch=np.ones(columns, np.float32) if stretch is None else stretch[order],
        grid=grid,
        top=(1 << bits) - 1,
    )
    with ThreadPoolExecutor(THREADS) as pool:
        state.sweep(pool, np.zeros((rows, columns), np.float32), curvature.feedback)
        for _ in range(SWEEPS):
            state.sweep(pool, state.errors @ curvature.descent, curvature.descent)
    return np.take(state.codes, np.argsort(order), axis=1)


@dataclass(frozen=True)
class _State:
    """Everything about a matrix's rows while codes are chosen; columns in the order of choice."""

    weights: Floats
    errors: Floats
    codes: Codes
    groups: NDArray[np.int32]
    stretch: Floats
    grid: Grid
    top: int

    def sweep(self, pool: Executor, pull: Floats, coefficients: Floats) -> None:
        """Choose every code once; `pull` is what errors ask of each weight before it begins."""
        self._sweep(pool, 0, self.weights.shape[1], pull, coefficients)

    def _sweep(
        self, pool: Executor, start: int, stop: int, pull: Floats, coefficients: Floats
    ) -> Floats:
        """Choose the codes of some columns; returns by how much their errors changed.

        By halves, the second pulled at by the first at once: products of square parts wait least
        for memory.
        """
        if stop - start <= BLOCK_COLUMNS:
            return self._choose(pool, start, stop, pull, coefficients)
        blocks = -(-(stop - start) // BLOCK_COLUMNS)
        middle = start + blocks // 2 * BLOCK_COLUMNS
        first = self._sweep(pool, start, middle, pull, coefficients)
        pull[:, middle:stop] += first @ coefficients[start:middle, middle:stop]
        second = self._sweep(pool, middle, stop, pull, coefficients)
        return np.concatenate([first, second], axis=1)

    def _choose(
        self, pool: Executor, start: int, stop: int, pull: Floats, coefficients: Floats
    ) -> Floats:
        """The same for a few columns."""
        deltas = np.empty((len(self.weights), stop - start), np.float32)
        library = load_library()
        if library is None:
            self._choose_slowly(start, stop, pull, coefficients, deltas)
            return deltas

        def serve(rows: slice) -> None:
            self._call(library.phiship_feedback, rows, start, stop, pull, coefficients, deltas)

        step = max(LEAST_ROWS, -(-len(deltas) // THREADS))
        list(pool.map(serve, [slice(row, row + step) for row in range(0, len(deltas), step)]))
        return deltas

    def _call(
        self, function: Callable[..., None], rows: slice, start: int, stop: int, pull: Floats,
        coefficients: Floats, deltas: Floats,
    ) -> None:  # fmt: skip
        """The compiled loop on some rows."""

        def at(array: NDArray[Any]) -> int:
            return int(array[rows, start:].ctypes.data)

        grid, part = self.grid, deltas[rows]
        levels = None if grid.levels is None else grid.levels.ctypes.data
        function(
            len(part), stop - start, self.weights.shape[1], at(self.weights), at(self.errors),
            at(pull), coefficients[start:, start:].ctypes.data, self.groups[start:].ctypes.data,
            grid.steps.shape[1], grid.steps[rows].ctypes.data, grid.origins[rows].ctypes.data,
            self.stretch[start:].ctypes.data, levels, self.top, at(self.codes), part.ctypes.data,
        )  # fmt: skip

    def _choose_slowly(
        self, start: int, stop: int, pull: Floats, coefficients: Floats, deltas: Floats
    ) -> None:
        """The same in NumPy."""
        for column in range(start, stop):
            group, stretch = self.groups[column], self.stretch[column]
            chosen = Grid(
                self.grid.steps[:, [group]], self.grid.origins[:, [group]], (), self.grid.levels
            )
            wanted = ((self.weights[:, column] + pull[:, column]) * stretch)[:, None]
            codes = nearest(wanted, chosen, self.top.bit_length())
            error = self.weights[:, column] - decode(codes, chosen)[:, 0] / stretch
            delta = error - self.errors[:, column]
            pull[:, column + 1 : stop] += delta[:, None] * coefficients[column, column + 1 : stop]
            self.errors[:, column], self.codes[:, column] = error, codes[:, 0]
            deltas[:, column - start] = delta
