"""Which tokenizer answers: the engine's own where its ids are the source's, else the source's."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer

from toolkit import formats
from toolkit.artifact import ENGINE_TOKENIZER, SOURCE_TOKENIZER, Chat
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.probes import RARE_PROBES
from toolkit.decoder import Decoder
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.quality import tokens
from toolkit.quality.tokens import Mismatch
from toolkit.recipe import Recipe
from toolkit.runner.tokenizing import SourceTokenizer

# Bytes in memory for each of a tokenizer.json: 43 MB at most with one of 3.5 MB (49,152 tokens).
TOKENIZER_MEMORY = 13
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Compared:
    """An engine's token ids beside the source's.

    `mismatches` are of the `probes` texts that decide, `rare` of texts that are only told.
    `reason` says why the engine has no ids at all.
    """

    runtime: str
    probes: int
    mismatches: tuple[Mismatch, ...] = ()
    rare: tuple[Mismatch, ...] = ()
    reason: str = ""

    @property
    def tokenizer(self) -> str:
        """Which tokenizer answers, as the manifest says it."""
        differs = self.mismatches or self.reason
        return SOURCE_TOKENIZER if differs else ENGINE_TOKENIZER

    @property
    def difference(self) -> str:
        """How the engine's tokenizer differs from the source's; empty when it does not."""
        if self.reason:
            return self.reason
        if not self.mismatches:
            return ""
        count = len(self.mismatches)
        return f"{self.runtime} encodes {count} of {self.probes} probe texts differently"

    def __str__(self) -> str:
        """One line for a report: which tokenizer answers, and why."""
        told = tell_tokenizer(self.tokenizer)
        if self.difference:
            return f"{told}: {self.difference}"
        rare = f"; {len(self.rare)} of {len(RARE_PROBES)} rare texts do" if self.rare else ""
        return f"{told}: 0 of {self.probes} probe texts differ{rare}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What the manifest says of it: other programs know nothing of the source's tokenizer."""
        if not self.difference:
            return ()
        text = f"token ids come from the source's tokenizer.json, because {self.difference}"
        return (f"{text}; other programs that run it have the engine's ids",)


def tell_tokenizer(tokenizer: str) -> str:
    """Which tokenizer answers, for people; `tokenizer` as manifests say it."""
    return (
        "the engine's own" if tokenizer == ENGINE_TOKENIZER else f"the source's own ({tokenizer})"
    )


def compare_runtime(
    recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, chat: Chat
) -> Compared:
    """Compare the tokenizer that an artifact will have in its runtime; no weights are needed.

    CheckpointError when tokenizer.json cannot be read, or has ids beyond the vocabulary.
    """
    _read_source(checkpoint, decoder)
    with tempfile.TemporaryDirectory(prefix="phiship-tokenizer-") as scratch:
        folder = Path(scratch)
        try:
            formats.get(recipe.format).write_tokenizer(folder, recipe, decoder, checkpoint)
        except UnsupportedError as error:
            return Compared(recipe.format, 0, reason=str(error))
        return compare_folder(recipe.format, folder, decoder, checkpoint, chat)


def compare_folder(
    format_name: str, folder: Path, decoder: Decoder, checkpoint: Checkpoint, chat: Chat
) -> Compared:
    """Compare the tokenizer of an artifact, or of a folder with a tokenizer alone."""
    try:
        encoder = formats.get(format_name).open_tokenizer(folder)
    except UnsupportedError as error:
        return Compared(format_name, 0, reason=str(error))
    try:
        return compare(encoder.runtime, encoder.encode, checkpoint, decoder, chat)
    except CheckpointError:  # the source's own
        raise
    except Exception as error:  # whatever a runtime raises for a text
        return Compared(encoder.runtime, 0, reason=f"{encoder.runtime} fails: {error}")
    finally:
        encoder.close()


def compare(
    runtime: str, encode: Encode, checkpoint: Checkpoint, decoder: Decoder, chat: Chat
) -> Compared:
    """Compare `encode` with the source's tokenizer on every probe text."""
    tokenizer = _read_source(checkpoint, decoder)
    probes = tokens.list_probes(tokenizer, chat)
    if decoder.vision:  # what stands behind a picture is encoded by itself
        probes += [f"\n{text}" for text in tokens.PLAIN_PROBES]
    find = partial(tokens.compare_ids, partial(tokens.encode, tokenizer))
    rare = find(partial(_encode_if_it_can, encode), RARE_PROBES)
    return Compared(runtime, len(probes), tuple(find(encode, probes)), tuple(rare))


def _encode_if_it_can(encode: Encode, text: str) -> list[int]:
    """The ids; none where the runtime fails, for rare texts decide nothing."""
    try:
        return encode(text)
    except RuntimeError:
        return []


def choose_encode(tokenizer: str, folder: Path, engine: Encode) -> Encode:
    """What encodes texts for an artifact in `folder`, which a manifest says; else the engine's."""
    if tokenizer == ENGINE_TOKENIZER:
        return engine
    return SourceTokenizer(folder).encode


def _read_source(checkpoint: Checkpoint, decoder: Decoder) -> Tokenizer:
    tokenizer = tokens.read_tokenizer(checkpoint)
    tokens.check_vocabulary(tokenizer, decoder.vocab, str(checkpoint.folder))
    return tokenizer
