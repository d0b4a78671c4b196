"""OpenVINO artifacts through openvino-genai."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..failure import Failure
from ..settings import GREEDY, Sampling, Settings

PACKAGE = "openvino-genai"
MODULE = "openvino_genai"
# What OpenVINO calls the device.
PROVIDERS = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
OFFERED: dict[str, tuple[int, ...]] = {}
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # how a piece of a character is decoded


class Model:
    """A loaded OpenVINO folder."""

    def __init__(self, genai: Any, folder: Path, provider: str, context_tokens: int) -> None:
        self._genai = genai
        self.version = str(genai.get_version())
        self.provider = provider
        try:
            self._switch = read_switch(folder / "config.json")
            properties = choose_properties(provider, context_tokens, self._switch)
            self._pipeline = genai.LLMPipeline(str(folder), PROVIDERS[provider], **properties)
            stored = genai.GenerationConfig(str(folder / "generation_config.json"))
        except (RuntimeError, OSError, KeyError, ValueError) as error:
            raise Failure("model", f"{folder}: openvino-genai cannot load it: {error}") from None
        self._stop_ids = stored.stop_token_ids
        self._tokenizer = self._pipeline.get_tokenizer()

    def encode(self, text: str) -> list[int]:
        """Return token ids; the tokenizer parses special tokens and adds none."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return [int(token) for token in encoded.input_ids.data[0]]

    def generate(
        self, prompt_ids: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[tuple[int, str]]:
        """Yield up to `new_tokens` (token id, text) pairs, greedily."""
        with closing(self._generate_ids(list(prompt_ids), new_tokens)) as tokens:
            yield from self.spell(tokens)

    def _generate_ids(self, ids: list[int], new_tokens: int) -> Generator[int, None, None]:
        """Yield token ids. At LongRoPE's switch the sequence is computed anew, as its source does.

        Cached keys are of the short factors, and all must be of the long ones from there on.
        """
        for count in split_at_switch(len(ids), new_tokens, self._switch):
            with _Tokens(self._genai, self._start(ids, count)) as tokens:
                for token in tokens:
                    ids.append(token)
                    yield token
            if ids[-1] in self._stop_ids:
                return

    def spell(self, tokens: Iterator[int]) -> Iterator[tuple[int, str]]:
        """Pair each token with the text it adds; a character comes with its last token."""
        answer: list[int] = []
        printed = 0
        for token in tokens:
            answer.append(token)
            text = self._tokenizer.decode(answer)
            piece = "" if text.endswith(INCOMPLETE) else text[printed:]
            printed += len(piece)
            yield token, piece

    def close(self) -> None:
        """Let the runtime free its memory."""
        del self._tokenizer, self._pipeline

    def _start(self, prompt_ids: Sequence[int], new_tokens: int) -> Any:
        """What runs the model with a streamer."""
        import numpy
        import openvino  # type: ignore[import-not-found,import-untyped,unused-ignore]

        config = self._genai.GenerationConfig()
        config.do_sample, config.max_new_tokens = False, new_tokens
        config.stop_token_ids = self._stop_ids
        prompt = openvino.Tensor(numpy.array([list(prompt_ids)], numpy.int64))
        return lambda streamer: self._pipeline.generate(prompt, config, streamer)


def choose_properties(provider: str, context_tokens: int, switch: int | None) -> dict[str, Any]:
    """Return what the pipeline is made with; paged attention is not for LongRoPE.

    It keeps the keys of earlier prompts by their tokens alone, and would give a long sequence those
    that were made with the short factors.
    """
    if provider == "npu":
        return {"MAX_PROMPT_LEN": context_tokens}  # its network is compiled for fixed lengths
    return {} if switch is None else {"ATTENTION_BACKEND": "SDPA"}


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


class _Tokens:
    """Tokens of a generation that runs in a thread; leaving the block ends it."""

    def __init__(self, genai: Any, run: Any) -> None:
        self._queue: queue.Queue[int | BaseException | None] = queue.Queue()
        self._is_left = threading.Event()
        streamer = _make_streamer(genai, self._queue, self._is_left)
        self._thread = threading.Thread(target=self._run, args=(run, streamer))

    def __enter__(self) -> Iterator[int]:
        self._thread.start()
        return self._take()

    def __exit__(self, *_: object) -> None:
        self._is_left.set()
        self._thread.join()

    def _run(self, run: Any, streamer: Any) -> None:
        try:
            run(streamer)
            self._queue.put(None)
        except Exception as error:  # for the thread that waits
            self._queue.put(error)

    def _take(self) -> Iterator[int]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise Failure("engine", f"openvino-genai failed: {item}") from None
            yield item


def _make_streamer(genai: Any, tokens: queue.Queue[Any], is_left: threading.Event) -> Any:
    """Return a streamer that hands tokens over as they come."""

    class Streamer(genai.StreamerBase):  # type: ignore[misc,name-defined,unused-ignore]
        def write(self, token: int | Sequence[int]) -> Any:
            for one in token if isinstance(token, Sequence) else [token]:
                tokens.put(int(one))
            status = genai.StreamingStatus
            return status.CANCEL if is_left.is_set() else status.RUNNING

        def end(self) -> None:
            """Nothing is held back."""

    return Streamer()


def load(folder: Path, main_file: str, provider: str, settings: Settings) -> Model:
    """Load the folder of `main_file`; Failure when the provider's device is not there."""
    import openvino
    import openvino_genai as genai  # type: ignore[import-not-found,import-untyped,unused-ignore]

    _check_provider(openvino.Core().available_devices, provider)
    return Model(genai, (folder / main_file).parent, provider, settings.context_tokens)


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
