"""OpenVINO's intermediate representation, version 11: layers and edges as XML, built by hand.

The runtime derives shapes itself when it reads a network, so ports carry types only. Every constant
is an offset into the data file.

Source: docs.openvino.ai, "OpenVINO IR format", and the operation sets' specifications.
"""

from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import Element, ElementTree, SubElement, indent

from toolkit.formats.openvino.layout import Layout

IR_VERSION = 11
# The operation set that each operation is taken from.
OPSETS = {
    **dict.fromkeys(("Add", "Divide", "Multiply", "Power", "Subtract"), 1),
    **dict.fromkeys(("Abs", "Exp", "Maximum", "Minimum", "ReduceSum"), 1),
    **dict.fromkeys(("Equal", "Greater", "GreaterEqual", "LessEqual", "LogicalOr", "Select"), 1),
    **dict.fromkeys(("Clamp", "Convolution", "FloorMod", "Less", "ReduceMin"), 1),
    **dict.fromkeys(("Const", "Convert", "Parameter", "Result"), 1),
    **dict.fromkeys(("Cos", "MatMul", "ReduceMax", "ReduceMean", "Sin", "Sqrt"), 1),
    **dict.fromkeys(("Concat", "Reshape", "Tile", "Transpose", "Unsqueeze", "VariadicSplit"), 1),
    **dict.fromkeys(("Broadcast", "ScatterElementsUpdate", "ShapeOf"), 3),
    **dict.fromkeys(("Range", "Swish"), 4),
    **dict.fromkeys(("Assign", "MVN", "ReadValue"), 6),
    "Gelu": 7,
    **dict.fromkeys(("Gather", "Slice"), 8),
    "TopK": 11,
    **dict.fromkeys(("BitwiseAnd", "ScaledDotProductAttention"), 13),
}
PRECISIONS = {
    "f32": "FP32",
    "f16": "FP16",
    "i64": "I64",
    "i32": "I32",
    "u8": "U8",
    "i4": "I4",
    "u4": "U4",
    "boolean": "BOOL",
}


@dataclass(frozen=True)
class Value:
    """An output of a layer."""

    layer: int
    port: int
    dtype: str


