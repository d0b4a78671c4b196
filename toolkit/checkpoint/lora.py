"""A LoRA adapter held against the tensors of a checkpoint: what it makes of which rows.

A weight W becomes W + scale * B A, its rows scaled to DoRA's magnitudes where there are any; or it
is replaced, or some of its rows are. Modules that the adapter knows apart (q_proj) and the
checkpoint as rows of one matrix (qkv_proj) are such rows. Patterns and scales follow PEFT
(src/peft/tuners/lora, src/peft/utils/other.py).
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import TOKENIZER_FILES, Checkpoint
from toolkit.checkpoint.config import Config
from toolkit.checkpoint.peft import MERGE, WEIGHTS, Found, Module, look
from toolkit.checkpoint.safetensors import TensorInfo
from toolkit.checkpoint.split import locate_parts
from toolkit.decoder import Rows
from toolkit.errors import CheckpointError, UnsupportedError

Floats = NDArray[np.float32]
Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Change:
    """What an adapter makes of `count` rows of a tensor from `start` on, by its tensors' names.

    First `saved` takes their place, then `scale` times B [out, rank] by A [rank, in] is added, then
    rows are scaled to have the lengths `magnitude`; or rows `indices` become those of `tokens`. Of
    an embedding A and B stand turned: A [rank, tokens], B [in, rank].
    """

    start: int
    count: int
    a: str = ""
    b: str = ""
    scale: float = 0.0
    is_embedding: bool = False
    magnitude: str = ""
    saved: str = ""
    tokens: str = ""
    indices: tuple[int, ...] = ()

    def read(self, parts: Checkpoint) -> tuple[Floats, Floats]:
        """A [rank, in], and B [out, rank] with the scale in it."""
        a, b = parts.read(self.a), parts.read(self.b)
        if self.is_embedding:
            a, b = b.T, a.T
        return np.ascontiguousarray(a), b * np.float32(self.scale)

    @property
    def beyond(self) -> str:
        """What it is besides a linear layer's low-rank update; empty where that is all."""
        found = {
            "LoRA of the embedding": self.is_embedding,
            "DoRA's magnitudes": self.magnitude,
            "trained tokens": self.tokens,
            "a saved module": self.saved,
        }
        return next((what for what, is_so in found.items() if is_so), "")


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder: changes by the checkpoint's names, `digest` over settings and bytes.

    `shapes` are those of the tensors with changes. `vocab` is the vocabulary's size where the
    adapter has another than the checkpoint; `has_tokenizer` that the folder has a tokenizer of its
    own; `is_untied` that embedding and head of a tied model are two tensors with it.
    """

    folder: Path
    changes: Mapping[str, tuple[Change, ...]]
    shapes: Mapping[str, Shape]
    tensors: Mapping[str, TensorInfo]
    digest: str
    vocab: int | None = None
    is_untied: bool = False
    has_tokenizer: bool = False

    @property
    def weights(self) -> int:
        """How many A and B have together, as `read_pairs` gives them."""
        ranks = {
            name: sum(self.tensors[one.a].shape[0] for one in some)
            for name, some in self.changes.items()
        }
        return sum(rank * sum(self.shapes[name]) for name, rank in ranks.items())

    def open(self) -> Checkpoint:
        """Its tensors, to be read by one thread."""
        return Checkpoint(self.folder, Config(str(self.folder), {}), dict(self.tensors))

    def read_pairs(self) -> Iterator[tuple[str, Floats, Floats]]:
        """The name of each matrix, its A [rank, in], and its B [out, rank] with the scale in it.

        Updates of several ranges of rows are one, of their ranks together. For adapters of which
        no change is `beyond` that.
        """
        with closing(self.open()) as parts:
            for name, some in sorted(self.changes.items()):
                yield name, *_stack(parts, some, self.shapes[name][0])


def _stack(parts: Checkpoint, changes: Sequence[Change], rows: int) -> tuple[Floats, Floats]:
    """One A below the other, and their B in blocks."""
    pairs = [change.read(parts) for change in changes]
    ranks = [len(a) for a, _ in pairs]
    b = np.zeros((rows, sum(ranks)), np.float32)
    for number, (change, pair) in enumerate(zip(changes, pairs, strict=True)):
        first = sum(ranks[:number])
        b[change.start : change.start + change.count, first : first + ranks[number]] = pair[1]
    return np.concatenate([a for a, _ in pairs]), b


def read_adapter(
    folder: Path, shapes: Mapping[str, Shape], base: str, *, is_tied: bool = False
) -> Adapter:
    """Read an adapter and hold it against the shapes of the tensors of `base`.

    CheckpointError when it is damaged, matches nothing of them or has other shapes;
    UnsupportedError when it is of another kind.
    """
    found = look(folder)
    shapes = {**shapes, HEAD: shapes[EMBEDDING]} if is_tied and EMBEDDING in shapes else shapes
    reader = _Reader(folder, found, shapes, base)
    changes: dict[str, list[Change]] = {}
    for module in found.modules:
        for name, change in reader.read(module):
            changes.setdefault(name, []).append(change)
    kept = {name: reader.order(name, some) for name, some in sorted(changes.items())}
    is_untied = is_tied and reader.unties(kept)
    if is_tied:
        kept = _share(kept, is_untied=is_untied)
    vocab = reader.check_vocabulary(kept, is_tied=is_tied and not is_untied)
    has_tokenizer = all((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json"))
    if vocab and not has_tokenizer:
        raise CheckpointError(
            f"{folder}: has {vocab} tokens, {base} {shapes[EMBEDDING][0]}, and no tokenizer.json "
            "for them",
            advice="save the tokenizer that it was trained with there",
        )
    files = [folder / n for n in TOKENIZER_FILES if has_tokenizer and (folder / n).is_file()]
    digest = _digest([folder / WEIGHTS, *files], kept)
    after = {name: reader.shape_after(name, some) for name, some in kept.items()}
    return Adapter(folder, kept, after, found.tensors, digest, vocab, is_untied, has_tokenizer)


def _share(
    changes: Mapping[str, tuple[Change, ...]], *, is_untied: bool
) -> dict[str, tuple[Change, ...]]:
    """Changes of a model whose head is its embedding, or was before them."""
    shared = dict(changes)
    if not is_untied:
        shared.pop(HEAD, None)
    elif HEAD not in shared and shared[EMBEDDING][0].a and shared[EMBEDDING][0].saved:
        # The embedding before its update, which may have more tokens than the checkpoint's.
        first = shared[EMBEDDING][0]
        shared[HEAD] = (Change(0, first.count, saved=first.saved),)
    return shared


@dataclass(frozen=True)
class _Reader:
    """An adapter's folder beside the shapes of a checkpoint's tensors."""

    folder: Path
    found: Found
    shapes: Mapping[str, Shape]
    base: str

    def read(self, module: Module) -> Iterator[tuple[str, Change]]:
        """What a module of the adapter changes: names of tensors, and how."""
        if module.bias:
            yield from self._read_bias(module)
        if not (module.stored or module.a or module.embedding_a or module.tokens):
            return
        if module.tokens and (module.a or module.embedding_a):
            raise UnsupportedError(
                f"{self.folder / WEIGHTS}: {module.weight}: an update and trained tokens of one "
                "module; supported: one of them",
                advice=MERGE,
            )
        place = self._locate(module.weight)
        shape, rows = self.shapes[place.tensor], place.count
        if module.stored:
            if place.tensor in (EMBEDDING, HEAD):  # whose vocabulary may be another
                rows = (*self.found.tensors[module.stored].shape, 0)[0]
            whole = (rows, shape[-1]) if len(shape) == 2 else shape
            self._expect(module.weight, whole, **{module.stored: whole})
        scale = self._check_update(module, rows, shape[-1])
        indices = self._read_indices(module, rows)
        if module.tokens:
            whole = (len(indices), shape[-1])
            self._expect(module.weight, (rows, shape[-1]), **{module.tokens: whole})
        yield place.tensor, Change(
            place.start, rows, module.a or module.embedding_a, module.b or module.embedding_b,
            scale, bool(module.embedding_a), module.magnitude, module.stored, module.tokens,
            indices,
        )  # fmt: skip

    def _check_update(self, module: Module, rows: int, columns: int) -> float:
        """Compare the shapes of A, B and a magnitude; the scale, 0 where there is no update."""
        if not (module.a or module.embedding_a):
            return 0.0
        rank, scale = _read_scale(self.found.config, module.name)
        if module.a:
            parts = {module.a: (rank, columns), module.b: (rows, rank)}
        else:
            parts = {module.embedding_a: (rank, rows), module.embedding_b: (columns, rank)}
        self._expect(f"rank {rank} and {module.weight}", (rows, columns), **parts)
        if module.magnitude:
            size = rows if module.a else columns
            self._expect(module.weight, (rows, columns), **{module.magnitude: (size,)})
        return scale

    @cached_property
    def _places(self) -> dict[str, Rows]:
        """Where weights stand by name: whole tensors, and rows of fused ones."""
        whole = {name: Rows(name, 0, math.prod(s[:-1])) for name, s in self.shapes.items()}
        return {**whole, **locate_parts(self.shapes)}

    def _locate(self, weight: str) -> Rows:
        """The rows that a weight is; CheckpointError when the checkpoint has none."""
        place = self._places.get(weight)
        if place is None:
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: {weight}: {self.base} has no such matrix",
                advice="give the checkpoint that the adapter was trained on",
            )
        return place

    def _expect(self, what: str, whole: Shape, **parts: Shape) -> None:
        """CheckpointError for a tensor of another shape."""
        for part, expected in parts.items():
            if (found := self.found.tensors[part].shape) != expected:
                raise CheckpointError(
                    f"{self.folder / WEIGHTS}: {part}: found {list(found)}; expected "
                    f"{list(expected)} for {what} {list(whole)}",
                    advice="give the checkpoint that the adapter was trained on",
                )

    def _read_bias(self, module: Module) -> Iterator[tuple[str, Change]]:
        """A bias takes the place of the checkpoint's; where that has none it has to be zero."""
        name, info = f"{module.name}.bias", self.found.tensors[module.bias]
        is_own = not module.bias.endswith(".lora_B.bias")
        if is_own and name in self.shapes:
            self._expect(name, self.shapes[name], **{module.bias: self.shapes[name]})
            yield name, Change(0, 1, saved=module.bias)
            return
        opened = Checkpoint(self.folder, self.found.config, {module.bias: info})
        with closing(opened):
            if len(info.shape) != 1 or opened.read(module.bias).any():
                raise UnsupportedError(
                    f"{self.folder / WEIGHTS}: {module.bias}: a bias, of which {self.base} has "
                    "none; supported: zeros or none",
                    advice="train the adapter with bias: none and lora_bias: false",
                )

    def _read_indices(self, module: Module, rows: int) -> tuple[int, ...]:
        """Which rows of a module are tokens that were trained."""
        key, config = "trainable_token_indices", self.found.config
        if not module.tokens:
            return ()
        value = config.fields.get(key)
        named = value if isinstance(value, dict) else {"embed_tokens": value}
        ends = [name for name in named if f".{module.name}".endswith(f".{name}")]
        indices = named[ends[0]] if ends else None
        allowed = f"a list of token ids, 0 to {rows - 1}, for {module.name}"
        if not isinstance(indices, list) or not all(
            isinstance(one, int) and 0 <= one < rows for one in indices
        ):
            raise config.error(key, value, allowed)
        return tuple(indices)

    def shape_after(self, name: str, changes: Sequence[Change]) -> Shape:
        """A tensor's shape with its changes."""
        shape = self.shapes[name]
        return (changes[0].count, shape[1]) if name in (EMBEDDING, HEAD) else shape

    def order(self, name: str, changes: Sequence[Change]) -> tuple[Change, ...]:
        """Changes of a tensor by rows; CheckpointError when two are of the same ones."""
        found = sorted(changes, key=lambda change: change.start)
        for before, after in pairwise(found):
            if before.start + before.count > after.start:
                raise CheckpointError(
                    f"{self.folder / WEIGHTS}: {name}: two modules of the adapter are rows of it",
                    advice=MERGE,
                )
        return tuple(found)

    def check_vocabulary(
        self, changes: Mapping[str, Sequence[Change]], *, is_tied: bool
    ) -> int | None:
        """The vocabulary's size where it is another than the checkpoint's."""
        names = (EMBEDDING,) if is_tied else (EMBEDDING, HEAD)
        sizes = {name: self.shapes[name][0] for name in names if name in self.shapes}
        own = {name: changes[name][0].count for name in sizes if name in changes}
        if all(sizes[name] == count for name, count in own.items()):
            return None
        if len({**sizes, **own}.keys() - own.keys()) or len(set(own.values())) > 1:
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: embedding and head have vocabularies of two sizes: "
                f"{ {**sizes, **own} }",
                advice="save both with the adapter: modules_to_save=['embed_tokens', 'lm_head']",
            )
        return own[EMBEDDING]

    def unties(self, changes: Mapping[str, Sequence[Change]]) -> bool:
        """Whether embedding and head of a tied model differ with the adapter active.

        They do when one of them was trained alone. PEFT's merge_and_unload adds an update of one to
        both; that is not the model that was trained.
        """
        embedding, head = ([*changes.get(name, ()), None][0] for name in (EMBEDDING, HEAD))
        if (head and (head.a or head.tokens)) or (embedding and embedding.a):
            return True
        if head is not None and embedding is not None and embedding.saved:
            return not self._is_same(embedding.saved, head.saved)
        is_alone = embedding is not None and bool(embedding.saved)
        return head is not None or (
            is_alone and self.found.is_saved_module(EMBEDDING.removesuffix(".weight"))
        )

    def _is_same(self, first: str, second: str) -> bool:
        """Whether two tensors of the adapter have the same bytes."""
        digests = []
        for name in (first, second):
            info = self.found.tensors[name]
            digest = hashlib.sha256()
            with closing(Checkpoint(self.folder, self.found.config, {name: info})) as opened:
                for _, raw in opened.read_rows(name):
                    digest.update(raw.tobytes())
            digests.append(digest.digest())
        return digests[0] == digests[1]


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


def _digest(files: Sequence[Path], changes: Mapping[str, tuple[Change, ...]]) -> str:
    """Hex sha256 over what is changed and how, the whole file of weights, and the tokenizer's."""
    digest = hashlib.sha256()
    for name, some in changes.items():
        digest.update(f"{name} {some!r}\n".encode())
    for path in files:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
