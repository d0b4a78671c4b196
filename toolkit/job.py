"""What a build is asked for and what its steps share: options, jobs, results."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from toolkit import fileio
from toolkit.artifact import (
    ENGINE_TOKENIZER,
    SOURCE_TOKENIZER,
    Calibration,
    Chat,
    Source,
    Vision,
)
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.decoder import Decoder
from toolkit.errors import PhishipError
from toolkit.families import read_decoder
from toolkit.plan import Plan
from toolkit.quality.chat import read_chat
from toolkit.quality.picture import describe_vision
from toolkit.quality.texts import Text, read_text
from toolkit.quality.tokenizing import TOKENIZER_MEMORY, Compared, compare_runtime
from toolkit.recipe import Recipe
from toolkit.report import Report

CALIBRATION_LENGTH = 512  # tokens of a sequence: chats of usual length


@dataclass(frozen=True)
class Options:
    """How to build; what changes the artifact's bytes are `context_length` and `calibration`.

    `accept_kl` is the gate's limit on the mean KL, instead of the recipe's.
    """

    context_length: int | None = None
    workers: int | None = None
    memory_bytes: int | None = None
    check: bool = True
    replace: bool = False
    force_memory: bool = False
    calibration: Path | None = None
    accept_kl: float | None = None


@dataclass(frozen=True)
class Job:
    """One artifact to be made of the checkpoint.

    `tokens` is how its engine's tokenizer compares with the source's; None until that is known.
    `tokenizer_bytes` is the size of tokenizer.json, where it answers.
    """

    plan: Plan
    source: Source
    chat: Chat
    final: Path
    text: Text | None = None
    vision: Vision | None = None
    tokens: Compared | None = None
    tokenizer_bytes: int = 0

    @property
    def name(self) -> str:
        """Name of recipe and artifact."""
        return self.plan.recipe.name

    @property
    def key(self) -> str:
        """What a killed build must have been making for its work to be gone on with."""
        text = self.text.digest if self.text else "no calibration"
        return f"{self.plan.digest} {self.source.digest} {text}"

    @property
    def tokenizer(self) -> str:
        """Which tokenizer answers, as the manifest says it."""
        return self.tokens.tokenizer if self.tokens else ENGINE_TOKENIZER

    @property
    def companions(self) -> tuple[str, ...]:
        """Packages that the artifact needs on a device beside its engine's."""
        own = (SOURCE_TOKENIZER,) if self.tokenizer == SOURCE_TOKENIZER else ()
        return (*self.plan.needs.companions, *self.chat.companions, *own)

    @property
    def device_memory_bytes(self) -> int:
        """What running it takes, the source's tokenizer included."""
        return self.plan.device_memory_bytes + TOKENIZER_MEMORY * self.tokenizer_bytes

    @property
    def notes(self) -> tuple[str, ...]:
        """What the manifest says for people."""
        return (*self.plan.needs.notes, *(self.tokens.notes if self.tokens else ()))

    @property
    def calibration(self) -> Calibration | None:
        """The calibration text as the manifest names it."""
        if self.text is None:
            return None
        return Calibration(text=self.text.name, digest=self.text.digest, tokens=self.text.count)


Result = Path | PhishipError


@dataclass(frozen=True)
class Building:
    """What all steps of a build share; `results` has each artifact's path, or its error."""

    checkpoint: Checkpoint
    out: Path
    options: Options
    console: Console
    report: Report
    is_alone: bool
    results: dict[str, Result] = field(default_factory=dict)
    _texts: dict[int, Text] = field(default_factory=dict, repr=False)
    _compared: dict[tuple[str, str], Compared] = field(default_factory=dict, repr=False)

    @cached_property
    def decoder(self) -> Decoder:
        """The architecture, once compared with the checkpoint's tensors."""
        decoder = read_decoder(self.checkpoint.config)
        self.checkpoint.check(decoder)
        return decoder

    @cached_property
    def digest(self) -> str:
        """The checkpoint's fingerprint."""
        return self.checkpoint.fingerprint()

    @cached_property
    def chat(self) -> Chat:
        """The checkpoint's chat template."""
        return read_chat(self.checkpoint, sees=self.decoder.vision is not None)

    @cached_property
    def vision(self) -> Vision | None:
        """How the checkpoint's pictures are cut; None when it reads text only."""
        return describe_vision(self.decoder, self.checkpoint)

    def read_calibration(self, tokens: int) -> Text:
        """The text on which codes are chosen, read once for all artifacts."""
        if tokens not in self._texts:
            self._texts[tokens] = read_text(
                self.checkpoint, self.chat, "calibration", path=self.options.calibration,
                tokens=tokens, length=CALIBRATION_LENGTH,
            )  # fmt: skip
        return self._texts[tokens]

    def compare_tokens(self, recipe: Recipe) -> Compared:
        """How the tokenizer of a recipe's engine compares with the source's; once for a format."""
        key = (recipe.format, recipe.model)
        if key not in self._compared:
            self._compared[key] = compare_runtime(recipe, self.decoder, self.checkpoint, self.chat)
        return self._compared[key]

    def step_name(self, step: str, name: str) -> str:
        """Name of a step in the report; says which artifact when there are several."""
        return step if self.is_alone else f"{step}: {name}"

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Note an error as the result of one artifact, so that the others, if any, go on."""
        try:
            yield
        except PhishipError as error:
            if self.is_alone:
                raise
            self.results[name] = error
        except OSError as error:
            if self.is_alone:
                raise
            self.results[name] = fileio.explain_write_error(error)
