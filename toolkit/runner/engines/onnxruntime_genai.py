"""ONNX artifacts through onnxruntime-genai.

Sampling is ours: the engine has its settings and its random numbers for a generator's whole life
(search options of its config reference), and a generator that is kept for its cache outlives one
answer. So its top_k of 50 has no say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..failure import Failure
from ..images import Pixels
from ..settings import GREEDY, Sampling, Settings, check_offered
from ._prefix import count_common
from ._sampling import make_chooser

PACKAGE = "onnxruntime-genai"
MODULE = "onnxruntime_genai"
# What Model.device_type says when the provider is the active one.
PROVIDERS = {"cpu": "CPU", "cuda": "CUDA", "dml": "DML", "webgpu": "WebGPU"}
OFFERED: dict[str, tuple[int, ...]] = {"threads": (), "batch_tokens": ()}
# Providers whose generator can go on after an answer, and was seen to.
KEEPING = {"cpu", "cuda"}
# Where the engine takes LongRoPE to switch, by its type of model (Generator in generators.cpp):
# at the first token beyond, it computes the whole sequence anew with the long factors. With phi3v
# it does not, and would go on with keys of short ones: there we do.
SWITCHES = {"phi3": 4096, "phi3v": 4096, "phimoe": 4096, "phi3small": 8192}
# Types whose generators cannot be rewound, and so are not kept. Ids of pictures say nothing of what
# they show: one that could would have to be asked for its pictures too.
ONE_WAY = {"phi3v"}
ADAPTER = "adapter"  # what the one that an artifact comes with is called in the engine


@dataclass
class _Kept:
    """A generator with room for `capacity` tokens; `tokens` are those the network has seen."""

    generator: Any
    capacity: int
    tokens: list[int]
    pixels: Pixels | None = None


class Model:
    """A loaded ONNX folder."""

    def __init__(
        self, genai: Any, folder: Path, provider: str, settings: Settings, adapter: str,
        has_tokenizer: bool,
    ) -> None:  # fmt: skip
        self._genai = genai
        self._settings = settings
        self.version = str(genai.__version__)
        self.provider = provider
        self.reused_tokens = 0
        self._kept: _Kept | None = None
        try:
            config = folder / "genai_config.json"
            self._switch, self._context_length = read_switch(config)
            self._rewinds = read_type(config) not in ONE_WAY
            self._model = genai.Model(_configure(genai, folder, provider, settings))
            self._tokenizer: Any = genai.Tokenizer(self._model) if has_tokenizer else None
            self._adapters = load_adapter(genai, self._model, folder / adapter) if adapter else None
        except (RuntimeError, OSError, ValueError, KeyError) as error:
            raise Failure("model", f"{folder}: onnxruntime-genai cannot load it: {error}") from None
        _check_provider(str(self._model.device_type), provider)

    def encode(self, text: str) -> list[int]:
        """Return token ids; the tokenizer parses special tokens and adds none."""
        if "\0" in text:  # which would end it there, silently
            raise Failure("request", f"{PACKAGE} cannot read a text with the character NUL")
        return [int(token) for token in self._tokenizer.encode(text)]

    def generate(
        self,
        prompt_ids: Sequence[int],
        new_tokens: int,
        sampling: Sampling = GREEDY,
        pixels: Pixels | None = None,
    ) -> Generator[tuple[int, str], None, None]:
        """Yield up to `new_tokens` (token id, text) pairs; ids below 0 stand for `pixels`."""
        choose = make_chooser(sampling) if sampling.temperature > 0 else None
        stream = self._tokenizer.create_stream() if self._tokenizer else None
        kept, self._kept = self._begin(list(prompt_ids), new_tokens, pixels), None
        last: int | None = None
        for _ in range(new_tokens):
            if last is not None:
                kept.tokens.append(last)
            try:
                last = self._step(kept, choose)
            except RuntimeError as error:
                self._kept = None
                raise Failure("engine", f"onnxruntime-genai failed: {error}") from None
            if self.provider in KEEPING and self._rewinds:
                self._kept = kept
            yield last, stream.decode(last) if stream else ""
            if kept.generator.is_done():
                return

    def close(self) -> None:
        """Let the runtime free its memory."""
        self._kept = None
        del self._adapters, self._tokenizer, self._model

    def _begin(self, prompt_ids: list[int], new_tokens: int, pixels: Pixels | None) -> _Kept:
        """Return a generator that has seen the prompt: the kept one when it has room."""
        needed, kept = len(prompt_ids) + new_tokens, self._kept
        self._kept = None
        if kept is None or kept.capacity < needed or not self._is_alike(kept.tokens, prompt_ids):
            kept = None  # its memory goes before the next one's comes
        try:
            kept = kept or self._make(self._choose_capacity(needed))
            self.reused_tokens = count_common(kept.tokens, prompt_ids)
            if kept.tokens:
                kept.generator.rewind_to(self.reused_tokens)
            kept.pixels = pixels
            self._append(kept, prompt_ids, self.reused_tokens)
        except RuntimeError as error:
            raise Failure("engine", f"onnxruntime-genai failed: {error}") from None
        kept.tokens = prompt_ids
        return kept

    def _is_alike(self, computed: Sequence[int], prompt_ids: Sequence[int]) -> bool:
        """Whether both lie on one side of LongRoPE's switch, and so have the same keys."""
        return (len(computed) > self._switch) == (len(prompt_ids) > self._switch)

    def _choose_capacity(self, needed: int) -> int:
        """Twice what is needed at most, so that the next turn of a chat finds room.

        The KV cache is allocated for it: for the whole context it would be gigabytes for nothing.
        """
        bound = min(self._settings.context_tokens, self._context_length)
        return max(needed, min(bound, 1 << (needed - 1).bit_length()))

    def _make(self, capacity: int) -> _Kept:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=capacity, do_sample=False, num_beams=1)
        generator = make_generator(self._genai, self._model, params, self._adapters)
        return _Kept(generator, capacity, [])

    def _append(self, kept: _Kept, prompt_ids: Sequence[int], start: int) -> None:
        """Compute the prompt from `start`, `batch_tokens` at once.

        Beyond LongRoPE's switch in one piece: the first ones would have keys of short factors. So
        also with pictures, which the engine takes with the first piece alone.
        """
        generator = kept.generator
        if kept.pixels is not None:
            generator.set_inputs(make_inputs(self._genai, prompt_ids, kept.pixels))
            return
        size = self._settings.batch_tokens or len(prompt_ids)
        if len(prompt_ids) > self._switch:
            size = len(prompt_ids)
        for place in range(start, len(prompt_ids), size):
            generator.append_tokens(list(prompt_ids[place : place + size]))

    def _step(self, kept: _Kept, choose: Callable[[Any], int] | None) -> int:
        """Return the next token; the engine's own choice is the likeliest."""
        if not self._rewinds and len(kept.tokens) == self._switch + 1:
            kept.generator = None  # its memory goes before the next one's comes
            kept.generator = self._make(kept.capacity).generator
            self._append(kept, kept.tokens, 0)
        generator = kept.generator
        if choose and self._rewinds and len(kept.tokens) == self._switch + 1:
            # The engine would compute the sequence anew after our choice, and choose again.
            generator.rewind_to(0)
            generator.append_tokens(kept.tokens)
            token = choose(generator.get_logits())
            generator.append_tokens([token])
            return token
        if choose:
            logits = generator.get_logits()
            token = choose(logits)
            logits[...] = -1.0
            logits[..., token] = 1.0
            generator.set_logits(logits)
        generator.generate_next_token()
        return int(generator.get_next_tokens()[0])


