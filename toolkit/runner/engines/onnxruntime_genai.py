"""ONNX artifacts through onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..failure import Failure
from ..settings import GREEDY, Sampling, Settings

PACKAGE = "onnxruntime-genai"
MODULE = "onnxruntime_genai"
# What Model.device_type says when the provider is the active one.
PROVIDERS = {"cpu": "CPU", "cuda": "CUDA", "dml": "DML", "webgpu": "WebGPU"}
OFFERED: dict[str, tuple[int, ...]] = {}


class Model:
    """A loaded ONNX folder."""

    def __init__(self, genai: Any, folder: Path, provider: str) -> None:
        self._genai = genai
        self.version = str(genai.__version__)
        self.provider = provider
        try:
            self._model = genai.Model(_configure(genai, folder, provider))
            self._tokenizer = genai.Tokenizer(self._model)
        except RuntimeError as error:
            raise Failure("model", f"{folder}: onnxruntime-genai cannot load it: {error}") from None
        _check_provider(str(self._model.device_type), provider)

    def encode(self, text: str) -> list[int]:
        """Return token ids; the tokenizer parses special tokens and adds none."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def generate(
        self, prompt_ids: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[tuple[int, str]]:
        """Yield up to `new_tokens` (token id, text) pairs, greedily."""
        params = self._genai.GeneratorParams(self._model)
        # max_length sizes the KV cache: the default is the whole context, gigabytes for nothing.
        params.set_search_options(
            max_length=len(prompt_ids) + new_tokens, do_sample=False, num_beams=1
        )
        generator = self._genai.Generator(self._model, params)
        generator.append_tokens(list(prompt_ids))
        stream = self._tokenizer.create_stream()
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            yield token, stream.decode(token)

    def close(self) -> None:
        """Let the runtime free its memory."""
        del self._tokenizer, self._model


def load(folder: Path, main_file: str, provider: str, settings: Settings) -> Model:
    """Load the folder of `main_file`; Failure when the provider is not active."""
    del settings  # this engine sizes its cache for each request
    import onnxruntime_genai as genai  # type: ignore[import-not-found,unused-ignore]

    return Model(genai, (folder / main_file).parent, provider)


def _configure(genai: Any, folder: Path, provider: str) -> Any:
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
    return config


def _check_provider(active: str, asked: str) -> None:
    if active.lower() != PROVIDERS[asked].lower():
        raise Failure(
            "provider",
            f"the artifact asks for provider {asked}; the one active here is {active}",
            "install the onnxruntime-genai build that brings this provider",
        )
