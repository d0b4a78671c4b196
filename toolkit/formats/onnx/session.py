"""An artifact open in onnxruntime-genai on this machine."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import UnsupportedError, require
from toolkit.formats import Arithmetic
from toolkit.formats.onnx.exact import make_exact, read_arithmetic
from toolkit.runner.engines.onnxruntime_genai import load_adapter, make_generator, make_inputs
from toolkit.runner.images import Pixels

UNREADABLE = ("WordPiece", "WordLevel")  # it may crash on them, instead of refusing


class OnnxTokenizer:
    """onnxruntime-genai's tokenizer of a folder; of the configuration it needs no more."""

    def __init__(self, folder: Path) -> None:
        genai = require("onnxruntime_genai")
        self.runtime = f"onnxruntime-genai {genai.__version__}"
        if (kind := _read_kind(folder)) in UNREADABLE:
            raise UnsupportedError(f"{self.runtime} has no tokenizer for a {kind} tokenizer")
        try:
            self._tokenizer = genai.Tokenizer(genai.Config(str(folder)))
        except RuntimeError as error:
            raise UnsupportedError(
                f"{self.runtime} does not load the tokenizer: {error}"
            ) from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens parsed, nothing added."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def close(self) -> None:
        """Free it."""
        del self._tokenizer


def _read_kind(folder: Path) -> str:
    """The model of tokenizer.json; empty where there is none that can be read."""
    try:
        return str(json.loads((folder / "tokenizer.json").read_bytes())["model"]["type"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class OnnxSession:
    """Runs the artifact on the CPU provider, whatever provider it was built for.

    The weights are loaded when the first logits are asked for; token ids need the tokenizer only.
    """

    def __init__(self, folder: Path, adapter: str = "") -> None:
        """`adapter` is the file of one that is to be active."""
        self._genai = require("onnxruntime_genai")
        self._config = self._genai.Config(str(folder))
        self._config.clear_providers()
        self._folder = folder
        settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self._adapter = folder / adapter if adapter else None
        self._stops = set(settings["model"]["eos_token_id"])
        self.runtime = f"onnxruntime-genai {self._genai.__version__}, cpu"

    @cached_property
    def _tokenizer(self) -> OnnxTokenizer:
        return OnnxTokenizer(self._folder)

    @cached_property
    def _model(self) -> Any:
        return self._genai.Model(self._config)

    @cached_property
    def _adapters(self) -> Any:
        return load_adapter(self._genai, self._model, self._adapter) if self._adapter else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens parsed, nothing added."""
        return self._tokenizer.encode(text)

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """float32 [len(ids), vocabulary]."""
        generator = self._generator(len(ids) + 1)
        generator.append_tokens(np.array([ids], np.int32))
        logits: NDArray[np.float32] = np.asarray(generator.get_output("logits"))[0].astype("f4")
        return logits

    @property
    def arithmetic(self) -> Arithmetic:
        """The type of the graph's activations."""
        return read_arithmetic(self._folder)

    def exact_logits(self, texts: Sequence[list[int]]) -> list[NDArray[np.float32]]:
        """As `logits` of each text, with float activations where the graph asks for 8 bits."""
        self.__dict__.pop("_adapters", None)
        self.__dict__.pop("_model", None)  # only one has its weights in memory
        with make_exact(self._folder) as folder:
            exact = OnnxSession(folder, self._adapter.name if self._adapter else "")
            try:
                return [exact.logits(ids) for ids in texts]
            finally:
                exact.close()

    def picture_logits(self, ids: list[int], pixels: Pixels) -> NDArray[np.float32]:
        """float32 [len(ids), vocabulary]; ids below 0 stand for the pictures' rows, in order."""
        generator = self._generator(len(ids) + 1)
        generator.set_inputs(make_inputs(self._genai, ids, pixels))
        logits: NDArray[np.float32] = np.asarray(generator.get_output("logits"))[0].astype("f4")
        return logits

    def generate(self, ids: list[int], max_tokens: int) -> list[int]:
        """Greedy continuation; ends after the first stop id, which is included."""
        generator = self._generator(len(ids) + max_tokens)
        generator.append_tokens(np.array([ids], np.int32))
        tokens: list[int] = []
        while len(tokens) < max_tokens and not generator.is_done():
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens

    def stops(self, token: int) -> bool:
        """True when the runtime ends generation on this token."""
        return token in self._stops

    def close(self) -> None:
        """Free the model."""
        self.__dict__.pop("_adapters", None)
        self.__dict__.pop("_model", None)
        self.__dict__.pop("_tokenizer", None)

    def _generator(self, max_length: int) -> Any:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=max_length, do_sample=False)
        return make_generator(self._genai, self._model, params, self._adapters)
