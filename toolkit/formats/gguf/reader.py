"""Read an artifact back with gguf-py and dequantize it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError, require
from toolkit.formats.gguf.layout import DATA_FILE, list_folds, rope_factors, source_names
from toolkit.formats.gguf.tensors import read_tensors


def dequantize(folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (checkpoint name, float32 weights) in the order of the file, scales unfolded.

    ArtifactError when a tensor is missing, or there is one that the decoder does not have.
    """
    gguf = require("gguf")
    path = folder / DATA_FILE
    sources, folds = source_names(decoder), list_folds(decoder)
    tensors = read_tensors(path)
    found = {tensor.name for tensor in tensors}
    if different := found ^ {*sources, *rope_factors(decoder)}:
        raise ArtifactError(f"{path}: tensors that are missing or unknown: {sorted(different)}")
    for tensor in tensors:
        names = sources.get(tensor.name, ())
        for number, name in enumerate(names):
            data = tensor.data[number] if len(names) > 1 else tensor.data
            weights = np.asarray(gguf.dequantize(data, tensor.kind), np.float32)
            yield name, weights / np.float32(folds[name].scale) if name in folds else weights
