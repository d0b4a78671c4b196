"""An artifact's weights on the way through its layers: chosen, written, and multiplied with.

The inputs of each matrix come from the artifact's own matrices before it, as they will at the
device, and its codes aim at what the source's weights make of the source's inputs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from toolkit import fileio
from toolkit.checkpoint import Checkpoint, to_float32
from toolkit.errors import CheckpointError, PhishipError
from toolkit.progress import Advance
from toolkit.quality import reference
from toolkit.quality.reference import Array
from toolkit.quantize.gptq import Curvature, choose_codes, factor, find_shift
from toolkit.quantize.grids import (
    Grid,
    GridEncoder,
    decode,
    fit_together,
    is_choosable,
    nearest,
)
from toolkit.quantize.kernels import Codes
from toolkit.recipe import Quantization
from toolkit.scales import Scales
from toolkit.stream import Output, Piece, list_tasks, read_piece


@dataclass
class Calibrated:
    """An artifact whose codes are to be chosen; `done` grows by the tasks of finished layers."""

    output: Output
    quantization: Quantization
    done: set[int]
    error: PhishipError | None = None
    _written: list[int] = field(default_factory=list)

    @cached_property
    def _tasks(self) -> dict[str, list[tuple[int, Piece]]]:
        tasks: dict[str, list[tuple[int, Piece]]] = {}
        for number, piece in list_tasks(self.output):
            tasks.setdefault(piece.tensor, []).append((number, piece))
        return tasks

    def is_open(self, tensors: Sequence[str]) -> bool:
        """True when a task of one of them is still to do; never after an error."""
        numbers = (number for name in tensors for number, _ in self._tasks.get(name, []))
        return not self.error and any(number not in self.done for number in numbers)

    def encoder_of(self, tensor: str) -> GridEncoder | None:
        """The encoder of a matrix when its codes can be chosen with care."""
        for _, piece in self._tasks.get(tensor, []):
            if is_choosable(piece.encoder):
                return piece.encoder
        return None

    def write(self, tensor: str) -> Iterator[tuple[int, Piece]]:
        """Yield every piece of a tensor with the open file that it is to be written to.

        Also those that an earlier run has written: the same bytes, for they follow from its inputs.
        """
        tasks = self._tasks.get(tensor, [])
        if not tasks:
            return
        with self.output.path.open("r+b", buffering=0) as file:
            for number, piece in tasks:
                yield file.fileno(), piece
                self._written.append(number)

    def finish_layer(self) -> None:
        """Note everything written as done: a layer's codes and scales belong together."""
        fresh = [number for number in self._written if number not in self.done]
        self.done.update(fresh)
        if fresh:
            self.output.record(fresh)
        self._written.clear()


@dataclass(frozen=True)
class _Target:
    """What the codes of a matrix are chosen by; `shift` is how its weights move first."""

    curvature: Curvature
    shift: Array | None


