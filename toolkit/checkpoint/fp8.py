"""Checkpoints of 8-bit floats (F8_E4M3) with scales, read as float32.

A weight is its code times its scale: one for the tensor, one for each row, or one for each block
of rows and columns. Sources: OCP 8-bit floating point specification 1.0 (E4M3); FP8Linear of
transformers, compressed-tensors' float-quantized format, ModelOpt.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import PIECE_WEIGHTS, Checkpoint
from toolkit.checkpoint.config import Config
from toolkit.checkpoint.quantized import read_block
from toolkit.checkpoint.safetensors import FP8, TensorInfo
from toolkit.errors import CheckpointError

Floats = NDArray[np.float32]

SCALES = ("weight_scale_inv", "weight_scale")
# Of activations and caches, which stay floats here.
UNUSED = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale",
          "output_scale")  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """The name of a scale's tensor, and how many rows and columns share one."""

    name: str
    rows: int
    columns: int


@dataclass
class Fp8Checkpoint(Checkpoint):
    """A checkpoint whose 8-bit floats come as float32, scaled; `scales` by names of weights."""

    base: Checkpoint = field(kw_only=True)
    scales: Mapping[str, Scale] = field(kw_only=True)
    _latest: dict[str, Floats] = field(default_factory=dict, repr=False)

    @property
    def files(self) -> list[str]:
        """Names of the files that the weights lie in."""
        return self.base.files

    def reopen(self) -> "Fp8Checkpoint":
        """The same with files and buffers of its own, for another thread."""
        return replace(self, base=self.base.reopen(), _latest={})

    def close(self) -> None:
        """Close every file that was opened for reading."""
        self.base.close()

    def fingerprint(self) -> str:
        """That of the checkpoint as it is stored, scales too."""
        return self.base.fingerprint()

    def read_rows(
        self, name: str, start: int = 0, count: int | None = None, piece: int = PIECE_WEIGHTS
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """As the checkpoint's own; rows of 8-bit floats come as float32."""
        scale = self.scales.get(name)
        for row, raw in self.base.read_rows(name, start, count, piece):
            yield row, raw if scale is None else self._scale(scale, row, raw)

    def _scale(self, scale: Scale, row: int, codes: NDArray[Any]) -> Floats:
        if scale.name not in self._latest:
            self._latest = {scale.name: self.base.read(scale.name)}
        scales = self._latest[scale.name].reshape(-1, self._latest[scale.name].shape[-1])
        rows, columns = codes.shape
        places = (row + np.arange(rows)) // scale.rows
        values: Floats = list_values()[codes]
        if scale.columns >= columns:
            values *= scales.reshape(-1)[places][:, None]
        else:
            values *= np.repeat(scales[places], scale.columns, axis=1)[:, :columns]
        return values


def decode(stored: Checkpoint) -> Fp8Checkpoint:
    """A checkpoint with 8-bit floats, read as float32; CheckpointError where a scale is missing."""
    tensors = {  # a single scale may have no dimension at all
        name: info if info.shape else replace(info, shape=(1,))
        for name, info in stored.tensors.items()
    }
    base = replace(stored, tensors=tensors)
    names = [name for name, info in tensors.items() if info.dtype == FP8]
    where = str(stored.folder)
    scales = {name: _find_scale(where, stored.config, tensors, name) for name in names}
    used = {scale.name for scale in scales.values()}
    seen = {
        name: replace(info, dtype="F32") if name in scales else info
        for name, info in tensors.items()
        if name not in used and not name.endswith(tuple(f".{end}" for end in UNUSED))
    }
    return Fp8Checkpoint(
        stored.folder, stored.config, seen, stored.revision, base=base, scales=scales
    )


def _find_scale(where: str, config: Config, tensors: Mapping[str, TensorInfo], name: str) -> Scale:
    """The scale of a weight, its kind by its shape."""
    ends = (f"{name.removesuffix('weight')}{end}" for end in SCALES)
    found = next((end for end in ends if end in tensors), "")
    shape = tensors[name].shape
    if not found or len(shape) != 2:
        raise CheckpointError(
            f"{where}: {name}: {FP8} {list(shape)} without its scales; expected a matrix and "
            f"{' or '.join(SCALES)} beside it",
            advice="give the 16-bit checkpoint that it was made of",
        )
    (rows, columns), scale = shape, tensors[found].shape
    if scale in ((1,), (1, 1)):
        return Scale(found, rows, columns)
    if scale in ((rows,), (rows, 1)):
        return Scale(found, 1, columns)
    block = read_block(config)
    if block and scale == (-(-rows // block[0]), -(-columns // block[1])):
        return Scale(found, *block)
    raise CheckpointError(
        f"{where}: {found}: found {list(scale)} for {list(shape)}; expected one scale, one a row "
        f"[{rows}, 1], or blocks of quantization_config.weight_block_size ("
        f"{list(block) if block else 'not given'})",
        advice="give the 16-bit checkpoint that it was made of",
    )


@cache
def list_values() -> Floats:
    """What each of the 256 codes stands for: sign, 4 bits of exponent, 3 of mantissa."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    values = np.where(exponent == 0, np.ldexp(mantissa / 8, -6), normal)
    values = np.where((codes & 127) == 127, np.nan, values)
    found: Floats = np.where(codes & 128, -values, values).astype(np.float32)
    return found
