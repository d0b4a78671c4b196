"""The tensors of a GGUF file, past its keys: gguf-py takes seconds to read those of a vocabulary.

Follows docs/gguf.md of ggml: magic, version, counts, keys with values, descriptions of tensors, and
behind a multiple of the alignment their data.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import ArtifactError, require
from toolkit.formats.gguf.layout import ALIGN_BYTES

MAGIC = b"GGUF"
UINT32, STRING, ARRAY = 4, 8, 9
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, UINT32: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ALIGNMENT = b"general.alignment"


@dataclass(frozen=True)
class Tensor:
    """A tensor as it is stored: `data` are bytes [..., bytes of a row], mapped, not read."""

    name: str
    kind: Any  # gguf.GGMLQuantizationType
    data: NDArray[np.uint8]


def read_tensors(path: Path) -> list[Tensor]:
    """Every tensor in the order of the file; ArtifactError when the file is damaged."""
    gguf = require("gguf")
    try:
        content = np.memmap(path, np.uint8, "r")
        start, found = _read_places(content.data)
        return [
            _map(content, start + offset, name, shape, gguf.GGMLQuantizationType(kind))
            for name, shape, kind, offset in found
        ]
    except (struct.error, ValueError, KeyError) as error:
        raise ArtifactError(
            f"{path}: not a GGUF file, or cut short: {error}", advice="build the artifact again"
        ) from error


def _map(
    content: NDArray[np.uint8], start: int, name: str, shape: tuple[int, ...], kind: Any
) -> Tensor:
    weights, size_bytes = require("gguf").GGML_QUANT_SIZES[kind]
    stored = (*shape[:-1], shape[-1] // weights * size_bytes)
    return Tensor(name, kind, content[start : start + prod(stored)].reshape(stored))


def _read_places(data: memoryview) -> tuple[int, list[tuple[str, tuple[int, ...], int, int]]]:
    """Where the data starts; and names, shapes [out, in], types and offsets behind there."""
    if data[:4] != MAGIC:
        raise ValueError("it does not start with GGUF")
    tensors, keys = struct.unpack_from("<QQ", data, 8)
    place, alignment = 24, ALIGN_BYTES
    for _ in range(keys):
        key, place = _read_string(data, place)
        (kind,) = struct.unpack_from("<I", data, place)
        if key == ALIGNMENT and kind == UINT32:
            (alignment,) = struct.unpack_from("<I", data, place + 4)
        place = _skip(data, place + 4, kind)
    found = []
    for _ in range(tensors):
        name, place = _read_string(data, place)
        (axes,) = struct.unpack_from("<I", data, place)
        *sizes, kind, offset = struct.unpack_from(f"<{axes}QIQ", data, place + 4)
        found.append((name.decode(), tuple(reversed(sizes)), kind, offset))
        place += 4 + 8 * axes + 12
    return -(-place // alignment) * alignment, found


def _read_string(data: memoryview, place: int) -> tuple[bytes, int]:
    """A string, and where it ends."""
    (length,) = struct.unpack_from("<Q", data, place)
    end = place + 8 + length
    return bytes(data[place + 8 : end]), end


def _skip(data: memoryview, place: int, kind: int) -> int:
    """Where a value ends."""
    if kind == STRING:
        return place + 8 + int(struct.unpack_from("<Q", data, place)[0])
    if kind != ARRAY:
        return place + VALUE_BYTES[kind]
    item, count = struct.unpack_from("<IQ", data, place)
    place += 12
    if item in VALUE_BYTES:
        return place + int(count) * VALUE_BYTES[item]
    for _ in range(count):
        place = _skip(data, place, item)
    return place
