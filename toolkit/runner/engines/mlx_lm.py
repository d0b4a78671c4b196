"""MLX artifacts through mlx-lm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..failure import Failure
from ..settings import GREEDY, Sampling, Settings

PACKAGE = "mlx-lm"
MODULE = "mlx_lm"
# The MLX device of each provider.
PROVIDERS = {"cpu": "cpu", "metal": "gpu"}
OFFERED: dict[str, tuple[int, ...]] = {}


class Model:
    """A loaded MLX folder."""

    def __init__(self, mlx: Any, folder: Path, provider: str) -> None:
        # After the default device is set: mlx-lm makes its stream on it when it is imported.
        import mlx_lm  # type: ignore[import-not-found,import-untyped,unused-ignore]
        from mlx_lm.generate import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
            generate_step,
        )

        self._array, self._step = mlx.array, generate_step
        self.version = str(mlx_lm.__version__)
        self.provider = provider
        try:
            self._model, self._tokenizer = mlx_lm.load(str(folder))[:2]
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise Failure("model", f"{folder}: mlx-lm cannot load it: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Return token ids; the tokenizer parses special tokens and adds none."""
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def generate(
        self, prompt_ids: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY
    ) -> Iterator[tuple[int, str]]:
        """Yield up to `new_tokens` (token id, text) pairs, greedily."""
        stops = self._tokenizer.eos_token_ids
        tokens: list[int] = []
        # The text of tokens[done:] is what was shown of it, and what the newest token adds.
        done = shown = 0
        prompt = self._array(list(prompt_ids))
        for token, _ in self._step(prompt, self._model, max_tokens=new_tokens):
            tokens.append(int(token))
            before, after = self._decode(tokens[done:shown]), self._decode(tokens[done:])
            piece = "" if after.endswith("\ufffd") else after[len(before) :]
            if piece:  # a piece of a character has a token but no text yet
                done, shown = shown, len(tokens)
            yield tokens[-1], piece
            if tokens[-1] in stops:
                return

    def close(self) -> None:
        """Let the runtime free its memory."""
        del self._tokenizer, self._model

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def load(folder: Path, main_file: str, provider: str, settings: Settings) -> Model:
    """Load the folder of `main_file`; Failure when the provider is not there."""
    del settings  # this engine's cache grows with the text
    import mlx.core as mlx  # type: ignore[import-not-found,unused-ignore]

    _check_provider(mlx, provider)
    mlx.set_default_device(getattr(mlx, PROVIDERS[provider]))
    return Model(mlx, (folder / main_file).parent, provider)


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
