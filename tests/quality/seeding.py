"""Artifacts with something wrong in them, as the product's own writers write them.

An artifact is written from a checkpoint whose tensors are not the source's, or with an architecture
that is not; the gate's first part then holds it against the source.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tests.formats.writing import write_artifact
from toolkit import formats
from toolkit.checkpoint import PIECE_WEIGHTS, Checkpoint
from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError
from toolkit.families import read_decoder
from toolkit.formats.gguf.recipe import GgufRecipe
from toolkit.formats.mlx.recipe import MlxRecipe
from toolkit.plan import Plan, make_plan
from toolkit.quality.arithmetic import compare_arithmetic, round_to_bfloat16
from toolkit.quality.chat import read_chat
from toolkit.quality.folding import unfold
from toolkit.quality.gate import EXACT_SEQUENCES
from toolkit.quality.probe import count_shared, read_probe
from toolkit.quality.reference import Array
from toolkit.quality.stored import Watch
from toolkit.quality.weightonly import Read, open_reader
from toolkit.recipe import Recipe

Changes = Mapping[str, Array]


@dataclass
class ChangedCheckpoint(Checkpoint):
    """A checkpoint with some tensors replaced; they are rounded to the type that they had."""

    base: Checkpoint = field(kw_only=True)
    changes: Changes = field(kw_only=True, repr=False)

    def reopen(self) -> "ChangedCheckpoint":
        """As a checkpoint's."""
        return change(self.base.reopen(), self.changes, self.config)

    def close(self) -> None:
        """As a checkpoint's."""
        self.base.close()

    def config_bytes(self) -> bytes:
        """As a checkpoint's."""
        return self.dump_config()

    def read_rows(
        self, name: str, start: int = 0, count: int | None = None, piece: int = PIECE_WEIGHTS
    ) -> Iterator[tuple[int, Any]]:
        """As a checkpoint's."""
        if name not in self.changes:
            yield from self.base.read_rows(name, start, count, piece)
            return
        rows = self.changes[name].reshape(-1, self.tensors[name].shape[-1])
        stop = len(rows) if count is None else start + count
        step = max(1, piece // rows.shape[1])
        for row in range(start, stop, step):
            part = rows[row : min(row + step, stop)]
            yield row, to_raw(part, self.tensors[name].dtype)


def to_raw(values: Array, dtype: str) -> Any:
    """Float32 as a checkpoint stores it."""
    if dtype == "BF16":
        return (round_to_bfloat16(values).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def change(base: Checkpoint, changes: Changes, config: Config | None = None) -> ChangedCheckpoint:
    """A checkpoint with tensors replaced, or another config.json."""
    return ChangedCheckpoint(
        base.folder,
        config or base.config,
        base.tensors,
        base.revision,
        base=base,
        changes=changes,
    )


def configure(base: Checkpoint, fields: Mapping[str, Any]) -> ChangedCheckpoint:
    """The same tensors under other fields of config.json."""
    return change(base, {}, replace(base.config, fields={**base.config.fields, **fields}))


@dataclass(frozen=True)
class Caught:
    """Which part of the gate refuses an artifact, by what measure, and how much is allowed."""

    part: str  # reader, tensors or runtime
    measure: str
    value: float = float("nan")
    limit: float = float("nan")


@dataclass(frozen=True)
class Case:
    """A recipe and the source that artifacts are held against."""

    recipe: Recipe
    checkpoint: Checkpoint
    folder: Path  # to write into

    @property
    def plan(self) -> Plan:
        """How the source is converted."""
        return self.plan_of(read_decoder(self.checkpoint.config))

    def plan_of(self, decoder: Decoder) -> Plan:
        """How an architecture is converted; LongRoPE's long factors where there is one list."""
        recipe = self.recipe
        if decoder.rope.is_long and isinstance(recipe, GgufRecipe | MlxRecipe):
            recipe = msgspec.structs.replace(recipe, rope_factors="long")
        return make_plan(recipe, decoder, workers=1)

    def write(self, changes: Changes, wrong: Checkpoint | None = None,
              decoder: Decoder | None = None) -> None:  # fmt: skip
        """Write an artifact of tensors, a config.json or an architecture that are wrong."""
        checkpoint = change(wrong or self.checkpoint, changes)
        decoder = decoder or read_decoder(checkpoint.config)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_artifact(self.plan_of(decoder).recipe, checkpoint, self.folder, decoder=decoder)

    def judge_tensors(self) -> Caught | None:
        """Look at the stored tensors alone."""
        watch = Watch(self.checkpoint)
        try:
            for _ in watch.over(self._read())():
                pass
        except ArtifactError as error:
            return Caught("reader", str(error))
        return _first_fault(watch)

    def judge(self, plan: Plan | None = None) -> tuple[Caught | None, Caught]:
        """The first fault, as the gate finds it, and what the runtime's arithmetic shows.

        `plan` is the one that the artifact was made by: it says for which lengths it holds.
        """
        plan = plan or self.plan
        session = formats.get(self.recipe.format).open_session(self.folder, **plan.needs.properties)
        watch = Watch(self.checkpoint)
        try:
            decoder = self.plan.source_decoder
            context = min(plan.context_length, plan.needs.valid_context[1] + 1)
            probe = read_probe(self.checkpoint, read_chat(self.checkpoint), decoder, context)
            read = watch.over(self._read())
            found = compare_arithmetic(
                session, read, decoder, probe[:EXACT_SEQUENCES], count_shared(probe)
            )
        except ArtifactError as error:
            caught = Caught("reader", str(error))
            return caught, caught
        finally:
            session.close()
        runtime = Caught("runtime", "KL", found.kl.value, found.limit)
        is_off = not found.kl.value <= found.limit
        return _first_fault(watch) or (runtime if is_off else None), runtime

    def _read(self) -> Read:
        decoder = self.plan.decoder
        read = open_reader(self.recipe.format, "native", self.folder, decoder)
        equalized = self.recipe.quantization.equalize
        return unfold(read, self.checkpoint, decoder) if equalized else read


def _first_fault(watch: Watch) -> Caught | None:
    return next((Caught("tensors", *fault) for fault in watch.faults.values()), None)
