"""OpenVINO artifacts through openvino-genai.

Its GenerationConfig, made anew for each answer, has no top_k and no penalties unless they are set
(the class's own documentation); what the folder's generation_config.json says is not taken over.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..failure import Failure
from ..images import Pixels
from ..settings import GREEDY, Sampling, Settings, check_offered
from ..sight import LANGUAGE, Sight
from ._producing import Producer, Put
from ._sampling import choose_seed, make_chooser

PACKAGE = "openvino-genai"
MODULE = "openvino_genai"
# What OpenVINO calls the device.
PROVIDERS = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
PRECISIONS = {4: "u4", 8: "u8", 16: "f16"}
OFFERED: dict[str, tuple[int, ...]] = {
    "threads": (),
    "kv_bits": tuple(PRECISIONS),
    "batch_tokens": (),
}
BACKEND, PAGED = "ATTENTION_BACKEND", "PA"  # openvino-genai's property, and its default
NOTHING: Mapping[str, str] = MappingProxyType({})
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # how a piece of a character is decoded


class Model:
    """A loaded OpenVINO folder."""

    # Paged attention keeps what it has computed in blocks of tokens, and does not say.
    reused_tokens = None

    def __init__(
        self, genai: Any, folder: Path, provider: str, settings: Settings,
        pinned: Mapping[str, str], has_tokenizer: bool,
    ) -> None:  # fmt: skip
        self._genai = genai
        self.version = str(genai.get_version())
        self.provider = provider
        try:
            self._switch = read_switch(folder / "config.json")
            offered = offer(provider, self._switch, pinned)
            check_offered(f"{PACKAGE} on {provider}", settings, offered)
            properties = choose_properties(provider, settings, self._switch, pinned)
            if settings.batch_tokens:
                properties["scheduler_config"] = self._make_schedule(settings.batch_tokens)
            self._pipeline = genai.LLMPipeline(str(folder), PROVIDERS[provider], **properties)
            stored = genai.GenerationConfig(str(folder / "generation_config.json"))
        except (RuntimeError, OSError, KeyError, ValueError) as error:
            raise Failure("model", f"{folder}: openvino-genai cannot load it: {error}") from None
        self._stop_ids = stored.stop_token_ids
        self._tokenizer: Any = self._pipeline.get_tokenizer() if has_tokenizer else None
        self._producer: Producer[int] = Producer(PACKAGE)

    def encode(self, text: str) -> list[int]:
        """Return token ids; the tokenizer parses special tokens and adds none."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return [int(token) for token in encoded.input_ids.data[0]]

    def generate(
        self, prompt_ids: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY
    ) -> Generator[tuple[int, str], None, None]:
        """Yield up to `new_tokens` (token id, text) pairs."""
        with closing(self._generate_ids(list(prompt_ids), new_tokens, sampling)) as tokens:
            yield from spell(self._tokenizer, tokens)

    def _generate_ids(
        self, ids: list[int], new_tokens: int, sampling: Sampling
    ) -> Generator[int, None, None]:
        """Yield token ids. At LongRoPE's switch the sequence is computed anew, as its source does.

        Cached keys are of the short factors, and all must be of the long ones from there on.
        """
        for part, count in enumerate(split_at_switch(len(ids), new_tokens, self._switch)):
            config = self._configure(count, sampling, part)
            with closing(self._run(ids, config)) as tokens:
                for token in tokens:
                    ids.append(token)
                    yield token
            if ids[-1] in self._stop_ids:
                return

    def close(self) -> None:
        """Let the runtime free its memory."""
        self._producer.close()
        del self._tokenizer, self._pipeline

    def _configure(self, new_tokens: int, sampling: Sampling, part: int) -> Any:
        """Return how one part of an answer is generated; its random numbers are its own."""
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.stop_token_ids = new_tokens, self._stop_ids
        config.do_sample = sampling.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p = sampling.temperature, sampling.top_p
            config.rng_seed = choose_seed(sampling, part)
        return config

    def _run(self, prompt_ids: Sequence[int], config: Any) -> Generator[int, None, None]:
        import numpy
        import openvino  # type: ignore[import-not-found,import-untyped,unused-ignore]

        prompt = openvino.Tensor(numpy.array([list(prompt_ids)], numpy.int64))

        def work(put: Put[int]) -> None:
            self._pipeline.generate(prompt, config, _make_streamer(self._genai, put))

        return self._producer.produce(work)

    def _make_schedule(self, batch_tokens: int) -> Any:
        """Return a schedule like the pipeline's own, but for the tokens at once."""
        schedule = self._genai.SchedulerConfig()
        schedule.max_num_batched_tokens = batch_tokens
        schedule.enable_prefix_caching = True
        return schedule


