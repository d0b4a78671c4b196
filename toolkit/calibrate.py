"""Calibration: the codes of several artifacts, chosen in one pass of a text through the source.

Layer by layer: the source's own activations give each matrix's curvature (quantize/gptq.py), which
is the same for every format; each artifact then has its codes chosen on its own grid and written in
place. Only the activations at the last layer boundary are needed to go on, so they are what a
killed build leaves on disk; which tasks were done says the artifact's journal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from toolkit import fileio
from toolkit.checkpoint import Checkpoint, to_float32
from toolkit.decoder import Decoder
from toolkit.errors import CheckpointError, PhishipError
from toolkit.progress import Advance
from toolkit.quality import reference
from toolkit.quality.reference import Array
from toolkit.quality.texts import Text
from toolkit.quantize.equalize import find_stretch, make_foldable
from toolkit.quantize.gptq import Curvature, choose_codes, factor
from toolkit.quantize.grids import GridEncoder, fit_together, is_choosable, nearest
from toolkit.recipe import Quantization
from toolkit.stream import Output, Piece, list_tasks, read_piece

STATE = ".calibration-{}.npy"  # the layer whose inputs it holds
PARTIAL = ".calibration.partial"
SAMPLED_ROWS = 256  # of a matrix, to look for its columns' scales


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

    def open_tasks(self, tensor: str) -> list[tuple[int, Piece]]:
        """Tasks of a tensor that are still to do."""
        if self.error:
            return []
        return [task for task in self._tasks.get(tensor, []) if task[0] not in self.done]

    def encoder_of(self, tensor: str) -> GridEncoder | None:
        """The encoder of a matrix when its codes can be chosen with care."""
        for _, piece in self._tasks.get(tensor, []):
            if is_choosable(piece.encoder):
                return piece.encoder
        return None

    def write(self, tensor: str, encode: Callable[[int, Piece], None]) -> None:
        """Have the open tasks of a tensor written to the file that is given to `encode`."""
        tasks = self.open_tasks(tensor)
        if not tasks:
            return
        with self.output.path.open("r+b", buffering=0) as file:
            for number, piece in tasks:
                encode(file.fileno(), piece)
                self._written.append(number)

    def finish_layer(self) -> None:
        """Note everything written as done: a layer's scales belong together."""
        self.done.update(self._written)
        if self._written:
            self.output.record(self._written)
        self._written.clear()


@dataclass(frozen=True)
class Inputs:
    """What a text shows of a matrix's inputs X: gram = X'X, and mean |x| of each column."""

    gram: Array
    magnitudes: Array


@dataclass(frozen=True)
class Scales:
    """A layer's equalization: by tensor, factors of columns and rows, and norms as written."""

    columns: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, Array] = field(default_factory=dict)
    norms: dict[str, Array] = field(default_factory=dict)


class _Watched(reference.CheckpointWeights):
    """The source's weights, and what goes into each matrix of a layer that is watched."""

    def __init__(self, checkpoint: Checkpoint, advance: Advance) -> None:
        super().__init__(checkpoint, advance)
        self.inputs: dict[str, Inputs] | None = None

    def project(self, name: str, inputs: Array) -> Array:
        """As the source does; a watched layer's inputs are summed up."""
        if self.inputs is not None:
            self.inputs[name] = sum_up(inputs)
        return super().project(name, inputs)


def sum_up(inputs: Array) -> Inputs:
    """Sum up the inputs [n, columns] of a matrix."""
    return Inputs(inputs.T @ inputs, np.abs(inputs).mean(axis=0))


def calibrate(
    checkpoint: Checkpoint, decoder: Decoder, text: Text, artifacts: Sequence[Calibrated],
    folders: Sequence[Path], advance: Advance,
) -> None:  # fmt: skip
    """Choose and write the codes of every matrix of every artifact but the embedding's.

    Also every other weight that equalization changes. A killed run's state is looked for in all
    `folders` and kept in the first; at the end none is left. `advance` is told the bytes of
    weights: those of `bytes_to_do` in all, and at once those that an earlier run has done. An
    artifact that cannot be written gets its `error`; CheckpointError when the activations are not
    finite.
    """
    run = _Run(checkpoint, decoder, artifacts, advance)
    watched = _Watched(checkpoint, advance)
    rotation = reference.rotary_tables(decoder.rope, text.length)
    needed = run.first_open_layer()
    if run.is_done(needed):
        advance(bytes_to_do(checkpoint, decoder, artifacts))
        _remove_states(folders)
        return
    first, hidden = _resume(watched, decoder, text, folders, needed)
    advance(first * _layer_bytes(checkpoint, decoder) * (1 + len(artifacts)))
    for layer in range(first, decoder.layers):
        if all(artifact.error for artifact in artifacts):
            break
        watched.inputs = {} if run.wants(decoder.layer_matrices(layer)) else None
        hidden = reference.run_layer(watched, decoder, layer, hidden, rotation)
        if watched.inputs is not None:
            run.do_layer(layer, watched.inputs)
        _save(folders, layer + 1, hidden)
    watched.inputs = None
    if not decoder.is_tied and run.wants([decoder.head_name]):
        states = hidden.reshape(-1, decoder.hidden)
        inputs = sum_up(reference.norm(watched, decoder, decoder.names.final_norm, states))
        run.do_matrices({decoder.head_name: inputs}, [Scales() for _ in artifacts])
    _remove_states(folders)


