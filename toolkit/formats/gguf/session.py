"""An artifact open in llama.cpp on this machine."""

import ctypes
import os
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import ArtifactError, UnsupportedError
from toolkit.formats import Arithmetic
from toolkit.formats.gguf.encoding import GgufTokenizer
from toolkit.formats.gguf.layout import DATA_FILE
from toolkit.formats.gguf.llama import Batch, attempt, load_llama
from toolkit.formats.gguf.tensors import read_tensors

THREADS = min(2, os.cpu_count() or 1)
BATCH_TOKENS = 128  # logits of so many positions are in memory at once, besides the result


class GgufSession:
    """Runs the artifact on the CPU, with keys and values in float16.

    The weights are loaded when logits are first asked for; until then the vocabulary only. Each
    call allocates the context it needs and no more: llama.cpp picks LongRoPE's factors by the
    allocated context, so that the long ones hold exactly where the source uses them too (when
    original_max_position_embeddings is a multiple of 256).
    """

    def __init__(self, folder: Path) -> None:
        self._llama = load_llama()
        self._path = folder / DATA_FILE
        self._model: int | None = None
        try:
            self._tokenizer = GgufTokenizer(self._path)
        except UnsupportedError as error:
            raise ArtifactError(f"{self._path}: {error}") from error
        self.runtime = f"{self._tokenizer.runtime}, cpu"

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens parsed, nothing added."""
        return self._tokenizer.encode(text)

    @cached_property
    def arithmetic(self) -> Arithmetic:
        """What llama.cpp rounds activations to: as the coarsest of its matrices asks."""
        kinds = {tensor.kind for tensor in read_tensors(self._path)}
        if kinds <= {"F32"}:
            return "float32"
        if kinds <= {"F32", "F16"}:
            return "float16 inputs"
        if kinds <= {"F32", "F16", "BF16"}:
            return "bfloat16 inputs"
        # What is multiplied with K-quants, and with IQ4_XS, is Q8_K.
        is_long = any(kind.endswith("_K") or kind == "IQ4_XS" for kind in kinds)
        return "int8 inputs in long blocks" if is_long else "int8 inputs"

    def exact_logits(self, texts: Sequence[list[int]]) -> list[NDArray[np.float32]]:
        """As `logits` of each text: llama.cpp has no other arithmetic."""
        return [self.logits(ids) for ids in texts]

    def logits(self, ids: list[int]) -> NDArray[np.float32]:
        """float32 [len(ids), vocabulary]."""
        with self._context(len(ids)) as context:
            return context.extend(ids)

    def generate(self, ids: list[int], max_tokens: int) -> list[int]:
        """Greedy continuation; ends after the first stop id, which is included."""
        tokens: list[int] = []
        with self._context(len(ids) + max_tokens) as context:
            while len(tokens) < max_tokens and not (tokens and self.stops(tokens[-1])):
                logits = context.extend(tokens[-1:] or ids, last_only=True)
                tokens.append(int(logits[-1].argmax()))
        return tokens

    def stops(self, token: int) -> bool:
        """True when the runtime ends generation on this token."""
        return self._tokenizer.stops(token)

    def close(self) -> None:
        """Free the model."""
        if self._model:
            self._llama.llama_model_free(self._model)
        self._model = None
        self._tokenizer.close()

    def _load(self) -> int:
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers = 0
        # Repacking for this machine's kernels would hold the weights twice.
        params.use_extra_bufts = False
        load = partial(self._llama.llama_model_load_from_file, os.fsencode(self._path), params)
        model, reason = attempt(load)
        if not model:
            raise ArtifactError(f"{self._path}: llama.cpp does not load it: {reason}")
        return int(model)

    def _context(self, length: int) -> "_Context":
        if self._model is None:
            self._model = self._load()
        return _Context(self._llama, self._model, self._tokenizer.size, length)


class _Context:
    """A sequence that grows; freed on leaving the block."""

    def __init__(self, llama: ctypes.CDLL, model: int, vocab_size: int, length: int) -> None:
        self._llama, self._vocab_size = llama, vocab_size
        params = llama.llama_context_default_params()
        params.n_ctx = length
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_outputs_max = params.n_outputs_max_per_seq = 0  # every position of a batch
        params.n_threads = params.n_threads_batch = THREADS
        self._context, reason = attempt(lambda: llama.llama_init_from_model(model, params))
        if not self._context:
            raise ArtifactError(f"llama.cpp cannot allocate a context of {length}: {reason}")

    def __enter__(self) -> "_Context":
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.llama_free(self._context)

    def extend(self, ids: list[int], last_only: bool = False) -> NDArray[np.float32]:
        """Append ids; logits after each of them, or after the last one."""
        out = np.empty((1 if last_only else len(ids), self._vocab_size), np.float32)
        for start in range(0, len(ids), BATCH_TOKENS):
            part = np.array(ids[start : start + BATCH_TOKENS], np.int32)
            wanted = np.full(len(part), not last_only, np.int8)
            wanted[-1] = True
            batch = Batch(len(part), part.ctypes.data, None, None, None, None, wanted.ctypes.data)
            status, reason = attempt(partial(self._llama.llama_decode, self._context, batch))
            if status:
                raise ArtifactError(f"llama.cpp failed to decode (status {status}): {reason}")
            rows = int(wanted.sum())
            found = np.ctypeslib.as_array(
                self._llama.llama_get_logits(self._context), (rows, self._vocab_size)
            )
            first = 0 if last_only else start
            out[first : first + rows] = found
        return out
