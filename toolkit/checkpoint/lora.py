"""A LoRA adapter as PEFT saves it, merged into a checkpoint's rows as they are read, or apart.

Merged, a matrix is W + scale * B A in float32 and is not rounded back to the checkpoint's dtype.
Names, patterns and scales follow PEFT (src/peft/tuners/lora, src/peft/utils/other.py).
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import PIECE_WEIGHTS, Checkpoint, to_float32
from toolkit.checkpoint.config import Config, read_config
from toolkit.checkpoint.safetensors import TensorInfo, read_header
from toolkit.errors import CheckpointError, UnsupportedError

Floats = NDArray[np.float32]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PART = re.compile(r"(.+)\.lora_([AB])\.weight")
# What PEFT can do beside W + scale * B A, and the values that stand for "not here".
WITHOUT: Mapping[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    # Others than these start by changing the base's own weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class Update:
    """What is added to one matrix: `scale` times B [out, rank] by A [rank, in], by their names."""

    a: str
    b: str
    scale: float

    def read(self, parts: Checkpoint) -> tuple[Floats, Floats]:
        """A, and B with the scale in it."""
        return parts.read(self.a), parts.read(self.b) * np.float32(self.scale)


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder: updates by the checkpoint's names, `digest` over settings and bytes."""

    folder: Path
    updates: Mapping[str, Update]
    tensors: Mapping[str, TensorInfo]
    digest: str

    @property
    def weights(self) -> int:
        """How many A and B have together."""
        pairs = [(one.a, one.b) for one in self.updates.values()]
        return sum(math.prod(self.tensors[name].shape) for pair in pairs for name in pair)

    def open(self) -> Checkpoint:
        """Its tensors, to be read by one thread."""
        return Checkpoint(self.folder, Config(str(self.folder), {}), dict(self.tensors))

    def read_pairs(self) -> Iterator[tuple[str, Floats, Floats]]:
        """The name of each matrix, its A [rank, in], and its B [out, rank] with the scale in it."""
        with closing(self.open()) as parts:
            for name, update in sorted(self.updates.items()):
                yield name, *update.read(parts)