class SeeingModel:
    """A loaded OpenVINO folder that reads pictures, run by OpenVINO itself.

    openvino-genai's pipeline for such takes files' pixels, not ids and crops as the source has
    them. Sampling is ours.
    """

    reused_tokens = 0

    def __init__(
        self, openvino: Any, genai: Any, folder: Path, settings: Settings, has_tokenizer: bool
    ) -> None:
        self.version, self.provider = str(genai.get_version()), "cpu"
        check_offered(f"{PACKAGE} with pictures", settings, offer("cpu", switch=0))
        try:
            self._switch = read_switch(folder / "config.json")
            properties = choose_properties("cpu", settings, None)
            self._sight = Sight(openvino, folder, PROVIDERS["cpu"], properties)
            stored = genai.GenerationConfig(str(folder / "generation_config.json"))
            self._tokenizer: Any = genai.Tokenizer(str(folder)) if has_tokenizer else None
        except (RuntimeError, OSError, KeyError, ValueError) as error:
            raise Failure("model", f"{folder}: OpenVINO cannot load it: {error}") from None
        self._stop_ids = stored.stop_token_ids

    def encode(self, text: str) -> list[int]:
        """Return token ids; the tokenizer parses special tokens and adds none."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return [int(token) for token in encoded.input_ids.data[0]]

    def generate(
        self, prompt_ids: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY,
        pixels: Pixels | None = None,
    ) -> Generator[tuple[int, str], None, None]:  # fmt: skip
        """Yield up to `new_tokens` (token id, text) pairs; ids below 0 stand for `pixels`."""
        choose = make_chooser(sampling) if sampling.temperature > 0 else _take_likeliest
        with closing(self._sight.write(prompt_ids, pixels, self._switch, choose)) as tokens:
            for number, pair in enumerate(spell(self._tokenizer, tokens), start=1):
                yield pair
                if number == new_tokens or pair[0] in self._stop_ids:
                    return

    def close(self) -> None:
        """Let the runtime free its memory."""
        del self._tokenizer, self._sight


def _take_likeliest(logits: Any) -> int:
    return int(logits.argmax())


def spell(tokenizer: Any, tokens: Iterator[int]) -> Iterator[tuple[int, str]]:
    """Pair each token with the text it adds; a character comes with its last token.

    Without a tokenizer no text is added.
    """
    if tokenizer is None:
        yield from ((token, "") for token in tokens)
        return
    answer: list[int] = []
    printed = 0
    for token in tokens:
        answer.append(token)
        text = tokenizer.decode(answer)
        piece = "" if text.endswith(INCOMPLETE) else text[printed:]
        printed += len(piece)
        yield token, piece


def offer(
    provider: str, switch: int | None, pinned: Mapping[str, str] = NOTHING
) -> dict[str, tuple[int, ...]]:
    """Return which of OFFERED this provider has; without paged attention prompts go in whole."""
    without: set[str] = {"cpu": set(), "gpu": {"threads"}, "npu": set(OFFERED)}[provider]
    if switch is not None or pinned.get(BACKEND, PAGED) != PAGED:
        without = without | {"batch_tokens"}
    return {name: values for name, values in OFFERED.items() if name not in without}


def choose_properties(
    provider: str, settings: Settings, switch: int | None, pinned: Mapping[str, str] = NOTHING
) -> dict[str, Any]:
    """Return what the pipeline is made with; what the artifact pins counts before all else.

    Paged attention is not for LongRoPE: it keeps the keys of earlier prompts by their tokens alone,
    and would give a long sequence those that were made with the short factors.
    """
    if provider == "npu":
        return {"MAX_PROMPT_LEN": settings.context_tokens, **pinned}  # compiled for fixed lengths
    properties: dict[str, Any] = {} if switch is None else {BACKEND: "SDPA"}
    properties |= pinned
    if settings.threads:
        properties["INFERENCE_NUM_THREADS"] = settings.threads
    if settings.kv_bits:
        properties["KV_CACHE_PRECISION"] = PRECISIONS[settings.kv_bits]
    return properties


def read_switch(config: Path) -> int | None:
    """Return the length beyond which LongRoPE's long factors hold; None without LongRoPE."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    if "long_factor" not in rope:
        return None
    key = "original_max_position_embeddings"
    return int(rope.get(key) or fields[key])


def split_at_switch(length: int, new_tokens: int, switch: int | None) -> list[int]:
    """Split `new_tokens` after the last one that is computed from at most `switch` tokens."""
    if switch is None or not length <= switch < length + new_tokens - 1:
        return [new_tokens]
    before = switch - length + 1
    return [before, new_tokens - before]


def _make_streamer(genai: Any, put: Put[int]) -> Any:
    """Return a streamer that hands tokens over as they come."""

    class Streamer(genai.StreamerBase):  # type: ignore[misc,name-defined,unused-ignore]
        def write(self, token: int | Sequence[int]) -> Any:
            tokens = token if isinstance(token, Sequence) else [token]
            goes_on = [put(int(one)) for one in tokens]
            status = genai.StreamingStatus
            return status.RUNNING if all(goes_on) else status.CANCEL

        def end(self) -> None:
            """Nothing is held back."""

    return Streamer()


def load(
    folder: Path, main_file: str, provider: str, settings: Settings, has_tokenizer: bool = True,
    **properties: str,
) -> Model | SeeingModel:  # fmt: skip
    """Load the folder of `main_file`; Failure when the provider's device is not there.

    `properties` go to the pipeline before all that the settings ask for.
    """
    check_offered(PACKAGE, settings, OFFERED)
    import openvino
    import openvino_genai as genai  # type: ignore[import-not-found,import-untyped,unused-ignore]

    _check_provider(openvino.Core().available_devices, provider)
    folder = (folder / main_file).parent
    if main_file == f"{LANGUAGE}.xml":
        return SeeingModel(openvino, genai, folder, settings, has_tokenizer)
    return Model(genai, folder, provider, settings, properties, has_tokenizer)


def _check_provider(devices: Sequence[str], asked: str) -> None:
    if asked not in PROVIDERS:
        raise Failure("provider", f"provider {asked!r} is unknown; allowed: {', '.join(PROVIDERS)}")
    # "GPU.1" is the second GPU.
    if PROVIDERS[asked] not in {device.partition(".")[0] for device in devices}:
        raise Failure(
            "provider",
            f"the artifact asks for provider {asked}; OpenVINO has only {', '.join(devices)} here",
            "install the driver of that device, and let this user open it",
        )