@dataclass
class Network:
    """Layers in order of use; `add` takes their inputs and returns their output."""

    name: str
    layout: Layout
    _layers: Element = field(default_factory=lambda: Element("layers"))
    _edges: Element = field(default_factory=lambda: Element("edges"))
    _options: dict[str, str] = field(default_factory=dict)
    _constants: dict[str, Value] = field(default_factory=dict)

    def add(
        self, kind: str, *inputs: Value, dtype: str = "", name: str = "", **data: str | int | bool
    ) -> Value:
        """Add a layer with one output, by default of the first input's type."""
        return self.add_many(kind, *inputs, outputs=1, dtype=dtype, name=name, **data)[0]

    def add_many(
        self, kind: str, *inputs: Value, outputs: int, dtype: str = "", name: str = "",
        **data: str | int | bool,
    ) -> list[Value]:  # fmt: skip
        """Add a layer; `data` are the operation's attributes. Ports count inputs, then outputs."""
        return self._add(kind, inputs, [dtype or inputs[0].dtype] * outputs, name, data)

    def add_top(self, values: Value, count: int) -> tuple[Value, Value]:
        """The largest values along the last axis, first ones first, and their int64 places."""
        data: dict[str, str | int | bool] = {
            "axis": -1, "mode": "max", "sort": "value", "index_element_type": "i64",
        }  # fmt: skip
        inputs = (values, self.integer(count))
        top, places = self._add("TopK", inputs, [values.dtype, "i64"], "", data)
        return top, places

    def _add(
        self, kind: str, inputs: tuple[Value, ...], dtypes: list[str], name: str,
        data: dict[str, str | int | bool],
    ) -> list[Value]:  # fmt: skip
        number = len(self._layers)
        layer = SubElement(
            self._layers, "layer", id=str(number), name=name or f"{kind}_{number}", type=kind,
            version=f"opset{OPSETS[kind]}",
        )  # fmt: skip
        if data:
            SubElement(layer, "data", {key: _spell(value) for key, value in data.items()})
        self._connect(layer, number, inputs)
        values = [Value(number, len(inputs) + index, one) for index, one in enumerate(dtypes)]
        if values:
            ports = SubElement(layer, "output")
            for value in values:
                SubElement(ports, "port", id=str(value.port), precision=PRECISIONS[value.dtype])
        return values

    def label(self, value: Value, name: str) -> None:
        """Name a tensor, which is how programs find inputs and outputs."""
        for port in self._layers[value.layer].iterfind(f"output/port[@id='{value.port}']"):
            port.set("names", name)

    def mark_decompression(self, value: Value) -> None:
        """Tell the runtime to keep what feeds this Convert compressed."""
        info = SubElement(self._layers[value.layer], "rt_info")
        SubElement(info, "attribute", name="decompression", version="0")

    def set_runtime_option(self, key: str, value: str) -> None:
        """Give a runtime property its default for this model."""
        self._options[key] = value

    def constant(self, name: str) -> Value:
        """What the layout stored under a name; the same layer each time."""
        if name not in self._constants:
            stored = self.layout.stored[name]
            self._constants[name] = self.add(
                "Const", dtype=stored.dtype, name=name, element_type=stored.dtype,
                shape=",".join(map(str, stored.shape)), offset=stored.offset, size=stored.nbytes,
            )  # fmt: skip
        return self._constants[name]

    def matrix(self, name: str) -> Value:
        """An [..., out, in] matrix as float32, which the runtime keeps as it is stored.

        Only in this order: scale, reshape, convert to float32. Any other one is computed at load.
        """
        layout, value = self.layout, self.constant(name)
        if (scale := f"{name}/scale") in layout.stored:
            value = self._to_half(value)
            if (points := f"{name}/zero_point") in layout.stored:
                value = self.add("Subtract", value, self._to_half(self.constant(points)))
            value = self.add("Multiply", value, self.constant(scale))
        if layout.stored[name].shape != layout.shapes[name]:
            shape = self.integers(*layout.shapes[name])
            value = self.add("Reshape", value, shape, special_zero=False)
        wide = self.add("Convert", value, dtype="f32", destination_type="f32")
        self.mark_decompression(wide)
        return wide

    def parameter(self, name: str, dtype: str, shape: str) -> Value:
        """An input; `shape` has ? for what is not known."""
        value = self.add("Parameter", dtype=dtype, name=name, shape=shape, element_type=dtype)
        self.label(value, name)
        return value

    def give(self, value: Value, name: str) -> None:
        """Make a value an output of that name."""
        self.label(value, name)
        self.add_many("Result", value, outputs=0, name=name)

    def _to_half(self, value: Value) -> Value:
        return self.add("Convert", value, dtype="f16", destination_type="f16")

    def integers(self, *values: int) -> Value:
        """An int64 vector."""
        return self._small("i64", (len(values),), values)

    def integer(self, value: int, dtype: str = "i64") -> Value:
        """An integer scalar."""
        return self._small(dtype, (), (value,))

    def number(self, value: float) -> Value:
        """A float32 scalar."""
        return self._small("f32", (), (value,))

    def floats(self, values: tuple[float, ...], shape: tuple[int, ...]) -> Value:
        """A float32 array."""
        return self._small("f32", shape, values)

    def write(self, path: Path) -> None:
        """Write the XML."""
        net = Element("net", name=self.name, version=str(IR_VERSION))
        net.extend([self._layers, self._edges])
        options = SubElement(SubElement(net, "rt_info"), "runtime_options")
        for key, value in self._options.items():
            SubElement(options, key, value=value)
        indent(net)
        ElementTree(net).write(path, encoding="utf-8", xml_declaration=True)

    def _small(self, dtype: str, shape: tuple[int, ...], values: tuple[float, ...]) -> Value:
        name = f"{dtype}{list(shape)} {list(values)}"
        if name not in self.layout.stored:
            self.layout.add_values(name, dtype, shape, values)
        return self.constant(name)

    def _connect(self, layer: Element, number: int, inputs: tuple[Value, ...]) -> None:
        if not inputs:
            return
        ports = SubElement(layer, "input")
        for port, value in enumerate(inputs):
            SubElement(ports, "port", id=str(port), precision=PRECISIONS[value.dtype])
            SubElement(
                self._edges, "edge",
                {"from-layer": str(value.layer), "from-port": str(value.port),
                 "to-layer": str(number), "to-port": str(port)},
            )  # fmt: skip


def _spell(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