@dataclass
class MergedCheckpoint(Checkpoint):
    """A checkpoint whose matrices come with an adapter's updates, in float32."""

    base: Checkpoint = field(kw_only=True)
    adapter: Adapter = field(kw_only=True)
    parts: Checkpoint = field(kw_only=True, repr=False)
    _latest: tuple[str, Floats, Floats] | None = None

    @property
    def adapter_digest(self) -> str:
        """Hex sha256 of the adapter that is merged in."""
        return self.adapter.digest

    @property
    def files(self) -> list[str]:
        """Names of the files that the base's weights lie in."""
        return self.base.files

    def config_bytes(self) -> bytes:
        """config.json, as an artifact has it."""
        return self.base.config_bytes()

    def reopen(self) -> "MergedCheckpoint":
        """The same with files and buffers of its own."""
        return _join(self.base.reopen(), self.adapter)

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
        """As the checkpoint's own; rows of a matrix with an update come as float32."""
        update = self.adapter.updates.get(name)
        if update is None:
            yield from self.base.read_rows(name, start, count, piece)
            return
        a, b = self._read_pair(name, update)
        # Half the weights: beside the rows stands what is added to them.
        for row, raw in self.base.read_rows(name, start, count, piece // 2):
            merged = b[row : row + len(raw)] @ a
            merged += to_float32(raw)
            yield row, merged

    def _read_pair(self, name: str, update: Update) -> tuple[Floats, Floats]:
        """A, and B with the scale; those of the latest matrix are kept."""
        if self._latest is None or self._latest[0] != name:
            self._latest = (name, *update.read(self.parts))
        return self._latest[1:]


def merge(base: Checkpoint, folder: Path) -> MergedCheckpoint:
    """The checkpoint with an adapter merged in.

    CheckpointError when the adapter is damaged, or matches nothing of the checkpoint, or has other
    shapes; UnsupportedError when it is more than W + scale * B A.
    """
    shapes = {name: info.shape for name, info in base.tensors.items()}
    return _join(base, read_adapter(folder, shapes, str(base.folder)))


def find_adapter(checkpoint: Checkpoint) -> Adapter | None:
    """The adapter that a checkpoint comes with, if any."""
    return checkpoint.adapter if isinstance(checkpoint, MergedCheckpoint) else None


def without_adapter(checkpoint: Checkpoint) -> Checkpoint:
    """What the adapter was merged into; a checkpoint without one is that itself."""
    return checkpoint.base if isinstance(checkpoint, MergedCheckpoint) else checkpoint


def _join(base: Checkpoint, adapter: Adapter) -> MergedCheckpoint:
    tensors = {
        name: replace(info, dtype="F32") if name in adapter.updates else info
        for name, info in base.tensors.items()
    }
    return MergedCheckpoint(
        base.folder, base.config, tensors, base.revision,
        base=base, adapter=adapter, parts=adapter.open(),
    )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What an adapter's folder says by itself: settings, tensors, A and B of each matrix."""

    config: Config
    tensors: Mapping[str, TensorInfo]
    pairs: Mapping[str, tuple[str, str]]

    @property
    def base(self) -> str:
        """What it was trained on: an id or a path; empty when it says nothing."""
        return str(self.config.fields.get("base_model_name_or_path") or "")


def look(folder: Path) -> Found:
    """Read settings and headers, before any checkpoint is fetched; errors as of `merge`."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder}: no {CONFIG}", advice="give a folder as PEFT's save_pretrained writes it"
        )
    config = read_config(folder / CONFIG)
    _check_settings(config)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder}: no {WEIGHTS}",
            advice="save the adapter as safetensors; pickles are not read",
        )
    tensors = read_header(folder / WEIGHTS)
    return Found(config, tensors, _pair_up(folder, tensors))


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], base: str) -> Adapter:
    """Read an adapter and hold it against the shapes of the tensors of `base`."""
    found = look(folder)
    tensors, updates = found.tensors, {}
    for name, (a, b) in found.pairs.items():
        _check_target(folder, name, shapes, base)
        rank, scale = _read_scale(found.config, name.removesuffix(".weight"))
        out, columns = shapes[name]
        for part, expected in ((a, (rank, columns)), (b, (out, rank))):
            if tensors[part].shape != expected:
                raise CheckpointError(
                    f"{folder / WEIGHTS}: {part}: found {list(tensors[part].shape)}; expected "
                    f"{list(expected)} for {name} {[out, columns]} and rank {rank}",
                    advice="give the checkpoint that the adapter was trained on",
                )
        updates[name] = Update(a, b, scale)
    return Adapter(folder, updates, tensors, _digest(folder, updates))


def _check_settings(config: Config) -> None:
    kind = config.fields.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{config.where}: peft_type: got {kind!r}; supported: 'LORA'")
    for key, allowed in WITHOUT.items():
        found = config.fields.get(key)
        if not any(found == one and type(found) is type(one) for one in allowed):
            raise UnsupportedError(
                f"{config.where}: {key}: got {found!r}; supported: "
                f"{', '.join(json.dumps(one) for one in allowed if one is not None)} or nothing",
                advice="merge it with PEFT (merge_and_unload), and give the merged checkpoint",
            )


def _pair_up(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[str, str]]:
    """The names of A and B by the checkpoint's name of their matrix."""
    found: dict[str, dict[str, str]] = {}
    for name in tensors:
        match = PART.fullmatch(name.removeprefix(PREFIX))
        if match is None or not name.startswith(PREFIX):
            raise UnsupportedError(
                f"{folder / WEIGHTS}: {name}: no LoRA of a linear layer; supported: "
                f"{PREFIX}MODULE.lora_A.weight and .lora_B.weight",
                advice="merge it with PEFT (merge_and_unload), and give the merged checkpoint",
            )
        found.setdefault(f"{match[1]}.weight", {})[match[2]] = name
    if not found:
        raise CheckpointError(f"{folder / WEIGHTS}: holds no tensors")
    for module, parts in found.items():
        if missing := {"A", "B"} - set(parts):
            raise CheckpointError(f"{folder / WEIGHTS}: {module}: no lora_{missing.pop()} for it")
    return {module: (parts["A"], parts["B"]) for module, parts in found.items()}


def _check_target(
    folder: Path, name: str, shapes: Mapping[str, tuple[int, ...]], base: str
) -> None:
    """Refuse what the checkpoint has not."""
    if len(shapes.get(name, ())) != 2:
        raise CheckpointError(
            f"{folder / WEIGHTS}: {name}: {base} has no such matrix",
            advice="give the checkpoint that the adapter was trained on",
        )


def _read_scale(config: Config, module: str) -> tuple[int, float]:
    """Rank and scale of a module, by the first pattern that matches it, as in PEFT."""
    rank = _of_pattern(config, "rank_pattern", module, config.integer("r"))
    alpha = _of_pattern(config, "alpha_pattern", module, config.number("lora_alpha"))
    if not float(rank).is_integer():
        raise config.error("rank_pattern", rank, "whole numbers above 0")
    root = math.sqrt(rank) if config.flag("use_rslora") else rank
    return int(rank), alpha / root


def _of_pattern(config: Config, key: str, module: str, otherwise: float) -> float:
    patterns = config.fields.get(key) or {}
    if not isinstance(patterns, dict):
        raise config.error(key, patterns, "a mapping of patterns to numbers")
    for pattern in patterns:
        try:
            is_match = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise config.error(key, pattern, f"regular expressions ({error})") from error
        if is_match:
            return Config(f"{config.where}: {key}", patterns).number(pattern)
    return otherwise


def _digest(folder: Path, updates: Mapping[str, Update]) -> str:
    """Hex sha256 over scales and the whole file of weights."""
    digest = hashlib.sha256()
    for name, update in sorted(updates.items()):
        digest.update(f"{name} {update.scale!r}\n".encode())
    with (folder / WEIGHTS).open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
