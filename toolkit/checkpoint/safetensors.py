"""Safetensors by row range: headers checked whole, bytes read only where asked for.

Follows the safetensors format: 8 bytes little-endian header length, a JSON header, then the data.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoint.config import read_json
from toolkit.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
FP8 = "F8_E4M3"
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, FP8: 1}
SHARD_NAME = re.compile(r"[^/\\:]+\.safetensors")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes lie: `offset` counts from the start of `file`."""

    name: str
    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Find every tensor of a single or sharded checkpoint; CheckpointError when one is absent.

    A folder that holds both forms is read as transformers reads it: the single file wins.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_sharded(folder)
    raise CheckpointError(
        f"{folder}: found neither {SINGLE} nor {INDEX}",
        advice="phiship reads safetensors only; download or re-save the checkpoint as safetensors",
    )


def read_weight_map(path: Path) -> dict[str, str]:
    """Read which shard holds which tensor; CheckpointError unless every shard lies beside it."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: got {weight_map!r}; allowed a mapping")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{path}: weight_map: {name}: got {file!r}; "
                "allowed the name of a .safetensors file beside the index"
            )
    return weight_map


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    weight_map = read_weight_map(folder / INDEX)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        names = [name for name, where in weight_map.items() if where == file]
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder / file}: this shard is missing; {len(names)} tensors are in it, "
                f"the first {names[0]}",
                advice="download the checkpoint again, whole",
            )
        shard = read_header(folder / file)
        if absent := [name for name in names if name not in shard]:
            raise CheckpointError(
                f"{folder / INDEX}: {absent[0]} is not in {file} "
                f"({len(absent)} tensors of this shard are missing)",
                advice="download the checkpoint again, whole",
            )
        here = {name: info for name, info in shard.items() if weight_map.get(name, file) == file}
        tensors |= here
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Find every tensor of one file; CheckpointError when it is damaged."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if not 0 < header_bytes <= min(MAX_HEADER_BYTES, size_bytes - 8):
                raise _damaged(path, f"{size_bytes} bytes; a header of {header_bytes} is announced")
            raw = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    start = 8 + header_bytes
    entries = _parse_header(path, raw).items()
    tensors = {name: _read_entry(path, name, entry, start) for name, entry in entries}
    _check_layout(path, tensors.values(), start, size_bytes)
    return tensors


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_refuse_twice)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} stands in it twice")
    return entries


def _read_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        counts = [*shape, begin, end]
        is_sane = all(isinstance(count, int) and count >= 0 for count in counts)
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"the header's entry of {name} is incomplete") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: {name}: dtype: got {dtype!r}; allowed {', '.join(DTYPE_BYTES)}",
            advice="give the original checkpoint, not a quantized one",
        )
    if not is_sane or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _damaged(path, f"the header's shape and offsets of {name} do not agree")
    return TensorInfo(name, os.fspath(path.name), start + begin, dtype, shape)


def _check_layout(path: Path, tensors: Iterable[TensorInfo], start: int, size_bytes: int) -> None:
    """Refuse gaps, overlaps and missing bytes: the format allows none."""
    end = start
    for info in sorted(tensors, key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            raise _damaged(
                path, f"{info.name} begins at byte {info.offset}; the data before it ends at {end}"
            )
        end += info.nbytes
    if end != size_bytes:
        raise _damaged(path, f"found {size_bytes} bytes; the header says {end}")


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: truncated or damaged: {reason}", advice="download this file again"
    )
