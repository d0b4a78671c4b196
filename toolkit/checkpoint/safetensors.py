"""Safetensors by row range: headers checked whole, bytes read only where asked for.

Follows the safetensors format: 8 bytes little-endian header length, a JSON header, then the data.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoint.config import read_json
from toolkit.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes lie: `offset` counts from the start of `file`."""

    name: str
    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def read_index(folder: Path) -> dict[str, TensorInfo]:
    """Find every tensor of a sharded or single checkpoint; CheckpointError when one is absent."""
    if (folder / INDEX).is_file():
        return _read_sharded(folder)
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE)
    raise CheckpointError(
        f"{folder}: found neither {INDEX} nor {SINGLE}",
        advice="phiship reads safetensors only; download or re-save the checkpoint as safetensors",
    )


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{folder / INDEX}: weight_map: missing; allowed a mapping")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: {file!r}: a shard must lie beside the index")
        if not (folder / file).is_file():
            names = [name for name, where in weight_map.items() if where == file]
            raise CheckpointError(
                f"{folder / file}: this shard is missing; {len(names)} tensors are in it, "
                f"the first {names[0]}",
                advice="download the checkpoint again, whole",
            )
        tensors |= _read_header(folder / file)
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(
            f"{folder / INDEX}: {absent[0]} is not in {weight_map[absent[0]]} "
            f"({len(absent)} tensors are missing)"
        )
    return tensors


def _read_header(path: Path) -> dict[str, TensorInfo]:
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 0 < header_bytes <= min(MAX_HEADER_BYTES, size_bytes - 8):
            raise _damaged(path, f"the header says it has {header_bytes} bytes")
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw)
    except ValueError as error:
        raise _damaged(path, f"the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    tensors = {name: _read_entry(path, name, entry, start) for name, entry in header.items()}
    end = max((info.offset + info.nbytes for info in tensors.values()), default=start)
    if end != size_bytes:
        raise _damaged(path, f"found {size_bytes} bytes; the header says {end}")
    return tensors


def _read_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        counts = [*shape, begin, end]
        is_sane = all(isinstance(count, int) and count >= 0 for count in counts)
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"the header's entry of {name} is incomplete") from None
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: {name}: dtype: got {dtype!r}; allowed {', '.join(DTYPE_BYTES)}",
            advice="give the original checkpoint, not a quantized one",
        )
    if not is_sane or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _damaged(path, f"the header's shape and offsets of {name} do not agree")
    return TensorInfo(name, os.fspath(path.name), start + begin, dtype, shape)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: truncated or damaged: {reason}", advice="download this file again"
    )
