"""Parity: one recipe built by both engines, compared tensor by tensor and as a whole."""

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import artifact, formats
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console, format_bytes
from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError, PlanError
from toolkit.families import read_decoder
from toolkit.formats import Session
from toolkit.plan import make_plan
from toolkit.quality import tokens
from toolkit.quality.comparing import read_source
from toolkit.quality.measures import Comparison, compare_sequences
from toolkit.quality.probe import count_shared, read_probe
from toolkit.recipe import Recipe
from toolkit.source import bind_recipe, open_source
from toolkit.vendor import Command
from toolkit.vendor.environment import locate
from toolkit.vendor.running import Cost, run

ENGINES = ("native", "vendor")
Tensors = Iterator[tuple[str, NDArray[Any]]]


@dataclass
class Difference:
    """How a class of tensors differs, dequantized to float32.

    `max_difference` is absolute, `max_weight` the largest magnitude among the vendor's.
    """

    tensors: int = 0
    equal_tensors: int = 0
    weights: int = 0
    equal_weights: int = 0
    max_difference: float = 0.0
    max_weight: float = 0.0

    def add(self, ours: NDArray[Any], theirs: NDArray[Any]) -> None:
        """Count one tensor in; both have the same shape."""
        equal = int(np.count_nonzero(ours == theirs))
        self.tensors += 1
        self.equal_tensors += equal == ours.size
        self.weights += ours.size
        self.equal_weights += equal
        self.max_difference = max(self.max_difference, float(np.abs(ours - theirs).max()))
        self.max_weight = max(self.max_weight, float(np.abs(theirs).max()))


@dataclass(frozen=True)
class Side:
    """One engine's artifact: what it cost, its size, how it compares with the source.

    `token_mismatches` counts probe texts, of `probes`, that its runtime encodes differently.
    """

    engine: str
    cost: Cost
    size_bytes: int
    to_source: Comparison
    token_mismatches: int
    probes: int


@dataclass(frozen=True)
class Parity:
    """Both artifacts of one recipe; `between` compares their logits."""

    classes: dict[str, Difference]
    sides: tuple[Side, ...]
    between: Comparison


def compare(
    recipe_name: str, recipe: Recipe, source: str, console: Console, *, work: Path | None = None,
    force_memory: bool = False,
) -> Parity:  # fmt: skip
    """Build the recipe with both engines in a temporary folder of `work`, compare, and show it.

    Each build is a process of its own, `phiship build --no-check`, so that both are measured alike.
    MissingExtraError before anything is built when the vendor's environment is not there.
    """
    if recipe.adapter or recipe.adapter_apart:
        raise PlanError(
            f"{recipe.name}: adapter: the vendors' converters read none, so there is nothing to "
            "compare with",
            advice="take a recipe without it, and a checkpoint that PEFT has merged",
        )
    locate(formats.get_vendor(recipe.format).VENDOR)
    checkpoint = open_source(source, console)
    decoder = read_decoder(checkpoint.config)
    recipe = bind_recipe(recipe, checkpoint, str(checkpoint.folder))
    make_plan(recipe.with_engine("vendor"), decoder)  # refused before ours is built
    more = ["--force-memory"] if force_memory else []
    with tempfile.TemporaryDirectory(prefix="phiship-parity-", dir=work) as made:
        folders, costs = {}, {}
        for engine in ENGINES:
            out = Path(made) / engine
            words = (recipe_name, "--checkpoint", str(checkpoint.folder), "--engine", engine, *more)
            costs[engine] = _build(words, out, console)
            folders[engine] = out / recipe.name
        classes = compare_tensors(
            formats.get(recipe.format).dequantize(folders["native"], decoder),
            formats.get_vendor(recipe.format).dequantize(folders["vendor"], decoder),
            decoder,
        )
        found = _compare_logits(recipe, folders, costs, checkpoint, decoder, console)
    parity = Parity(classes, *found)
    _show(recipe.name, parity, console)
    return parity


def compare_tensors(native: Tensors, vendor: Tensors, decoder: Decoder) -> dict[str, Difference]:
    """Compare what two readers yield, in whatever order each does, by class of tensor.

    ArtifactError when one yields a tensor that the other does not, or of another shape.
    """
    classes: dict[str, Difference] = defaultdict(Difference)
    seen: set[str] = set()
    for name, ours, theirs in _pair(native, vendor):
        if ours.shape != theirs.shape:
            shapes = f"{list(ours.shape)} and {list(theirs.shape)}"
            raise ArtifactError(f"{name}: the native and the vendor's shapes differ: {shapes}")
        kind = "head" if name in seen else classify(name, decoder)  # a tied one comes twice
        seen.add(name)
        classes[kind].add(ours, theirs)
    return dict(classes)


def classify(name: str, decoder: Decoder) -> str:
    """The class of a tensor: embedding, qkv, o, gate_up, down, norms or head."""
    names = decoder.names
    outer = {names.embedding: "embedding", names.head: "head", names.final_norm: "norms"}
    if name in outer:
        return outer[name]
    kind = decoder.kind_of(name) or "norms"
    return "o" if kind == "attention_out" else kind


