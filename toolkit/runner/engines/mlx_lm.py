"""MLX artifacts through mlx-lm.

Sampling is ours, on keys made of the seed: mlx-lm's samplers (mlx_lm.sample_utils) take random
numbers from a state that all of the process shares, and top_p before the temperature. Without a
sampler generate_step takes the likeliest token, and it has no top_k and no penalties of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..failure import Failure
from ..images import Pixels
from ..settings import GREEDY, Sampling, Settings, check_offered
from ._mlx_cpu import speed_up
from ._mlx_vision import embed, load_model, load_tokenizer, read_stops
from ._prefix import count_common, name_pictures
from ._producing import Producer, Put
from ._sampling import choose_seed

PACKAGE = "mlx-lm"
MODULE = "mlx_lm"
# The MLX device of each provider.
PROVIDERS = {"cpu": "cpu", "metal": "gpu"}
OFFERED: dict[str, tuple[int, ...]] = {"kv_bits": (4, 8), "batch_tokens": ()}
KV_GROUP_SIZE = 32  # 64, the default, does not divide the 96 values of a head of Phi-3-mini


class Model:
    """A loaded MLX folder; all its work is done in one thread, which MLX's streams belong to."""

    def __init__(
        self, mlx: Any, folder: Path, provider: str, settings: Settings, has_tokenizer: bool
    ) -> None:
        self._mlx = mlx
        self._settings = settings
        self.provider = provider
        self.reused_tokens = 0
        self._producer = _find_thread()
        self._cache: Any = None
        self._tokens: list[int] = []  # those of the cache, and at most one more
        try:
            self._producer.call(lambda: self._load(folder, has_tokenizer))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise Failure("model", f"{folder}: mlx-lm cannot load it: {error}") from None

    def _load(self, folder: Path, has_tokenizer: bool) -> None:
        self._mlx.set_default_device(getattr(self._mlx, PROVIDERS[self.provider]))
        # After the default device is set: mlx-lm makes its stream on it when it is imported.
        import mlx_lm  # type: ignore[import-not-found,import-untyped,unused-ignore]

        self.version = str(mlx_lm.__version__)
        self._model, config = load_model(folder)
        if self.provider == "cpu":
            speed_up(self._model)
        self._tokenizer: Any = None
        self._stops = read_stops(config)
        if has_tokenizer:
            self._tokenizer = load_tokenizer(folder, config.get("eos_token_id"))
            self._stops = set(self._tokenizer.eos_token_ids)

    def encode(self, text: str) -> list[int]:
        """Return token ids; the tokenizer parses special tokens and adds none."""
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def generate(
        self,
        prompt_ids: Sequence[int],
        new_tokens: int,
        sampling: Sampling = GREEDY,
        pixels: Pixels | None = None,
    ) -> Generator[tuple[int, str], None, None]:
        """Yield up to `new_tokens` (token id, text) pairs; ids below 0 stand for `pixels`."""
        prompt = list(prompt_ids)

        def work(put: Put[int]) -> None:
            self._run(prompt, pixels, new_tokens, sampling, put)

        with closing(self._producer.produce(work)) as tokens:
            yield from self._spell(tokens) if self._tokenizer else ((one, "") for one in tokens)

    def close(self) -> None:
        """Let the runtime free its memory."""
        self._producer.call(self._unload)

    def _unload(self) -> None:
        self._forget()
        del self._tokenizer, self._model
        self._mlx.clear_cache()

    def _run(
        self, prompt: list[int], pixels: Pixels | None, new_tokens: int, sampling: Sampling,
        put: Put[int],
    ) -> None:  # fmt: skip
        from mlx_lm.generate import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            generate_step,
        )

        known = prompt if pixels is None else name_pictures(prompt, pixels)
        self._trim_cache(known)
        seen = {}
        if pixels is not None:
            seen["input_embeddings"] = embed(self._model, prompt, pixels, self.reused_tokens)
        stops = self._stops
        steps = generate_step(
            self._mlx.array(prompt[self.reused_tokens :]),
            self._model,
            max_tokens=new_tokens,
            sampler=self._make_sampler(sampling) if sampling.temperature > 0 else None,
            prompt_cache=self._cache,
            prefill_step_size=self._settings.batch_tokens or 2048,
            kv_bits=self._settings.kv_bits,
            kv_group_size=KV_GROUP_SIZE,
            quantized_kv_start=0,
            **seen,
        )
        self._tokens = known
        try:
            with closing(steps):
                for token, _ in steps:
                    self._tokens.append(int(token))
                    if not put(int(token)) or int(token) in stops:
                        return
        except BaseException:
            self._forget()
            raise

    def _trim_cache(self, prompt: Sequence[int]) -> None:
        """Leave of the cache what this prompt begins with, and count it."""
        from mlx_lm.models import cache

        if self._cache is None or not cache.can_trim_prompt_cache(self._cache):
            self._cache, self._tokens = cache.make_prompt_cache(self._model), []
        # The network may be one token behind, or ahead of what was taken.
        seen = self._cache[0].offset
        self.reused_tokens = count_common(self._tokens[:seen], prompt)
        cache.trim_prompt_cache(self._cache, seen - self.reused_tokens)

    def _forget(self) -> None:
        self._cache, self._tokens = None, []

    def _make_sampler(self, sampling: Sampling) -> Callable[[Any], Any]:
        """Return a sampler: temperature first, then the fewest likeliest that reach top_p."""
        from mlx_lm.sample_utils import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            apply_top_p,
        )

        mlx, key = self._mlx, self._mlx.random.key(choose_seed(sampling))

        def sample(logprobs: Any) -> Any:
            nonlocal key
            key, now = mlx.random.split(key)
            scaled = logprobs.astype(mlx.float32) / sampling.temperature
            scaled = scaled - mlx.logsumexp(scaled, axis=-1, keepdims=True)
            if sampling.top_p < 1:
                scaled = apply_top_p(scaled, sampling.top_p)
            return mlx.random.categorical(scaled, key=now)

        return sample

    def _spell(self, tokens: Iterator[int]) -> Iterator[tuple[int, str]]:
        """Pair each token with the text it adds; a character comes with its last token."""
        answer: list[int] = []
        # The text of answer[done:] is what was shown of it, and what the newest token adds.
        done = shown = 0
        for token in tokens:
            answer.append(token)
            before, after = self._decode(answer[done:shown]), self._decode(answer[done:])
            piece = "" if after.endswith("\ufffd") else after[len(before) :]
            if piece:
                done, shown = shown, len(answer)
            yield token, piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


@functools.cache
def _find_thread() -> Producer[int]:
    """Return MLX's thread, which never ends.

    MLX cleans up after a thread with Python's lock in hand; where Python is ending at that moment,
    that ends the process with a signal.
    """
    return Producer(PACKAGE)


def load(
    folder: Path, main_file: str, provider: str, settings: Settings, has_tokenizer: bool = True
) -> Model:
    """Load the folder of `main_file`; Failure when the provider is not there."""
    check_offered(PACKAGE, settings, OFFERED)
    import mlx.core as mlx  # type: ignore[import-not-found,unused-ignore]

    _check_provider(mlx, provider)
    return Model(mlx, (folder / main_file).parent, provider, settings, has_tokenizer)


def _check_provider(mlx: Any, asked: str) -> None:
    if asked not in PROVIDERS:
        raise Failure("provider", f"provider {asked!r} is unknown; allowed: {', '.join(PROVIDERS)}")
    # The gpu of a Linux build is CUDA, so the device's name alone says nothing.
    if asked == "metal" and not mlx.metal.is_available():
        raise Failure(
            "provider",
            "the artifact asks for provider metal; mlx has none here",
            "Metal is there on Macs with Apple silicon; elsewhere build with provider: cpu",
        )
