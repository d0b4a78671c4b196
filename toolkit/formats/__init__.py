"""Output formats: one package each, found by folder name; a module is the interface."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.lora import Adapter
from toolkit.decoder import Decoder, Special
from toolkit.recipe import Recipe
from toolkit.stream import DataFile
from toolkit.vendor import Export, Places, Vendor


@dataclass(frozen=True)
class RuntimeNeeds:
    """What running an artifact takes. `kv_bytes_per_token` counts keys and values of all layers.

    `overhead_bytes` is the engine with its work buffers, measured with the bundled example.
    `valid_context` is the range of sequence lengths that agree with the source.
    `always_long_rope`: the runtime has LongRoPE's long factors at every length; the gate compares
    with a source that has them too. `properties` are what the engine has to be loaded with.
    `companions` are packages that have to be there beside `package`.
    """

    engine: str
    provider: str
    package: str
    main_file: str
    kv_bytes_per_token: int
    overhead_bytes: int
    valid_context: tuple[int, int]
    notes: tuple[str, ...] = ()
    always_long_rope: bool = False
    properties: Mapping[str, str] = field(default_factory=dict)
    companions: tuple[str, ...] = ()


class Encoder(Protocol):
    """An artifact's tokenizer in its own runtime, on this machine."""

    runtime: str

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens parsed, nothing added in front or behind."""

    def close(self) -> None:
        """Free it."""


# How a runtime computes where it is asked to be exact: in a float type, or in float32 with the
# inputs of matrices rounded.
Arithmetic = Literal[
    "float32", "float16", "bfloat16",
    "float16 inputs", "bfloat16 inputs", "int8 inputs", "int8 inputs in long blocks",
]  # fmt: skip


class Session(Encoder, Protocol):
    """An artifact open in its own runtime, on this machine."""

    arithmetic: Arithmetic

    def exact_logits(self, texts: Sequence[list[int]]) -> list[NDArray[np.float32]]:
        """As `logits` of each text, computed in `arithmetic`, as slow as that may be."""

    def logits(self, ids: list[int]) -> NDArray[Any]:
        """float32 [len(ids), vocabulary]: the logits after every position."""

    def generate(self, ids: list[int], max_tokens: int) -> list[int]:
        """Greedy continuation; ends after the first stop id, which is included."""

    def stops(self, token: int) -> bool:
        """True when the runtime ends generation on this token."""


class Format(Protocol):
    """What formats/<name>/__init__.py offers."""

    RECIPE: type[Recipe]
    PACKAGES: tuple[str, ...]  # whose versions the manifest records
    HOLDS: frozenset[Special]  # what of a decoder it can hold, beside what Phi-3 has
    REASONS: Mapping[Special, str]  # why it cannot hold something, where there is more to say

    def check_shape(self, recipe: Recipe, decoder: Decoder) -> None:
        """PlanError when the recipe cannot hold this architecture (block sizes, features)."""

    def list_choices(self, recipe: Recipe, decoder: Decoder) -> Mapping[str, tuple[Any, ...]]:
        """What the recipe's overrides could say of each matrix, by its name, smallest first.

        None stands for no override, where the recipe's own type is a choice that they cannot name.
        Empty when the recipe leaves nothing to choose.
        """

    def lay_out(self, recipe: Recipe, decoder: Decoder, context_length: int) -> DataFile:
        """Place every tensor in the data file; no checkpoint is needed."""

    def needs(self, recipe: Recipe, decoder: Decoder, context_length: int) -> RuntimeNeeds:
        """What the artifact will take at run time."""

    def rest_bytes(self, tokenizer_bytes: int) -> int:
        """Most bytes that stand beside the data, for a tokenizer whose files have so many."""

    def header_bytes(self, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint) -> bytes:
        """What stands before the data in the data file; empty when nothing does."""

    def write_rest(
        self,
        folder: Path,
        recipe: Recipe,
        decoder: Decoder,
        checkpoint: Checkpoint,
        context_length: int,
    ) -> None:
        """Write every other file: graph, configuration, tokenizer."""

    def write_tokenizer(
        self, folder: Path, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint
    ) -> None:
        """Write what `open_tokenizer` reads, as the artifact will have it, without any weights.

        UnsupportedError when the runtime has no tokenizer of this kind.
        """

    def open_tokenizer(self, folder: Path) -> Encoder:
        """Open the tokenizer of an artifact, or what `write_tokenizer` wrote, in its own runtime.

        UnsupportedError when the runtime cannot load it, MissingExtraError when it is not there.
        """

    def write_chat(
        self, folder: Path, name: str, chat: Chat, context_length: int
    ) -> tuple[str, ...]:
        """Write what programs with chat templates of their own are told; returns notes on it."""

    def dequantize(self, folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[Any]]]:
        """Read the artifact back with the format's own reader: (checkpoint name, float32)."""

    def open_session(self, folder: Path, **properties: str) -> Session:
        """Open the artifact in its own runtime; MissingExtraError when that is not installed.

        `properties` are those of its RuntimeNeeds; a format that never has any takes none.
        """


class Apart(Protocol):
    """What formats/<name>/apart.py offers, where artifacts can have an adapter beside them."""

    def measure(self, recipe: Recipe, decoder: Decoder, adapter: Adapter) -> int:
        """Bytes that an artifact has more with it; PlanError for matrices it cannot go beside."""


class Exporter(Protocol):
    """What formats/<name>/vendor.py offers: the vendor's own converter, run as a program."""

    VENDOR: Vendor

    def plan_export(
        self, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, places: Places
    ) -> Export:
        """The commands that make the artifact, as values; PlanError when the vendor cannot."""

    def dequantize(self, folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[Any]]]:
        """Read the vendor's artifact back: (checkpoint name, float32)."""


def names() -> list[str]:
    """Names of all formats: the packages in this folder."""
    return sorted(info.name for info in pkgutil.iter_modules(__path__) if info.ispkg)


def get(name: str) -> Format:
    """The format's module."""
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))


def names_with_apart() -> list[str]:
    """Names of the formats whose artifacts can have an adapter beside them."""
    return _names_with("apart")


def get_apart(name: str) -> Apart:
    """The format's module for adapters apart."""
    return cast(Apart, importlib.import_module(f"{__name__}.{name}.apart"))


def names_with_vendor() -> list[str]:
    """Names of the formats whose vendor's exporter can be run."""
    return _names_with("vendor")


def get_vendor(name: str) -> Exporter:
    """The format's vendor module."""
    return cast(Exporter, importlib.import_module(f"{__name__}.{name}.vendor"))


def _names_with(module: str) -> list[str]:
    return [name for name in names() if find_spec(f"{__name__}.{name}.{module}")]
