"""ggml and libllama in the shared library of the wheel `xllamacpp`, through ctypes.

The wheel's Python side offers a server only, so the library is opened without importing it: that
takes 10 ms and 8 MB.
"""

import ctypes
import importlib.util
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from toolkit.errors import MissingExtraError, require

PACKAGE = "xllamacpp"


@cache
def load_library() -> ctypes.CDLL:
    """Open the library, once per process; MissingExtraError when it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    names = [PACKAGE + suffix for suffix in EXTENSION_SUFFIXES]
    for path in (Path(folder) / name for folder in folders for name in names):
        if path.is_file():
            return _declare(ctypes.CDLL(str(path)))
    require(PACKAGE)
    raise MissingExtraError(
        f"{PACKAGE}: found {', '.join(folders) or 'no folder'} without {' or '.join(names)}",
        advice="install it again with: pip install --force-reinstall 'phiship[gguf]'",
    )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Give the kernels their types (ggml.h)."""
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    try:
        quantize = library.ggml_quantize_chunk
    except AttributeError as error:
        raise MissingExtraError(
            f"{library._name}: {error}: this build of {PACKAGE} does not export ggml",
            advice="install the wheel of PyPI: pip install 'phiship[gguf]'",
        ) from error
    quantize.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    quantize.restype = ctypes.c_size_t
    return library
