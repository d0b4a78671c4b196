"""llama.cpp's tokenizer of a GGUF file; the weights stay where they are."""

import ctypes
import json
import os
from functools import partial
from pathlib import Path

import numpy as np

from toolkit.errors import ArtifactError, UnsupportedError
from toolkit.formats.gguf.llama import VERSION, Override, attempt, load_llama
from toolkit.formats.gguf.stripping import STRIP_KEY
from toolkit.runner.chat import strip_text

STRIP_VALUE_BYTES = 1 << 16
PRE_KEY = "tokenizer.ggml.pre"


class GgufTokenizer:
    """The tokenizer of a file; `pre` stands for the name of the splitting that the file has."""

    def __init__(self, path: Path, pre: str = "") -> None:
        self.runtime = f"xllamacpp {VERSION} (llama.cpp)"
        self._llama = load_llama()
        self._model: int | None = self._load(path, pre)
        self._vocab = self._llama.llama_model_get_vocab(self._model)
        self.size = int(self._llama.llama_vocab_n_tokens(self._vocab))
        self._strippers = self._read_strippers()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens parsed, nothing added.

        White space behind some special tokens is dropped first where llama.cpp would keep it and
        the source does not: see stripping.py.
        """
        raw = strip_text(text, self._strippers).encode()
        ids = np.empty(len(raw) + 8, np.int32)  # no token is shorter than a byte
        count = self._llama.llama_tokenize(
            self._vocab, raw, len(raw), ids.ctypes.data, len(ids), False, True
        )
        if count < 0:
            raise ArtifactError(f"llama.cpp cannot tokenize a text of {len(raw)} bytes: {count}")
        return [int(token) for token in ids[:count]]

    def stops(self, token: int) -> bool:
        """True when the runtime ends generation on this token."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Free it."""
        if self._model:
            self._llama.llama_model_free(self._model)
        self._model = None

    def _load(self, path: Path, pre: str) -> int:
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.vocab_only = True
        overrides = (Override * 2)(Override.of_text(PRE_KEY, pre))  # an empty one ends the list
        if pre:
            params.kv_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        load = partial(self._llama.llama_model_load_from_file, os.fsencode(path), params)
        model, reason = attempt(load)
        if not model:
            reason = reason.replace(str(path), path.name)
            raise UnsupportedError(f"llama.cpp does not load it: {reason}")
        return int(model)

    def _read_strippers(self) -> list[str]:
        value = ctypes.create_string_buffer(STRIP_VALUE_BYTES)
        found = self._llama.llama_model_meta_val_str(
            self._model, STRIP_KEY.encode(), value, len(value)
        )
        return list(json.loads(value.value)) if found > 0 else []
