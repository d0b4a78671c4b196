"""An artifact as onnxruntime computes it in float: the same files, but for one attribute of nodes.

`accuracy_level: 4` lets MatMulNBits round activations to 8 bits, which is what makes it fast on a
CPU. Without it the kernels multiply floats by the same stored codes.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolkit.errors import require
from toolkit.formats import Arithmetic

MODEL_FILE = "model.onnx"
ACCURACY = "accuracy_level"


@contextmanager
def make_exact(folder: Path) -> Iterator[Path]:
    """Yield a folder with the artifact's files, linked, and a graph that asks for float."""
    onnx = require("onnx")
    with tempfile.TemporaryDirectory(prefix=".exact-", dir=folder.parent) as made:
        for path in folder.iterdir():
            if path.is_file() and path.name != MODEL_FILE:
                os.link(path, Path(made) / path.name)
        model = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
        for node in model.graph.node:
            kept = [one for one in node.attribute if one.name != ACCURACY]
            del node.attribute[:]
            node.attribute.extend(kept)
        onnx.save(model, str(Path(made) / MODEL_FILE))
        yield Path(made)


def read_arithmetic(folder: Path) -> Arithmetic:
    """What activations are where the graph is exact: the type of its logits."""
    onnx = require("onnx")
    graph = onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph
    logits = next(one for one in graph.output if one.name == "logits")
    is_half = logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    return "float16" if is_half else "float32"
