"""Calibration: the codes of several artifacts, chosen in one pass of a text through the source.

Layer by layer: the source's own activations go through a layer first, then each artifact's through
its own weights, whose codes are chosen on the way (coding.py). So the source is read once for all,
and what a killed build leaves on disk are the activations at the last layer boundary, the source's
and the artifact's; which tasks were done says the artifact's journal.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from toolkit.checkpoint import Checkpoint
from toolkit.coding import Calibrated, CodedWeights
from toolkit.decoder import Decoder
from toolkit.errors import CheckpointError, PhishipError
from toolkit.progress import Advance
from toolkit.quality import reference
from toolkit.quality.reference import Array
from toolkit.quality.texts import Text
from toolkit.quantize.gptq import NOT_FINITE
from toolkit.scales import Equalizer, Scales

STATE = ".calibration-{}.npy"  # the layer whose inputs it holds: the source's, the artifact's
PARTIAL = ".calibration.partial"


class WatchedWeights(reference.CheckpointWeights):
    """The source's weights, and what goes into each matrix of a layer: `inputs`, by name."""

    def __init__(self, checkpoint: Checkpoint, advance: Advance) -> None:
        super().__init__(checkpoint, advance)
        self.folder = checkpoint.folder
        self.inputs: dict[str, Array] = {}

    def project(self, name: str, inputs: Array) -> Array:
        """As the source does; CheckpointError when an input is not finite."""
        self.require_finite(name, inputs)
        self.inputs[name] = inputs
        return super().project(name, inputs)

    def require_finite(self, name: str, inputs: Array) -> None:
        """CheckpointError when the inputs of a matrix, or their squares, are not finite."""
        if not np.isfinite(np.vdot(inputs, inputs)):
            raise CheckpointError(f"{self.folder}: {name}: {NOT_FINITE}")


def calibrate(
    checkpoint: Checkpoint, decoder: Decoder, text: Text, artifacts: Sequence[Calibrated],
    folders: Sequence[Path], advance: Advance,
) -> None:  # fmt: skip
    """Choose and write the codes of every matrix of every artifact but the embedding's.

    Also every other weight that equalization changes. A killed run's state is looked for, and kept,
    in the folder of each artifact; at the end none is left. `advance` is told the bytes of weights:
    those of `bytes_to_do` in all, and at once those that an earlier run has done. An artifact that
    cannot be written gets its `error`; CheckpointError when the activations are not finite.
    """
    run = _Run(checkpoint, decoder, artifacts, folders, advance)
    run.resume(text)
    rotation = reference.rotary_tables(decoder.rope, text.length)
    while run.layer < decoder.layers and run.live:
        run.do_layer(rotation)
    if not decoder.is_tied:
        run.do_head()
    run.remove_states()


def bytes_to_do(checkpoint: Checkpoint, decoder: Decoder, artifacts: Sequence[Calibrated]) -> int:
    """Bytes of weights that `calibrate` reports: each once for the text, once an artifact."""
    layers = decoder.layers * _layer_bytes(checkpoint, decoder)
    head = 0 if decoder.is_tied else checkpoint.tensors[decoder.head_name].nbytes
    return layers + len(artifacts) * (layers + head)


def _layer_bytes(checkpoint: Checkpoint, decoder: Decoder) -> int:
    return sum(checkpoint.tensors[name].nbytes for name in decoder.layer_matrices(0))


@dataclass
class _Stream:
    """An artifact, the folder of its state, and what its layers have made of the text so far."""

    artifact: Calibrated
    folder: Path
    weights: CodedWeights
    hidden: Array = field(default_factory=lambda: np.empty(0, np.float32))

    def states(self) -> dict[int, Path]:
        """Saved states, by the layer whose inputs they hold."""
        found = self.folder.glob(STATE.format("*"))
        return {int(path.stem.rpartition("-")[2]): path for path in found}