def bytes_to_do(checkpoint: Checkpoint, decoder: Decoder, artifacts: Sequence[Calibrated]) -> int:
    """Bytes of weights that `calibrate` reports: each once for the text, once an artifact."""
    layers = decoder.layers * _layer_bytes(checkpoint, decoder)
    head = 0 if decoder.is_tied else checkpoint.tensors[decoder.head_name].nbytes
    return layers + len(artifacts) * (layers + head)


def _layer_bytes(checkpoint: Checkpoint, decoder: Decoder) -> int:
    return sum(checkpoint.tensors[name].nbytes for name in decoder.layer_matrices(0))


@dataclass(frozen=True)
class _Run:
    """What all layers share."""

    checkpoint: Checkpoint
    decoder: Decoder
    artifacts: Sequence[Calibrated]
    advance: Advance

    def wants(self, tensors: Sequence[str]) -> bool:
        """True when some artifact still has to write one of them."""
        return any(a.open_tasks(name) for a in self.artifacts for name in tensors)

    def first_open_layer(self) -> int:
        """The first layer that some artifact still needs; their number when none does."""
        layers = range(self.decoder.layers)
        open_layers = (n for n in layers if self.wants(self.decoder.layer_matrices(n)))
        return next(open_layers, self.decoder.layers)

    def is_done(self, needed: int) -> bool:
        """True when neither the layers nor the head wait for anything."""
        has_head = not self.decoder.is_tied and self.wants([self.decoder.head_name])
        return needed == self.decoder.layers and not has_head

    def do_layer(self, layer: int, inputs: dict[str, Inputs]) -> None:
        """Write all tensors of a layer that calibration changes."""
        scales = [self._find_scales(layer, inputs, artifact) for artifact in self.artifacts]
        for artifact, chosen in zip(self.artifacts, scales, strict=True):
            for name, norm in chosen.norms.items():
                self._write(artifact, name, None, chosen, norm)
        self.do_matrices(inputs, scales)

    def do_matrices(self, inputs: dict[str, Inputs], scales: Sequence[Scales]) -> None:
        """Choose codes matrix by matrix; what is not needed any more is dropped on the way."""
        for name in list(inputs):
            gram = inputs.pop(name).gram
            wanting = [a for a in self.artifacts if a.open_tasks(name)]
            curvature = None
            if any(a.quantization.method == "gptq" and a.encoder_of(name) for a in wanting):
                curvature = self._factor(name, gram)
            del gram
            for artifact, chosen in zip(self.artifacts, scales, strict=True):
                self._write(artifact, name, curvature, chosen)
        for artifact in self.artifacts:
            artifact.finish_layer()

    def _factor(self, name: str, gram: Array) -> Curvature:
        try:
            return factor(gram)
        except ValueError as error:
            raise CheckpointError(f"{self.checkpoint.folder}: {name}: {error}") from error

    def _write(
        self, artifact: Calibrated, name: str, curvature: Curvature | None, scales: Scales,
        values: Array | None = None,
    ) -> None:  # fmt: skip
        """Write a tensor of one artifact: `values`, or the checkpoint's, scaled and coded."""
        stretch = scales.columns.get(name)
        used = curvature if artifact.quantization.method == "gptq" else None

        def encode(descriptor: int, piece: Piece) -> None:
            rows = self._read(piece, scales) if values is None else values[None]
            _encode(descriptor, rows, piece, used, stretch)

        try:
            artifact.write(name, encode)
        except ValueError as error:
            artifact.error = CheckpointError(f"{self.checkpoint.folder}: {name}: {error}")
        except OSError as error:
            artifact.error = fileio.explain_write_error(error)
        if values is None:
            self.advance(self.checkpoint.tensors[name].nbytes)

    def _read(self, piece: Piece, scales: Scales) -> Array:
        """Rows of a piece as float32, times the rows' factors."""
        rows = np.empty((piece.rows, piece.columns), np.float32)
        for row, raw in read_piece(self.checkpoint, piece):
            rows[row - piece.first : row - piece.first + len(raw)] = to_float32(raw)
        if piece.tensor in scales.rows:
            rows *= scales.rows[piece.tensor][piece.start : piece.start + piece.rows, None]
        return rows

    def _find_scales(self, layer: int, inputs: dict[str, Inputs], artifact: Calibrated) -> Scales:
        """A layer's scales for one artifact: none where it asks for none, or has all it needs."""
        is_open = any(map(artifact.open_tasks, self.decoder.layer_matrices(layer)))
        if not (artifact.quantization.equalize and is_open):
            return Scales()
        try:
            return self._equalize(layer, inputs, artifact)
        except ValueError as error:
            where = f"{self.checkpoint.folder}: layer {layer}"
            artifact.error = CheckpointError(f"{where}: equalization: {error}")
            return Scales()

    def _equalize(self, layer: int, inputs: dict[str, Inputs], artifact: Calibrated) -> Scales:
        """Find the scales of one layer for one artifact's grids.

        They go from a norm to what it feeds, from the values to the attention's output, from the up
        projection to the down projection. Values that several heads share have one scale for all.
        """
        scales, decoder, names = Scales(), self.decoder, self.decoder.names
        qkv, out, gate_up, down = decoder.layer_matrices(layer)
        for pattern, matrix in ((names.attention_norm, qkv), (names.mlp_norm, gate_up)):
            norm = pattern.format(layer)
            stretch = self._find(artifact, matrix, inputs[matrix], inputs[matrix].magnitudes)
            exact, folded = make_foldable(stretch, self.checkpoint.read(norm))
            scales.columns[matrix], scales.norms[norm] = exact, folded
        # [kv_heads, heads that share values, head_dim]
        shape = (decoder.kv_heads, decoder.heads // decoder.kv_heads, decoder.head_dim)
        shared = inputs[out].magnitudes.reshape(shape).max(axis=1, keepdims=True)
        magnitudes = np.ascontiguousarray(np.broadcast_to(shared, shape)).reshape(-1)
        scales.columns[out] = self._find(artifact, out, inputs[out], magnitudes)
        values = scales.columns[out].reshape(shape)[:, 0].reshape(-1)
        scales.rows[qkv] = _divide_last(decoder.qkv_rows, values)
        scales.columns[down] = self._find(artifact, down, inputs[down], inputs[down].magnitudes)
        scales.rows[gate_up] = _divide_last(2 * decoder.intermediate, scales.columns[down])
        return scales

    def _find(self, artifact: Calibrated, matrix: str, inputs: Inputs, magnitudes: Array) -> Array:
        """The factors of a matrix's columns; ones where its weights are not coded."""
        encoder = artifact.encoder_of(matrix)
        if encoder is None:
            return np.ones(len(magnitudes), np.float32)
        rows = self.checkpoint.tensors[matrix].shape[0]
        step = max(1, rows // SAMPLED_ROWS)
        sample = [
            to_float32(raw)
            for row in range(0, rows, step)
            for _, raw in self.checkpoint.read_rows(matrix, row, 1)
        ]
        return find_stretch(np.concatenate(sample), encoder, inputs.gram, magnitudes)


def _divide_last(rows: int, factors: Array) -> Array:
    """Factors of a matrix's rows: those of the last ones are divided by."""
    scales = np.ones(rows, np.float32)
    scales[rows - len(factors) :] /= factors
    return scales


def _encode(
    descriptor: int, rows: Array, piece: Piece, curvature: Curvature | None, stretch: Array | None
) -> None:
    """Write rows of a piece, their columns stretched, with codes by curvature where it is given."""
    stretched = rows if stretch is None else rows * stretch
    encoder = piece.encoder
    if not is_choosable(encoder):
        encoder.write(descriptor, stretched, piece.first, piece.offsets)
        return
    if curvature is None:
        grid = fit_together(encoder, stretched)
        codes = nearest(stretched, grid, encoder.bits)
    else:
        weighted = curvature.damped_importance
        if stretch is not None:
            weighted = weighted / stretch**2
        grid = fit_together(encoder, stretched, weighted)
        codes = choose_codes(rows, grid, encoder.bits, curvature, stretch)
    encoder.write_codes(descriptor, codes, grid, piece.first, piece.offsets)


def _resume(
    watched: _Watched, decoder: Decoder, text: Text, folders: Sequence[Path], needed: int
) -> tuple[int, Array]:
    """A layer not behind the needed one, and its inputs [texts, n, hidden].

    The newest that a killed run has left; else the first layer's.
    """
    for path in _states(folders):
        if (layer := _layer_of(path)) <= needed:
            return layer, np.load(path)
    for ids in text.sequences:
        reference.check_ids(decoder, ids)
    return 0, np.stack([reference.embed(watched, decoder, ids) for ids in text.sequences])


def _save(folders: Sequence[Path], layer: int, hidden: Array) -> None:
    """Keep the inputs of a layer, in place of those of other layers."""
    partial, state = folders[0] / PARTIAL, folders[0] / STATE.format(layer)
    with partial.open("wb") as file:
        np.save(file, hidden)
    partial.replace(state)
    for path in _states(folders):
        if path != state:
            path.unlink()


def _states(folders: Sequence[Path]) -> list[Path]:
    """Saved states, the newest first; killed runs leave some in the folders of their artifacts."""
    found = (path for folder in folders for path in folder.glob(STATE.format("*")))
    return sorted(found, key=_layer_of, reverse=True)


def _remove_states(folders: Sequence[Path]) -> None:
    for path in _states(folders):
        path.unlink()
    for folder in folders:
        (folder / PARTIAL).unlink(missing_ok=True)


def _layer_of(state: Path) -> int:
    return int(state.stem.rpartition("-")[2])
