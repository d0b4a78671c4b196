"""The grids of all formats: what is written from codes is what the format's own reader decodes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit.formats.gguf.blocks import BLOCKS
from toolkit.formats.gguf.encoder import GridBlocks
from toolkit.formats.gguf.mix import GgmlType
from toolkit.formats.mlx.encoders import Groups
from toolkit.formats.onnx.encoders import Blocks
from toolkit.formats.openvino.encoders import Asymmetric, Symmetric
from toolkit.quantize.grids import GridEncoder, decode, nearest

ROWS, COLUMNS = 6, 512


def make_weights(seed: int = 0) -> Any:
    """Weights with a few large ones, a group of zeros and a group of one sign."""
    weights = np.random.default_rng(seed).standard_t(4, (ROWS, COLUMNS)).astype(np.float32)
    weights[0, :32] = 0
    weights[1, 32:64] = np.abs(weights[1, 32:64]) + 1
    return weights


AFFINE: dict[str, tuple[GridEncoder, int]] = {
    "onnx-sym": (Blocks(4, 32, True, "float32"), 2),
    "onnx-asym": (Blocks(4, 64, False, "float32"), 3),
    "onnx-half": (Blocks(4, 32, True, "float16"), 2),
    "onnx-8": (Blocks(8, 32, False, "float32"), 3),
    "openvino-sym": (Symmetric(128), 2),
    "openvino-asym": (Asymmetric(4, 64, 4), 3),
    "openvino-8": (Asymmetric(8, COLUMNS, 8), 3),
    **{f"mlx-{bits}": (Groups(bits, 64, "bf16"), 3) for bits in (2, 3, 4, 6, 8)},
}


def write(path: Path, encoder: Any, count: int, *, codes: Any, raw: Any) -> bytes:
    """What `write` (raw given) or `write_codes` puts into a file, parts a megabyte apart."""
    offsets = tuple(part << 20 for part in range(count))
    with path.open("w+b", buffering=0) as file:
        file.truncate(count << 20)
        if raw is None:
            encoder.write_codes(file.fileno(), codes[0], codes[1], 0, offsets)
        else:
            encoder.write(file.fileno(), raw, 0, offsets)
    return path.read_bytes()


@pytest.mark.parametrize("name", AFFINE)
def test_nearest_codes_are_those_of_the_format(tmp_path, name):
    encoder, count = AFFINE[name]
    weights = make_weights()
    # As a checkpoint in bf16 or float16 has them, which a writer may round its input to.
    weights.view(np.uint32)[:] &= 0xFFFF0000
    grid = encoder.fit(weights)
    codes = nearest(weights, grid, encoder.bits)
    chosen = write(tmp_path / "a", encoder, count, codes=(codes, grid), raw=None)
    direct = write(tmp_path / "b", encoder, count, codes=None, raw=weights)
    # Scales and zero points are equal. Codes differ where a format rounds ties its own way, or has
    # a grid that is not yet rounded to the type it is stored in: in MLX many, for a bf16 bias lies
    # up to half a step of 8 bits off.
    assert chosen[1 << 20 :] == direct[1 << 20 :]
    first, other = (np.frombuffer(data[: 1 << 20], np.uint8) for data in (chosen, direct))
    limit = 0.6 * codes.size if "mlx" in name else 0.03 * codes.size
    assert np.count_nonzero(first != other) < limit
    error = np.abs(decode(codes, grid) - weights).reshape(*grid.steps.shape, -1)
    if "mlx" not in name:  # whose ends a bf16 bias moves by more than half a step
        limit = (
            np.abs(grid.steps[..., None]) * (0.6 if "asym" in name or "-8" in name else 1.01) + 1e-7
        )
        assert (error <= limit).all()


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_ggml_grids_are_those_of_gguf_py(tmp_path, kind):
    import gguf

    encoder = GridBlocks(kind)
    weights = make_weights()
    grid = encoder.fit(weights)
    codes = np.random.default_rng(1).integers(0, 1 << encoder.bits, weights.shape, np.uint8)
    for chosen in (codes, nearest(weights, grid, encoder.bits)):
        data = write(tmp_path / "a", encoder, 1, codes=(chosen, grid), raw=None)
        encoded = np.frombuffer(data[: ROWS * kind.row_bytes(COLUMNS)], np.uint8)
        read = gguf.quants.dequantize(
            encoded.reshape(ROWS, -1), gguf.GGMLQuantizationType(int(kind))
        )
        # The same products of the same float32 numbers; K-quants are summed in another order.
        assert np.abs(read - decode(chosen, grid)).max() <= 1e-5 * np.abs(read).max()
    assert np.abs(read - weights).mean() < np.abs(weights).mean() * 0.15


def test_importance_reaches_ggml():
    weights = make_weights()
    importance = np.ones(COLUMNS, np.float32)
    importance[::7] = 1000
    encoder = GridBlocks(GgmlType.Q4_K)

    def error(weighted: Any) -> float:
        grid = encoder.fit(weights, weighted)
        off = decode(nearest(weights, grid, 4), grid) - weights
        return float((np.square(off) * importance).sum())

    assert error(importance) < 0.9 * error(None)


def test_kinds_of_encoders():
    assert all(isinstance(encoder, GridEncoder) for encoder, _ in AFFINE.values())
