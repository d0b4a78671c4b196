"""Read an artifact back with gguf-py and dequantize it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError, require
from toolkit.formats.gguf.layout import DATA_FILE, rope_factors, source_names


def dequantize(folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (checkpoint name, float32 weights) in the order of the file.

    ArtifactError when a tensor is missing, or there is one that the decoder does not have.
    """
    gguf = require("gguf")
    path = folder / DATA_FILE
    sources = source_names(decoder)
    tensors = gguf.GGUFReader(path).tensors
    found = {tensor.name for tensor in tensors}
    if different := found ^ {*sources, *rope_factors(decoder)}:
        raise ArtifactError(f"{path}: tensors that are missing or unknown: {sorted(different)}")
    for tensor in tensors:
        if tensor.name in sources:
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
            yield sources[tensor.name], np.asarray(weights, np.float32)
