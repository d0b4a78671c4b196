"""Rows of a tensor as ggml stores them, by ggml's own kernels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import to_float32
from toolkit.formats.gguf import blocks, q4_0
from toolkit.formats.gguf.ggml import load_library
from toolkit.formats.gguf.mix import GgmlType
from toolkit.quantize.grids import Grid
from toolkit.quantize.kernels import Codes, Floats, narrow
from toolkit.stream import write_rows

# A kernel call takes about this many weights, so that they stay in a core's L2 as float32.
CHUNK_WEIGHTS = 1 << 17
WIDE_TYPES = (GgmlType.F32, GgmlType.BF16)
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class _Magnitudes:
    """A float type's bits without the sign, which order like the magnitudes."""

    unsigned: str
    mask: int
    infinity: int
    largest: int  # that every type holds
    largest_half: int  # that types with float16 inside hold: 65504


MAGNITUDES: dict[np.dtype[Any], _Magnitudes] = {
    np.dtype("<u2"): _Magnitudes("<u2", 0x7FFF, 0x7F80, 0x7F7F, 0x477F),  # bf16 as bits
    np.dtype("<f2"): _Magnitudes("<u2", 0x7FFF, 0x7C00, 0x7BFF, 0x7BFF),
    np.dtype("<f4"): _Magnitudes("<u4", 0x7FFFFFFF, 0x7F800000, 0x7F7F0000, 0x477FE000),
}


@dataclass(frozen=True)
class GgmlEncoder:
    """Writes rows in one ggml type; byte for byte what llama-quantize makes of the same weights."""

    kind: GgmlType

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Encode and write rows; ValueError on Inf, NaN and weights the type cannot hold."""
        rows, columns = raw.shape
        encoded = np.empty((rows, self.kind.row_bytes(columns)), np.uint8)
        if not (self.kind == GgmlType.Q4_0 and q4_0.quantize(raw, encoded, LARGEST_HALF)):
            step = max(1, CHUNK_WEIGHTS // columns)
            for first in range(0, rows, step):
                part = raw[first : first + step]
                self._require_range(part, row + first)
                self._encode(part, encoded[first : first + step])
        write_rows(descriptor, encoded, row, offsets[0])

    def _encode(
        self, raw: NDArray[Any], encoded: NDArray[np.uint8], importance: Floats | None = None
    ) -> None:
        if self.kind == GgmlType.BF16 and raw.dtype == np.uint16:
            encoded[:] = raw.view(np.uint8)
        elif self.kind == GgmlType.F16:
            narrow(to_float32(raw), encoded.view("<f2"))
        else:
            wide = to_float32(raw)
            source, target = wide.ctypes.data, encoded.ctypes.data
            weighted = None if importance is None else importance.ctypes.data
            load_library().ggml_quantize_chunk(self.kind, source, target, 0, *wide.shape, weighted)

    def _require_range(self, raw: NDArray[Any], row: int) -> None:
        """ggml looks neither at its input nor at the scales it makes."""
        known = MAGNITUDES[raw.dtype]
        limit = known.largest if self.kind in WIDE_TYPES else known.largest_half
        magnitudes = raw.view(known.unsigned) & known.mask
        if magnitudes.max() <= limit:
            return
        bad_row, column = np.argwhere(magnitudes > limit)[0]
        where = f"in row {row + bad_row}, column {column}"
        if magnitudes[bad_row, column] >= known.infinity:
            raise ValueError(f"non-finite weight (NaN or Inf) {where}")
        raise ValueError(f"weight too large for {self.kind.name} (65504 at most) {where}")


@dataclass(frozen=True)
class GridBlocks(GgmlEncoder):
    """A type whose codes others may choose; the rest of a block stays ggml's choice."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return blocks.BLOCKS[self.kind].bits

    def fit(self, weights: Floats, importance: Floats | None = None) -> Grid:
        """The grid of ggml's own kernel, which weighs columns by `importance` as by an imatrix."""
        encoded = np.empty((len(weights), self.kind.row_bytes(weights.shape[1])), np.uint8)
        self._require_range(weights, 0)
        self._encode(weights, encoded, importance)
        return blocks.read_grid(self.kind, encoded)

    def write_codes(
        self, descriptor: int, codes: Codes, grid: Grid, row: int, offsets: tuple[int, ...]
    ) -> None:
        """Write ggml's blocks with other codes, one a byte."""
        write_rows(descriptor, blocks.put_codes(self.kind, grid.stored[0], codes), row, offsets[0])


def choose_encoder(kind: GgmlType) -> GgmlEncoder:
    """The encoder of a type."""
    return GridBlocks(kind) if kind in blocks.BLOCKS else GgmlEncoder(kind)
