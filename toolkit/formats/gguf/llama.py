"""libllama's C API as far as a session needs it.

Structs are passed by value and their layouts follow the llama.cpp of the wheel (llama.h), so the
wheel's version is checked first. Fields behind those that are set here are covered by spare bytes:
such structs travel in memory, where a longer copy does no harm.
"""

import ctypes
import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import Any

from toolkit.errors import MissingExtraError, require
from toolkit.formats.gguf.ggml import PACKAGE, load_library

VERSION = "2026.10.11549"
OVERRIDE_TEXT = 3  # LLAMA_KV_OVERRIDE_TYPE_STR
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _Value(ctypes.Union):
    _fields_ = (("number", ctypes.c_int64), ("text", ctypes.c_char * 128))


class Override(ctypes.Structure):
    """llama_model_kv_override: a value of the file's metadata that another stands for."""

    _fields_ = (("kind", ctypes.c_int), ("key", ctypes.c_char * 128), ("value", _Value))

    @classmethod
    def of_text(cls, key: str, text: str) -> "Override":
        """One whose value is a text of at most 127 bytes."""
        return cls(OVERRIDE_TEXT, key.encode(), _Value(text=text.encode()))


class ModelParams(ctypes.Structure):
    """The head of llama_model_params."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int32),
        ("load_mode", ctypes.c_int32),
        ("lazy_mode", ctypes.c_int32),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("check_tensors", ctypes.c_bool),
        ("use_extra_bufts", ctypes.c_bool),
        ("rest", ctypes.c_uint8 * 61),
    )


class ContextParams(ctypes.Structure):
    """The head of llama_context_params."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("rest", ctypes.c_uint64 * 32),
    )


class Batch(ctypes.Structure):
    """llama_batch; null `pos` and `seq_id` mean the next positions of sequence 0."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_POINTER, _INT, _FLAG, _TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, _POINTER]),
    "llama_version": (_TEXT, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_model_load_from_file": (_POINTER, [_TEXT, ModelParams]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_model_meta_val_str": (_INT, [_POINTER, _TEXT, _TEXT, ctypes.c_size_t]),
    "llama_model_n_ctx_train": (_INT, [_POINTER]),
    "llama_context_default_params": (ContextParams, []),
    "llama_init_from_model": (_POINTER, [_POINTER, ContextParams]),
    "llama_free": (None, [_POINTER]),
    "llama_n_ctx": (ctypes.c_uint32, [_POINTER]),
    "llama_n_batch": (ctypes.c_uint32, [_POINTER]),
    "llama_n_threads": (_INT, [_POINTER]),
    "llama_decode": (_INT, [_POINTER, Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [_POINTER]),
    "llama_vocab_n_tokens": (_INT, [_POINTER]),
    "llama_vocab_is_eog": (_FLAG, [_POINTER, _INT]),
    "llama_tokenize": (_INT, [_POINTER, _TEXT, _INT, _POINTER, _INT, _FLAG, _FLAG]),
}

# What llama.cpp said of its last failure; the callback must live as long as the library.
_last_errors: list[str] = []


def _log(level: int, text: bytes | None, _: int | None) -> None:
    if level == ERROR_LEVEL and text:
        _last_errors.append(text.decode("utf-8", "replace").strip())


_log_callback = LogCallback(_log)


@cache
def load_llama() -> ctypes.CDLL:
    """libllama with its functions declared, its log silenced; MissingExtraError otherwise."""
    library = load_library()
    _check_version()
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_log_callback, None)
    library.llama_backend_init()
    return library


def attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    """The call's result, and what llama.cpp logged as errors meanwhile."""
    # Each time: a server of the wheel in this process has taken the log since.
    load_llama().llama_log_set(_log_callback, None)
    _last_errors.clear()
    result = call()
    return result, "; ".join(_last_errors[-3:])


def _check_version() -> None:
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        require(PACKAGE)
        found = "unknown"
    if found != VERSION:
        raise MissingExtraError(
            f"{PACKAGE}: found version {found}; the struct layouts known here are those of "
            f"{VERSION}",
            advice=f"install it with: pip install {PACKAGE}=={VERSION}",
        )