class _Run:
    """One pass of a text; `live` are the artifacts that still wait for something."""

    def __init__(
        self, checkpoint: Checkpoint, decoder: Decoder, artifacts: Sequence[Calibrated],
        folders: Sequence[Path], advance: Advance,
    ) -> None:  # fmt: skip
        self.checkpoint, self.decoder, self.advance = checkpoint, decoder, advance
        self.source = WatchedWeights(checkpoint, advance)
        self.layer, self.hidden = 0, np.empty(0, np.float32)
        self.streams = [
            _Stream(one, folder, CodedWeights(self.source, checkpoint, one, advance))
            for one, folder in zip(artifacts, folders, strict=True)
        ]
        self.live = [s for s in self.streams if self._first_open(s.artifact) is not None]

    def resume(self, text: Text) -> None:
        """Take up the newest state that all live artifacts have; else begin with the text."""
        if not self.live:
            self.advance(bytes_to_do(*self._bytes_of(self.streams)))
            return
        found = [
            {
                layer
                for layer in stream.states()
                if layer <= (self._first_open(stream.artifact) or 0)
            }
            for stream in self.live
        ]
        self.layer = max(set.intersection(*found), default=0)
        each = _layer_bytes(self.checkpoint, self.decoder)
        idle = [stream for stream in self.streams if stream not in self.live]
        done = bytes_to_do(*self._bytes_of(idle)) - self.decoder.layers * each
        self.advance(done + self.layer * each * (1 + len(self.live)))
        if self.layer:
            for stream in self.live:
                self.hidden, stream.hidden = _load(stream.states()[self.layer])
            return
        for ids in text.sequences:
            reference.check_ids(self.decoder, ids)
        self.hidden = self._embed(self.source, text)
        for stream in self.live:
            stream.hidden = self._embed(stream.weights, text)

    def do_layer(self, rotation: tuple[Array, Array]) -> None:
        """Run the source's next layer, and each artifact's, whose codes are chosen and written."""
        source, decoder, layer = self.source, self.decoder, self.layer
        source.inputs = {}
        self.hidden = reference.run_layer(source, decoder, layer, self.hidden, rotation)
        for stream in list(self.live):
            with self._giving_up(stream):
                stream.weights.start(source.inputs, self._find_scales(stream.artifact))
                stream.hidden = reference.run_layer(
                    stream.weights, decoder, layer, stream.hidden, rotation
                )
                stream.artifact.finish_layer()
        source.inputs = {}
        self.layer += 1
        self._save()

    def do_head(self) -> None:
        """Choose and write the codes of a head that is no embedding."""
        name, final = self.decoder.head_name, self.decoder.names.final_norm
        own: Array | None = None
        for stream in list(self.live):
            if not stream.artifact.is_open([name]):
                continue
            if own is None:
                own = self._flat_norm(final, self.hidden)
                self.source.require_finite(name, own)
            with self._giving_up(stream):
                stream.weights.start({name: own}, Scales())
                for _ in stream.weights.code(name, self._flat_norm(final, stream.hidden)):
                    pass
                stream.artifact.finish_layer()

    def remove_states(self) -> None:
        """Leave no state of any artifact."""
        for stream in self.streams:
            for path in stream.states().values():
                path.unlink()
            (stream.folder / PARTIAL).unlink(missing_ok=True)

    def _first_open(self, artifact: Calibrated) -> int | None:
        """The first layer that waits, their number where only the head does; None for neither."""
        for layer in range(self.decoder.layers):
            if artifact.is_open(self.decoder.layer_matrices(layer)):
                return layer
        has_head = not self.decoder.is_tied and artifact.is_open([self.decoder.head_name])
        return self.decoder.layers if has_head else None

    def _bytes_of(self, streams: Sequence[_Stream]) -> tuple[Checkpoint, Decoder, list[Calibrated]]:
        return self.checkpoint, self.decoder, [stream.artifact for stream in streams]

    def _embed(self, weights: reference.Weights, text: Text) -> Array:
        return np.stack([reference.embed(weights, self.decoder, ids) for ids in text.sequences])

    def _flat_norm(self, name: str, hidden: Array) -> Array:
        states = hidden.reshape(-1, self.decoder.hidden)
        return reference.norm(self.source, self.decoder, name, states)

    def _find_scales(self, artifact: Calibrated) -> Scales:
        """The layer's scales for one artifact: none where it asks for none."""
        if not artifact.quantization.equalize:
            return Scales()
        equalizer = Equalizer(self.checkpoint, self.decoder, artifact.encoder_of)
        try:
            return equalizer.find(self.layer, self.source.inputs)
        except ValueError as error:
            where = f"{self.checkpoint.folder}: layer {self.layer}"
            raise CheckpointError(f"{where}: equalization: {error}") from error

    @contextmanager
    def _giving_up(self, stream: _Stream) -> Iterator[None]:
        """An artifact that cannot be written is left; the others go on."""
        try:
            yield
        except PhishipError as error:
            stream.artifact.error = error
            self.live.remove(stream)

    def _save(self) -> None:
        """Keep the inputs of the next layer in every folder, then drop those of layers before."""
        for stream in self.live:
            partial = stream.folder / PARTIAL
            with partial.open("wb") as file:
                np.save(file, self.hidden)
                np.save(file, stream.hidden)
            partial.replace(stream.folder / STATE.format(self.layer))
        for stream in self.live:
            for layer, path in stream.states().items():
                if layer != self.layer:
                    path.unlink()


def _load(path: Path) -> tuple[Array, Array]:
    """The source's inputs of a layer, and the artifact's: [texts, n, hidden] each."""
    with path.open("rb") as file:
        return np.load(file), np.load(file)
