"""Rows of a tensor as ggml stores them, by ggml's own kernels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import to_float32
from toolkit.formats.gguf.ggml import load_library
from toolkit.formats.gguf.mix import GgmlType
from toolkit.stream import write_rows

# A kernel call takes about this many weights, so that they stay in a core's L2 as float32.
CHUNK_WEIGHTS = 1 << 16
# Bits of the magnitude, and the least of them that is Inf or NaN
MAGNITUDES: dict[np.dtype[Any], tuple[str, int, int]] = {
    np.dtype("<u2"): ("<u2", 0x7FFF, 0x7F80),  # bf16 as bits
    np.dtype("<f2"): ("<u2", 0x7FFF, 0x7C00),
    np.dtype("<f4"): ("<u4", 0x7FFFFFFF, 0x7F800000),
}


@dataclass(frozen=True)
class GgmlEncoder:
    """Writes rows in one ggml type; byte for byte what llama-quantize makes of the same weights."""

    kind: GgmlType

    def write(self, descriptor: int, raw: NDArray[Any], row: int, offsets: tuple[int, ...]) -> None:
        """Encode and write rows; ValueError on Inf, NaN and weights the type cannot hold."""
        rows, columns = raw.shape
        encoded = _buffer(rows * self.kind.row_bytes(columns)).reshape(rows, -1)
        step = max(1, CHUNK_WEIGHTS // columns)
        for first in range(0, rows, step):
            part = raw[first : first + step]
            _check_finite(part, row + first)
            self._encode(part, encoded[first : first + step], row + first)
        write_rows(descriptor, encoded, row, offsets[0])

    def _encode(self, raw: NDArray[Any], encoded: NDArray[np.uint8], row: int) -> None:
        if self.kind == GgmlType.BF16 and raw.dtype == np.uint16:
            encoded[:] = raw.view(np.uint8)
            return
        library, wide = load_library(), to_float32(raw)
        source, target = wide.ctypes.data, encoded.ctypes.data
        if self.kind == GgmlType.F16:  # ggml_quantize_chunk makes the same, 13 times slower
            library.ggml_cpu_fp32_to_fp16(source, target, wide.size)
        else:
            library.ggml_quantize_chunk(self.kind, source, target, 0, *wide.shape, None)
        if not library.ggml_validate_row_data(self.kind, target, encoded.size):
            raise ValueError(f"row {row} and following: a weight is too large for {self.kind.name}")


def _check_finite(raw: NDArray[Any], row: int) -> None:
    """Look at the raw bits: faster than isfinite, and without a float copy."""
    unsigned, mask, least = MAGNITUDES[raw.dtype]
    magnitudes = raw.view(unsigned) & mask
    if magnitudes.max() >= least:
        bad_row, column = np.argwhere(magnitudes >= least)[0]
        raise ValueError(f"non-finite weight (NaN or Inf) in row {row + bad_row}, column {column}")


_buffers: dict[str, NDArray[np.uint8]] = {}


def _buffer(size_bytes: int) -> NDArray[np.uint8]:
    """The process's output buffer, grown as needed."""
    if "encoded" not in _buffers or _buffers["encoded"].size < size_bytes:
        _buffers["encoded"] = np.empty(size_bytes, np.uint8)
    return _buffers["encoded"][:size_bytes]
