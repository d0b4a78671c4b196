"""Read an artifact back with MLX's own reader and dequantize it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError, require
from toolkit.formats.mlx.layout import DATA_FILE
from toolkit.formats.mlx.modules import is_kernel, list_tensors
from toolkit.overrides import path_of


def dequantize(folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (checkpoint name, float32 weights), computed in float32 from the stored scales.

    ArtifactError when a tensor is missing, or there is one that the decoder does not have.
    """
    mx = require("mlx.core")
    path = folder / DATA_FILE
    tensors = mx.load(str(path))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization", {})
    with mx.stream(mx.cpu):
        for name, sources in list_tensors(decoder).items():
            module = path_of(name)
            keys = [k for k in (f"{module}.scales", f"{module}.biases") if k in tensors]
            if name not in tensors or len(keys) == 1:
                raise ArtifactError(f"{path}: {module} is incomplete")
            stored = [tensors.pop(key) for key in (name, *keys)]
            scheme = quantization.get(module, quantization)
            for number, source in enumerate(sources):
                weight, *parts = stored if name in sources else [part[number] for part in stored]
                if parts:
                    scales, biases = (part.astype(mx.float32) for part in parts)
                    size, bits = scheme["group_size"], scheme["bits"]
                    weight = mx.dequantize(weight, scales, biases, group_size=size, bits=bits)
                if is_kernel(decoder, source):
                    weight = weight.transpose(0, 3, 1, 2)
                yield source, np.array(weight.astype(mx.float32))
    if tensors:
        raise ArtifactError(f"{path}: unknown tensors: {', '.join(sorted(tensors))}")