class CodedWeights:
    """The weights of one artifact as reference.Weights; a matrix is chosen when it is used.

    What goes through it has the source's own scale: factors that equalization folds are undone in
    what is multiplied with. Matrices of more than 6 bits, biases and norms count as the source's.
    """

    def __init__(
        self, source: reference.CheckpointWeights, checkpoint: Checkpoint, artifact: Calibrated,
        advance: Advance,
    ) -> None:  # fmt: skip
        self._source, self._checkpoint = source, checkpoint
        self._artifact, self._advance = artifact, advance
        self._inputs: Mapping[str, Array] = {}
        self._scales = Scales()

    def start(self, inputs: Mapping[str, Array], scales: Scales) -> None:
        """Begin a layer: the source's inputs [n, columns] of each matrix, and the factors."""
        self._inputs, self._scales = inputs, scales
        for name, values in scales.norms.items():
            with self._explaining(name):
                for descriptor, piece in self._artifact.write(name):
                    piece.encoder.write(descriptor, values[None], piece.first, piece.offsets)

    def look_up(self, name: str, ids: Sequence[int]) -> Array:
        """As the source's."""
        return self._source.look_up(name, ids)

    def read(self, name: str) -> Array:
        """As the source's."""
        return self._source.read(name)

    def project(self, name: str, inputs: Array) -> Array:
        """Choose the codes of a matrix by its inputs [n, in], write them, and multiply: [n, out].

        CheckpointError names a matrix that cannot be coded, BuildError a disk that is full.
        """
        outputs = np.empty((len(inputs), self._checkpoint.tensors[name].shape[0]), np.float32)
        for rows, values in self.code(name, inputs):
            outputs[:, rows] = inputs @ values.T
        return outputs

    def code(self, name: str, inputs: Array) -> Iterator[tuple[slice, Array]]:
        """Choose and write the codes of a matrix; yields which rows, and what they are worth."""
        with self._explaining(name):
            target = self._find_target(name, inputs)
            for descriptor, piece in self._artifact.write(name):
                rows = slice(piece.start, piece.start + piece.rows * piece.step, piece.step)
                yield rows, self._encode(descriptor, piece, rows, target)
        self._advance(self._checkpoint.tensors[name].nbytes)

    def _find_target(self, name: str, inputs: Array) -> _Target | None:
        """What a matrix's codes are chosen by; None where they are rounded."""
        artifact = self._artifact
        if artifact.quantization.method != "gptq" or artifact.encoder_of(name) is None:
            return None
        gram = inputs.T @ inputs
        shift = find_shift(self._inputs[name], inputs, gram)
        return _Target(factor(gram), shift)

    def _encode(self, descriptor: int, piece: Piece, rows: slice, target: _Target | None) -> Array:
        """Write rows of a matrix with their factors; returns what is multiplied with."""
        scales, encoder = self._scales, piece.encoder
        own = self._read(piece)
        stretch, divisor = scales.columns.get(piece.tensor), scales.rows.get(piece.tensor)
        scaled = own if divisor is None else own * divisor[rows, None]
        if not is_choosable(encoder):
            stretched = scaled if stretch is None else scaled * stretch
            encoder.write(descriptor, stretched, piece.first, piece.offsets)
            return own
        codes, grid = _choose(encoder, scaled, stretch, target)
        encoder.write_codes(descriptor, codes, grid, piece.first, piece.offsets)
        values = decode(codes, grid)
        if stretch is not None:
            values /= stretch
        if divisor is not None:
            values /= divisor[rows, None]
        return values

    def _read(self, piece: Piece) -> Array:
        """Rows of a piece as float32."""
        rows = np.empty((piece.rows, piece.columns), np.float32)
        for row, raw in read_piece(self._checkpoint, piece):
            rows[row - piece.first : row - piece.first + len(raw)] = to_float32(raw)
        return rows

    @contextmanager
    def _explaining(self, name: str) -> Iterator[None]:
        """Say which tensor cannot be coded, or that the disk is full."""
        try:
            yield
        except ValueError as error:
            raise CheckpointError(f"{self._checkpoint.folder}: {name}: {error}") from error
        except OSError as error:
            raise fileio.explain_write_error(error) from error


def _choose(
    encoder: GridEncoder, weights: Array, stretch: Array | None, target: _Target | None
) -> tuple[Codes, Grid]:
    """Codes of weights [rows, columns] on the grid of these times `stretch`."""
    if target is None:
        stretched = weights if stretch is None else weights * stretch
        grid = fit_together(encoder, stretched)
        return nearest(stretched, grid, encoder.bits), grid
    if target.shift is not None:
        weights = weights + weights @ target.shift
    importance = target.curvature.damped_importance
    if stretch is not None:
        importance = importance / stretch**2
    stretched = weights if stretch is None else weights * stretch
    grid = fit_together(encoder, stretched, importance)
    return choose_codes(weights, grid, encoder.bits, target.curvature, stretch), grid
