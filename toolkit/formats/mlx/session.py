"""An artifact open in mlx-lm on this machine."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import ArtifactError, UnsupportedError, require
from toolkit.formats import Arithmetic
from toolkit.runner.engines._mlx_cpu import speed_up
from toolkit.runner.engines._mlx_vision import embed, load_model, load_tokenizer, read_stops
from toolkit.runner.images import Pixels

BATCH_TOKENS = 256  # positions that are computed at once


class MlxTokenizer:
    """mlx-lm's tokenizer of a folder."""

    def __init__(self, folder: Path) -> None:
        self.runtime = f"mlx-lm {require('mlx_lm').__version__}"
        stops = require("mlx_lm.utils").load_config(folder).get("eos_token_id")
        try:
            self._tokenizer = load_tokenizer(folder, stops)
        except Exception as error:  # transformers raises nothing narrower
            raise UnsupportedError(
                f"{self.runtime} does not load the tokenizer: {error}"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens parsed, nothing added."""
        return [int(t) for t in self._tokenizer.encode(text, add_special_tokens=False)]

    @property
    def stop_ids(self) -> set[int]:
        """The ids on which mlx-lm ends an answer: the configuration's and the tokenizer's own."""
        return set(self._tokenizer.eos_token_ids)

    def close(self) -> None:
        """Free it."""
        del self._tokenizer


class MlxSession:
    """Runs the artifact on a Mac's GPU, elsewhere on the CPU (runner/engines/_mlx_cpu.py).

    The weights are loaded when logits are first asked for; token ids need the tokenizer only.
    """

    def __init__(self, folder: Path) -> None:
        self._mx = require("mlx.core")
        self._utils = require("mlx_lm.utils")
        self._caches = require("mlx_lm.models.cache")
        self._folder = folder
        try:
            self._config = self._utils.load_config(folder)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder}: mlx-lm does not load it: {error}") from error
        has_metal = self._mx.metal.is_available()
        self._device = self._mx.gpu if has_metal else self._mx.cpu
        version = require("mlx_lm").__version__
        provider = "metal" if has_metal else "cpu"
        self.runtime = f"mlx-lm {version} (mlx {self._mx.__version__}), {provider}"

    @cached_property
    def _tokenizer(self) -> MlxTokenizer:
        return MlxTokenizer(self._folder)

    @cached_property
    def _stops(self) -> set[int]:
        try:
            return self._tokenizer.stop_ids
        except UnsupportedError:  # then the runner has none of it either
            return read_stops(self._config)

    @cached_property
    def _model(self) -> Any:
        try:
            with self._mx.stream(self._device):
                model, _ = load_model(self._folder, lazy=True)
                if self._device == self._mx.cpu:
                    speed_up(model)
                self._mx.eval(model.parameters())
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise ArtifactError(f"{self._folder}: mlx-lm does not load it: {error}") from error
        return model

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens parsed, nothing added."""
        return self._tokenizer.encode(text)

    @property
    def arithmetic(self) -> Arithmetic:
        """On the CPU float32, on a GPU the type of the scales and norms."""
        if self._device == self._mx.cpu:
            return "float32"
        types = {"float16": "float16", "float32": "float32"}
        return cast(Arithmetic, types.get(str(self._config.get("torch_dtype")), "bfloat16"))

    def exact_logits(self, texts: Sequence[list[int]]) -> list[NDArray[np.float32]]:
        """As `logits` of each text."""
        return [self.logits(ids) for ids in texts]

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """float32 [len(ids), vocabulary]."""
        cache = self._caches.make_prompt_cache(self._model)
        return self._extend(cache, ids)

    def picture_logits(self, ids: list[int], pixels: Pixels) -> NDArray[np.float32]:
        """float32 [len(ids), vocabulary]; ids below 0 stand for the pictures' rows, in order."""
        with self._mx.stream(self._device):
            rows = embed(self._model, ids, pixels)
        cache = self._caches.make_prompt_cache(self._model)
        return self._extend(cache, ids, input_embeddings=rows)

    def generate(self, ids: list[int], max_tokens: int) -> list[int]:
        """Greedy continuation; ends after the first stop id, which is included."""
        cache = self._caches.make_prompt_cache(self._model)
        tokens: list[int] = []
        while len(tokens) < max_tokens and not (tokens and self.stops(tokens[-1])):
            logits = self._extend(cache, tokens[-1:] or ids)
            tokens.append(int(logits[-1].argmax()))
        return tokens

    def stops(self, token: int) -> bool:
        """True when the runtime ends generation on this token."""
        return token in self._stops

    def close(self) -> None:
        """Free the model."""
        self.__dict__.pop("_tokenizer", None)
        self.__dict__.pop("_model", None)
        self._mx.clear_cache()

    def _extend(self, cache: list[Any], ids: list[int], **rows: Any) -> NDArray[np.float32]:
        """Append ids to the cache; logits after each of them. The model gets `rows` an id too."""
        parts = []
        with self._mx.stream(self._device):
            for start in range(0, len(ids), BATCH_TOKENS):
                batch = self._mx.array([ids[start : start + BATCH_TOKENS]])
                part = {k: v[None, start : start + BATCH_TOKENS] for k, v in rows.items()}
                logits = self._model(batch, cache=cache, **part)[0].astype(self._mx.float32)
                parts.append(np.array(logits))
        return np.concatenate(parts)
