"""An adapter apart: low-rank branches in the graph, their A and B in a file of its own.

A and B are inputs that have a default, of rank 0, under which a branch adds nothing; a file that a
program makes active gives others by name. The graph knows the matrices that have a branch, and no
rank: adapters of the same modules share it, and what lies in the data file is as without any.

Source: onnxruntime's AdapterFormat and LoraAdapter (onnxruntime/lora); the adapter file
specification in onnxruntime-genai's docs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint.lora import Adapter
from toolkit.decoder import Decoder, Parts, Rows
from toolkit.errors import BuildError, CheckpointError, PlanError, require
from toolkit.formats.onnx import layout
from toolkit.formats.onnx.encoders import ITEM_BYTES, convert
from toolkit.formats.onnx.nodes import Graph
from toolkit.formats.onnx.recipe import OnnxRecipe
from toolkit.recipe import Recipe

FILE = "adapter.onnx_adapter"
VERSION = 1  # of adapter and model, which the file has room for; nothing compares them
BRANCH_BYTES = 3000  # of a matrix in the graph, and around its A and B in the file, rounded up


def measure(recipe: Recipe, decoder: Decoder, adapter: Adapter) -> int:
    """Bytes of the adapter's file and of its branches; PlanError for what has no branch."""
    recipe = cast(OnnxRecipe, recipe)
    where, merged = f"{recipe.name}: adapter_apart", "leave it out to have the adapter merged"
    if decoder.vision:
        raise PlanError(f"{where}: is for models that read text alone", advice=merged)
    if adapter.is_untied:
        raise PlanError(
            f"{where}: the adapter changes the head or the embedding of a model that has one "
            "tensor for both",
            advice=merged,
        )
    for name, some in adapter.changes.items():
        if beyond := next((one.beyond for one in some if one.beyond), ""):
            raise PlanError(
                f"{where}: {name}: the adapter has {beyond} for it; beside a model stand low-rank "
                "updates of linear layers alone",
                advice=merged,
            )
    placed = layout.lay_out(recipe, decoder, decoder.context)
    able = {parts[0].tensor for parts in placed.linears.values() if _is_plain(parts)}
    if unable := sorted(set(adapter.changes) - able):
        raise PlanError(
            f"{where}: {unable[0]}: it is a router, or its rows go into one operator with those of "
            f"others, or in another order ({decoder.family}); a branch goes beside matrices that "
            "are one operand of a layer",
            advice=merged,
        )
    return adapter.weights * ITEM_BYTES[recipe.io_dtype] + BRANCH_BYTES * len(adapter.changes)


def _is_plain(parts: Parts) -> bool:
    """Whether an operand is rows of one matrix as they follow each other."""
    return len(parts) == 1 and parts[0].step == 1


def _name_part(matrix: str, part: str) -> str:
    """What A or B of a matrix is called, in the graph and in the file."""
    return f"{matrix.removesuffix('.weight')}.lora_{part}.weight"


def add_branch(graph: Graph, part: Rows, value: str, product: str, output: str) -> str:
    """The product with rows of a matrix, and what an adapter adds to it."""
    update = _add_update(graph, part.tensor, value)
    if part.count < graph.decoder.shapes()[part.tensor][0]:
        limits = (graph.integers(n) for n in (part.start, part.start + part.count, -1))
        update = graph.add("Slice", [update, *limits], f"{product}/update")
    return graph.add_many("Add", [product, update], f"{product}/adapted", [output])


def _add_update(graph: Graph, matrix: str, value: str) -> str:
    """The value times A times B; once, where several operands are rows of the matrix."""
    if matrix not in graph.updates:
        rows, columns = graph.decoder.shapes()[matrix]
        narrow = _add_product(graph, _name_part(matrix, "A"), value, (columns, None))
        graph.updates[matrix] = _add_product(graph, _name_part(matrix, "B"), narrow, (None, rows))
    return graph.updates[matrix]


def _add_product(graph: Graph, name: str, value: str, shape: tuple[int | None, int | None]) -> str:
    """The product with an input of this shape, None being the rank; its default has rank 0."""
    dtype, dims = graph.layout.recipe.io_dtype, [size or 0 for size in shape]
    default = graph.onnx.helper.make_tensor(name, graph.elem(dtype), dims, b"", raw=True)
    graph.optional.append((graph.info(name, dtype, shape), default))
    return graph.add("MatMul", [value, name], f"/{name.removesuffix('.weight').replace('.', '/')}")


def write(path: Path, recipe: OnnxRecipe, adapter: Adapter) -> None:
    """Write an adapter's file: A [in, rank] and B [rank, out], in the activations' type.

    All of them are in memory at once, more than twice. CheckpointError for what that type cannot
    hold, BuildError where the disk is full.
    """
    runtime = require("onnxruntime")
    values = {}
    for matrix, a, b in adapter.read_pairs():
        for part, weights in (("A", a), ("B", b)):
            name = _name_part(matrix, part)
            try:
                turned = np.ascontiguousarray(convert(weights, recipe.io_dtype).T)
            except ValueError as error:
                raise CheckpointError(f"{adapter.folder}: {name}: {error}") from error
            values[name] = runtime.OrtValue.ortvalue_from_numpy(turned)
    file = runtime.AdapterFormat()
    file.set_adapter_version(VERSION)
    file.set_model_version(VERSION)
    file.set_parameters(values)
    try:
        file.export_adapter(str(path.absolute()))
    except RuntimeError as error:
        raise BuildError(
            f"{path}: onnxruntime cannot write it", advice="free space or choose another --out"
        ) from error


def read(folder: Path) -> Mapping[str, Any]:
    """An artifact's A and B by name, as onnxruntime's values; none where it has no adapter."""
    if not (folder / FILE).is_file():
        return {}
    found: Mapping[str, Any] = (
        require("onnxruntime").AdapterFormat.read_adapter(str(folder / FILE)).get_parameters()
    )
    return found


def multiply(values: Mapping[str, Any], matrix: str) -> NDArray[np.float32] | None:
    """What is added to a matrix [out, in]; None where nothing is."""
    if _name_part(matrix, "A") not in values:
        return None
    a, b = (values[_name_part(matrix, part)].numpy().astype(np.float32) for part in "AB")
    update: NDArray[np.float32] = (a @ b).T
    return update