def load(
    folder: Path, main_file: str, provider: str, settings: Settings, adapter: str = "",
    has_tokenizer: bool = True,
) -> Model:  # fmt: skip
    """Load the folder of `main_file`; Failure when the provider is not active.

    `adapter` is the name of a file beside it that is active in all that the model says.
    """
    check_offered(PACKAGE, settings, OFFERED)
    import onnxruntime_genai as genai  # type: ignore[import-not-found,unused-ignore]

    folder = (folder / main_file).parent
    return Model(genai, folder, provider, settings, adapter, has_tokenizer)


def load_adapter(genai: Any, model: Any, path: Path) -> Any:
    """Return a collection with the adapter of a file in it; ValueError when it is damaged."""
    if not path.is_file():
        raise ValueError(f"its adapter {path.name} is missing")
    adapters = genai.Adapters(model)
    try:
        adapters.load(str(path), ADAPTER)
    except RuntimeError as error:
        reason = str(error).strip().rpartition(") ")[2]  # behind the place in its source
        raise ValueError(f"its adapter {path.name} is damaged: {reason}") from None
    return adapters


def make_generator(genai: Any, model: Any, params: Any, adapters: Any) -> Any:
    """Return a generator, with the adapter active where there is a collection with one."""
    generator = genai.Generator(model, params)
    if adapters is not None:
        generator.set_active_adapter(adapters, ADAPTER)
    return generator


def make_inputs(genai: Any, ids: Sequence[int], pixels: Pixels) -> Any:
    """Return what a generator takes of ids, below 0 where pictures stand, and their pixels."""
    import numpy as np

    inputs = genai.NamedTensors()
    inputs["input_ids"] = np.array([ids], np.int32)
    inputs["pixel_values"] = pixels.values
    inputs["image_sizes"] = pixels.sizes
    inputs["num_image_tokens"] = np.array(pixels.counts, np.int64)
    return inputs


def read_switch(config: Path) -> tuple[int, int]:
    """Return the length beyond which LongRoPE's long factors hold, and the context's.

    A model without LongRoPE has a context that ends there, or a switch that changes nothing.
    """
    model = _read_model(config)
    context_length = int(model["context_length"])
    return SWITCHES.get(model["type"], context_length), context_length


def read_type(config: Path) -> str:
    """Return the engine's type of model."""
    return str(_read_model(config)["type"])


def _read_model(config: Path) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))["model"]
    return model


def _configure(genai: Any, folder: Path, provider: str, settings: Settings) -> Any:
    """Return a Config that asks for `provider` and for nothing else."""
    if provider not in PROVIDERS:
        raise Failure(
            "provider", f"provider {provider!r} is unknown; allowed: {', '.join(PROVIDERS)}"
        )
    # Asked first, for what loading says of a missing provider is no sentence.
    if provider != "cpu" and not getattr(genai, f"is_{provider}_available")():
        _check_provider("CPU", provider)
    config = genai.Config(str(folder))
    config.clear_providers()
    if provider != "cpu":
        config.append_provider(provider)
    if settings.threads:
        options = {"session_options": {"intra_op_num_threads": settings.threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
    return config


def _check_provider(active: str, asked: str) -> None:
    if active.lower() != PROVIDERS[asked].lower():
        raise Failure(
            "provider",
            f"the artifact asks for provider {asked}; the one active here is {active}",
            "install the onnxruntime-genai build that brings this provider",
        )