def _pair(native: Tensors, vendor: Tensors) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Match by name; what comes early on one side waits. A name may come twice: tied heads."""
    waiting: tuple[dict[str, list[NDArray[Any]]], ...] = (defaultdict(list), defaultdict(list))
    streams = (native, vendor)
    ended = [False, False]
    while not all(ended):
        for side, stream in enumerate(streams):
            found = next(stream, None)
            if found is None:
                ended[side] = True
                continue
            name, array = found
            if waiting[1 - side].get(name):
                other = waiting[1 - side][name].pop(0)
                yield (name, array, other) if side == 0 else (name, other, array)
            else:
                waiting[side][name].append(array)
    for side, engine in enumerate(ENGINES):
        left = [name for name, arrays in waiting[side].items() if arrays]
        if left:
            raise ArtifactError(f"only in the {engine} artifact: {', '.join(left)}")


def _build(words: tuple[str, ...], out: Path, console: Console) -> Cost:
    """Build into `out`; the log lies beside the temporary folder, to be read after an error."""
    argv = (sys.executable, "-m", "toolkit", "build", *words, "--out", str(out), "--no-check")
    log = out.parent.with_name(f"phiship-parity-{out.name}.log")
    log.write_bytes(b"")
    return run(Command(f"the build with engine {out.name}", argv), log, console)


def _compare_logits(
    recipe: Recipe, folders: dict[str, Path], costs: dict[str, Cost], checkpoint: Checkpoint,
    decoder: Decoder, console: Console,
) -> tuple[tuple[Side, ...], Comparison]:  # fmt: skip
    manifests = {engine: artifact.read_manifest(folders[engine]) for engine in ENGINES}
    length = min(manifest.valid_context[1] for manifest in manifests.values())
    chat, tokenizer = manifests["vendor"].chat, tokens.read_tokenizer(checkpoint)
    probe = read_probe(checkpoint, chat, decoder, length)
    first, probes = count_shared(probe), tokens.list_probes(tokenizer, chat)
    read = read_source(checkpoint, decoder, probe, console)
    source = [read.logits(text, slice(None)) for text in range(len(probe))]
    logits, mismatches = {}, {}
    for engine in ENGINES:  # one at a time, for either may fill the memory
        session: Session = formats.get(recipe.format).open_session(folders[engine])
        try:
            logits[engine] = [session.logits(ids) for ids in probe]
            mismatches[engine] = tokens.compare_ids(
                partial(tokens.encode, tokenizer), session.encode, probes
            )
        except RuntimeError as error:  # what native runtimes raise
            raise ArtifactError(f"{session.runtime}, {engine} artifact: {error}") from error
        finally:
            session.close()
    sides = tuple(
        Side(
            engine, costs[engine], manifests[engine].size_bytes,
            compare_sequences(source, logits[engine], probe, first), len(mismatches[engine]),
            len(probes),
        )
        for engine in ENGINES
    )  # fmt: skip
    return sides, compare_sequences(logits["vendor"], logits["native"], probe, first)


def _show(title: str, parity: Parity, console: Console) -> None:
    for name, found in parity.classes.items():
        console.event("tensors", kind=name, **vars(found))
    for side in parity.sides:
        console.event("engine", recipe=title, **_flatten(side))
    console.event("logits", kl=parity.between.mean_kl, top1=parity.between.top1)
    rows = [
        [name, str(d.tensors), _say_equal(d), f"{d.max_difference:.3g}", f"{d.max_weight:.3g}"]
        for name, d in parity.classes.items()
    ]
    headers = ["tensors", "how many", "equal", "max difference", "largest weight"]
    console.table(f"parity {title}: dequantized tensors", headers, rows)
    console.table(
        "the artifacts",
        ["engine", "size", "wall", "CPU", "memory", "KL to the source", "top-1", "token ids"],
        [_row(side) for side in parity.sides],
    )
    between = parity.between
    console.result(
        f"logits, native against vendor: mean KL {between.mean_kl:.3g}, "
        f"top-1 agreement {between.top1:.1%}"
    )


def _say_equal(difference: Difference) -> str:
    if difference.equal_tensors == difference.tensors:
        return "all"
    share = difference.equal_weights / difference.weights
    return f"{difference.equal_tensors} tensors, {share:.4%} of weights"


def _flatten(side: Side) -> dict[str, object]:
    return {
        "name": side.engine,
        "size_bytes": side.size_bytes,
        "kl_to_source": side.to_source.mean_kl,
        "top1": side.to_source.top1,
        "token_mismatches": side.token_mismatches,
        **vars(side.cost),
    }


def _row(side: Side) -> list[str]:
    cost, found = side.cost, side.to_source
    return [
        side.engine,
        format_bytes(side.size_bytes),
        f"{cost.wall_s:.1f} s",
        f"{cost.cpu_s:.1f} s",
        format_bytes(cost.peak_memory_bytes),
        f"{found.mean_kl:.4g}",
        f"{found.top1:.1%}",
        f"{side.token_mismatches} of {side.probes} differ" if side.token_mismatches else "equal",
    ]
