"""Nodes and initializers of a graph, and the ModelProto that they become."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.decoder import Decoder
from toolkit.errors import require
from toolkit.formats.onnx.layout import DATA_FILE, Layout, Stored

MICROSOFT = "com.microsoft"
IR_VERSION = 10
OPSET = 21
ONNX_NAMES = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
}


@dataclass
class Graph:
    """Nodes in order; each helper adds one and returns the name of its first output.

    Matrices that are `adapted` have a branch beside them (apart.py): `updates` are what these add,
    `optional` their inputs, each with its default.
    """

    onnx: Any
    layout: Layout
    adapted: Collection[str] = ()
    nodes: list[Any] = field(default_factory=list)
    constants: dict[tuple[int, ...], str] = field(default_factory=dict)
    numbers: dict[tuple[float, str], str] = field(default_factory=dict)
    updates: dict[str, str] = field(default_factory=dict)
    optional: list[tuple[Any, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, layout: Layout, adapted: Collection[str] = ()) -> "Graph":
        """An empty graph over a layout's tensors."""
        return cls(require("onnx"), layout, adapted)

    @property
    def decoder(self) -> Decoder:
        """The architecture that the layout is of."""
        return self.layout.decoder

    def elem(self, dtype: str) -> int:
        """ONNX's number of an element type."""
        return int(getattr(self.onnx.TensorProto, ONNX_NAMES[dtype]))

    def add(
        self, op: str, inputs: list[str], name: str, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output, named after the node."""
        return self.add_many(op, inputs, name, [f"{name}/output"], domain, **attributes)

    def add_many(
        self, op: str, inputs: list[str], name: str, outputs: list[str], domain: str = "",
        **attributes: Any,
    ) -> str:  # fmt: skip
        """Add a node with several outputs; an empty name leaves one out."""
        make = self.onnx.helper.make_node
        self.nodes.append(make(op, inputs, outputs, name=name, domain=domain, **attributes))
        return outputs[0]

    def integers(self, *values: int, scalar: bool = False) -> str:
        """An int64 constant."""
        key = (scalar, *values)
        if key not in self.constants:
            name = f"/constants/{'scalar' if scalar else 'list'}/{'_'.join(map(str, values))}"
            shape = [] if scalar else [len(values)]
            tensor = self.onnx.helper.make_tensor("", self.elem("int64"), shape, values)
            self.nodes.append(self.onnx.helper.make_node("Constant", [], [name], value=tensor))
            self.constants[key] = name
        return self.constants[key]

    def number(self, value: float, dtype: str = "float32") -> str:
        """A float scalar."""
        key = (value, dtype)
        if key not in self.numbers:
            name = f"/constants/number/{'' if dtype == 'float32' else f'{dtype}/'}{value}"
            tensor = self.onnx.helper.make_tensor("", self.elem(dtype), [], [value])
            self.nodes.append(self.onnx.helper.make_node("Constant", [], [name], value=tensor))
            self.numbers[key] = name
        return self.numbers[key]

    def active(self, value: float) -> str:
        """A scalar of the activations' type."""
        return self.number(value, self.layout.recipe.io_dtype)

    def info(self, name: str, dtype: str, shape: Sequence[int | str | None]) -> Any:
        """An input or output of the graph."""
        return self.onnx.helper.make_tensor_value_info(name, self.elem(dtype), shape)


def make_proto(
    graph: "Graph", name: str, inputs: list[Any], outputs: list[Any], producer: str
) -> Any:
    """The ModelProto of a graph, with those initializers that its nodes take."""
    onnx, layout = graph.onnx, graph.layout
    taken = {name for node in graph.nodes for name in node.input}
    stored = [one for one in layout.stored.values() if one.name in taken]
    initializers = [_initializer(onnx, one) for one in stored]
    for optional, default in graph.optional:
        inputs, initializers = [*inputs, optional], [*initializers, default]
    proto = onnx.helper.make_graph(graph.nodes, name, inputs, outputs, initializers)
    opsets = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(MICROSOFT, 1)]
    return onnx.helper.make_model(
        proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name=producer
    )


def _initializer(onnx: Any, stored: Stored) -> Any:
    tensor = onnx.TensorProto(
        name=stored.name,
        data_type=getattr(onnx.TensorProto, ONNX_NAMES[stored.dtype]),
        dims=stored.shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (
        ("location", DATA_FILE),
        ("offset", stored.offset),
        ("length", stored.nbytes),
    ):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
