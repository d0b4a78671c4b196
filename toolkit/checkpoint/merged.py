"""A checkpoint with an adapter merged into its rows as they are read.

Sums are float32 and are not rounded back to the checkpoint's dtype, but for the embedding's: every
format stores rows of an embedding in the checkpoint's own type.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import PIECE_WEIGHTS, Checkpoint, to_float32
from toolkit.checkpoint.config import Config
from toolkit.checkpoint.lora import EMBEDDING, HEAD, Adapter, Change, Floats, read_adapter


@dataclass
class MergedCheckpoint(Checkpoint):
    """A checkpoint whose tensors come with an adapter's changes."""

    base: Checkpoint = field(kw_only=True)
    adapter: Adapter = field(kw_only=True)
    parts: Checkpoint = field(kw_only=True, repr=False)
    lengths: dict[str, Floats] = field(kw_only=True, repr=False)  # of columns; by all threads
    _latest: dict[Change, tuple[Floats, Floats]] = field(default_factory=dict, repr=False)

    @property
    def adapter_digest(self) -> str:
        """Hex sha256 of the adapter that is merged in."""
        return self.adapter.digest

    @property
    def files(self) -> list[str]:
        """Names of the files that the base's weights lie in."""
        return self.base.files

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's folder where that has a tokenizer: it was trained with it."""
        return self.adapter.folder if self.adapter.has_tokenizer else self.base.tokenizer_folder

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The base's, and the end of a text of the adapter's tokenizer, where it has one."""
        ids = super().stop_ids
        end = self.tokenizer_config.get("eos_token") if self.adapter.has_tokenizer else None
        text = end.get("content") if isinstance(end, dict) else end
        return tuple(dict.fromkeys([*ids, *(self._added_ids(text) if text else ())]))

    def config_bytes(self) -> bytes:
        """config.json, as an artifact has it."""
        return self.base.config_bytes() if self.config is self.base.config else self.dump_config()

    def reopen(self) -> "MergedCheckpoint":
        """The same with files and buffers of its own."""
        return _join(self.base.reopen(), self.adapter, self.lengths)

    def close(self) -> None:
        """Close every file that was opened for reading."""
        self.base.close()
        self.parts.close()

    def fingerprint(self) -> str:
        """Hex sha256 over the checkpoint's own and the adapter's digest."""
        return hashlib.sha256(
            f"{self.base.fingerprint()} {self.adapter.digest}".encode()
        ).hexdigest()

    def read_rows(
        self, name: str, start: int = 0, count: int | None = None, piece: int = PIECE_WEIGHTS
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """As the checkpoint's own; rows of a tensor with changes come in the type it then has."""
        total = math.prod(self.tensors[name].shape[:-1])
        stop = total if count is None else start + count
        if not 0 <= start <= stop <= total:
            raise IndexError(f"{name}: rows {start} to {stop}; it has {total}")
        stored = EMBEDDING if name == HEAD and self.adapter.is_untied else name
        for change, begin, end in _cut(self.adapter.changes.get(name, ()), start, stop):
            source, origin, first = self.base, stored, 0
            if change and change.saved:
                source, origin, first = self.parts, change.saved, change.start
            if change and change.a:
                self._read_pair(change)  # before rows of the same file are in its buffer
            # Half the weights: beside the rows stands what is added to them.
            step = piece // 2 if change else piece
            for row, raw in source.read_rows(origin, begin - first, end - begin, step):
                rows = self._apply(name, change, first + row, raw) if change else raw
                yield first + row, _convert(rows, self.tensors[name].dtype)

    def _apply(self, name: str, change: Change, row: int, raw: NDArray[Any]) -> NDArray[Any]:
        """Rows of a tensor from `row` on, with a change that is of all of them."""
        if change.tokens:
            return self._replace(change, row, raw)
        if not change.a:
            return raw
        merged = self._add(change, row, raw)
        if change.magnitude:
            wanted = self.parts.read(change.magnitude)
            if change.is_embedding:
                merged *= wanted / self._measure_columns(name, change)
            else:
                place = row - change.start
                lengths = np.sqrt(np.einsum("ij,ij->i", merged, merged))
                merged *= (wanted[place : place + len(merged)] / lengths)[:, None]
        return merged

    def _replace(self, change: Change, row: int, raw: NDArray[Any]) -> Floats:
        """Rows with those of the trained tokens in their place."""
        rows, tokens = to_float32(raw), self.parts.read(change.tokens)
        for token, values in zip(change.indices, tokens, strict=True):
            if row <= token < row + len(rows):
                rows[token - row] = values
        return rows

    def _add(self, change: Change, row: int, raw: NDArray[Any]) -> Floats:
        """Rows of W + scale * B A."""
        a, b = self._read_pair(change)
        place = row - change.start
        merged: Floats = b[place : place + len(raw)] @ a
        merged += to_float32(raw)
        return merged

    def _read_pair(self, change: Change) -> tuple[Floats, Floats]:
        """A, and B with the scale; those of the latest change are kept."""
        if change not in self._latest:
            self._latest = {change: change.read(self.parts)}
        return self._latest[change]

    def _measure_columns(self, name: str, change: Change) -> Floats:
        """Lengths of the columns of an embedding with its update, as DoRA of embeddings has them.

        One pass over the whole matrix; what it found is kept.
        """
        if name not in self.lengths:
            source, origin = (self.base, name)
            if change.saved:
                source, origin = self.parts, change.saved
            total = np.zeros(self.tensors[name].shape[-1])
            for row, raw in source.read_rows(origin, piece=PIECE_WEIGHTS // 2):
                rows = self._add(change, row, raw)
                total += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
            self.lengths[name] = np.sqrt(total).astype(np.float32)
        return self.lengths[name]


def merge(base: Checkpoint, folder: Path) -> MergedCheckpoint:
    """The checkpoint with an adapter merged in.

    CheckpointError when the adapter is damaged, or matches nothing of the checkpoint, or has other
    shapes; UnsupportedError when it is of a kind that is not read.
    """
    shapes = {name: info.shape for name, info in base.tensors.items()}
    is_tied = base.config.flag("tie_word_embeddings", HEAD not in shapes)
    adapter = read_adapter(folder, shapes, str(base.folder), is_tied=is_tied)
    return _join(base, adapter, {})


def find_adapter(checkpoint: Checkpoint) -> Adapter | None:
    """The adapter that a checkpoint comes with, if any."""
    return checkpoint.adapter if isinstance(checkpoint, MergedCheckpoint) else None


def without_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """What the adapter was merged into; a checkpoint without one is that itself."""
    return checkpoint.base if isinstance(checkpoint, MergedCheckpoint) else checkpoint


def _join(base: Checkpoint, adapter: Adapter, lengths: dict[str, Floats]) -> MergedCheckpoint:
    tensors = dict(base.tensors)
    if adapter.is_untied:
        tensors[HEAD] = replace(base.tensors[EMBEDDING], name=HEAD)
    for name, shape in adapter.shapes.items():
        dtype = tensors[name].dtype if name == EMBEDDING else "F32"
        tensors[name] = replace(tensors[name], dtype=dtype, shape=shape)
    return MergedCheckpoint(
        base.folder, _change_config(base.config, adapter), tensors, base.revision,
        base=base, adapter=adapter, parts=adapter.open(), lengths=lengths,
    )  # fmt: skip


def _change_config(config: Config, adapter: Adapter) -> Config:
    """The same with the vocabulary that the adapter has, and an untied head where it has one."""
    changes: dict[str, Any] = {"vocab_size": adapter.vocab} if adapter.vocab else {}
    if adapter.is_untied:
        changes["tie_word_embeddings"] = False
    return replace(config, fields={**config.fields, **changes}) if changes else config


def _cut(
    changes: Sequence[Change], start: int, stop: int
) -> Iterator[tuple[Change | None, int, int]]:
    """Rows `start` to `stop` in ranges that are of one change, or of none, each."""
    place = start
    for change in changes:
        begin, end = max(change.start, place), min(change.start + change.count, stop)
        if begin >= end:
            continue
        if place < begin:
            yield None, place, begin
        yield change, begin, end
        place = end
    if place < stop:
        yield None, place, stop


def _convert(rows: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Rows in a type of safetensors, rounded to nearest even where it is narrower."""
    if dtype == "F32":
        return rows if rows.dtype == np.float32 else to_float32(rows)
    if dtype == "F16":
        wide = to_float32(rows) if rows.dtype == np.uint16 else rows
        return wide.astype(np.float16, copy=False)
    if rows.dtype != np.float32:
        return rows if rows.dtype == np.uint16 else _convert(rows.astype(np.float32), dtype)
    bits = rows.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
