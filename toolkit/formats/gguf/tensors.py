"""The tensors of a GGUF file (llama.cpp's gguf.md), without its metadata.

gguf-py's reader makes arrays of every token's text, a second or two of a vocabulary at each
opening; here metadata is skipped.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import ArtifactError, require

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT, ALIGNMENT_KEY = 32, "general.alignment"
# struct's format of each type of a value but texts (8) and arrays (9).
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """A tensor: its ggml type by name, its bytes as uint8 [..., bytes of a row], read when used."""

    name: str
    kind: str
    data: NDArray[np.uint8]

    def dequantize(self, part: Any = ...) -> NDArray[np.float32]:
        """Its weights, or those of a part of the first dimension, in float32."""
        gguf = require("gguf")
        kind = gguf.GGMLQuantizationType[self.kind]
        return np.asarray(gguf.dequantize(self.data[part], kind), np.float32)


def read_tensors(path: Path) -> list[Tensor]:
    """The tensors in the order of the file; ArtifactError when it is no GGUF file, or cut off."""
    try:
        with path.open("rb") as stream:
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return list(_read(content))
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise ArtifactError(f"{path}: is not a GGUF file, or cut off: {error}") from error


def _read(content: mmap.mmap) -> Iterator[Tensor]:
    gguf, header = require("gguf"), _Header(content)
    if content[: len(MAGIC)] != MAGIC or header.take("4xI") not in VERSIONS:
        raise ValueError(f"it begins with {content[:8]!r}")
    count, keys = header.take("Q"), header.take("Q")
    alignment = ALIGNMENT
    for _ in range(keys):
        key, value = header.take_text(), header.skip_value()
        alignment = value if key == ALIGNMENT_KEY else alignment
    infos = [
        (header.take_text(), [header.take("Q") for _ in range(header.take("I"))],
         gguf.GGMLQuantizationType(header.take("I")), header.take("Q"))
        for _ in range(count)
    ]  # fmt: skip
    if not alignment:
        raise ValueError(f"{ALIGNMENT_KEY} is 0")
    start = -(-header.place // alignment) * alignment
    for name, dimensions, kind, offset in infos:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (*reversed(dimensions[1:]), dimensions[0] // block * block_bytes)
        data = np.frombuffer(content, np.uint8, prod(shape), start + offset)
        yield Tensor(name, kind.name, data.reshape(shape))


@dataclass
class _Header:
    """Reads values one after the other."""

    content: mmap.mmap
    place: int = 0

    def take(self, format_: str) -> int:
        """The next value."""
        value: int
        (value,) = struct.unpack_from(f"<{format_}", self.content, self.place)
        self.place += struct.calcsize(f"<{format_}")
        return value

    def take_text(self) -> str:
        """The next text."""
        last = self.take("Q") + self.place
        first, self.place = self.place, last
        return self.content[first:last].decode("utf-8", "replace")

    def skip_value(self) -> int:
        """Pass a value with its type; returns it where it is a number."""
        return self._skip(self.take("I"))

    def _skip(self, kind: int) -> int:
        if kind == TEXT:
            self.take_text()
        elif kind == ARRAY:
            of, count = self.take("I"), self.take("Q")
            if of in SCALARS:
                self.place += count * struct.calcsize(SCALARS[of])
            else:
                for _ in range(count):
                    self._skip(of)
        else:
            return self.take(SCALARS[kind])
        return 0
