"""Arithmetic on a graph's tensors, written as arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.formats.onnx.nodes import MICROSOFT, Graph


@dataclass(frozen=True)
class Value:
    """A tensor of a graph. Operators and methods add nodes to it; a number is int64."""

    graph: Graph
    name: str

    def apply(self, op: str, *inputs: Value | str | int, **attributes: Any) -> Value:
        """A node of ONNX's own, with this tensor in front."""
        return self._add(op, "", inputs, attributes)

    def apply_microsoft(self, op: str, *inputs: Value | str | int, **attributes: Any) -> Value:
        """A node of com.microsoft, with this tensor in front."""
        return self._add(op, MICROSOFT, inputs, attributes)

    def make(self, output: str, op: str, *inputs: Value | str, **attributes: Any) -> None:
        """A node of ONNX's own that makes an output of the graph."""
        names = [self.name, *map(self._name, inputs)]
        self.graph.add_many(op, names, f"/{output}", [output], **attributes)

    def _add(
        self, op: str, domain: str, inputs: tuple[Value | str | int, ...], attributes: Any
    ) -> Value:
        names = [self.name, *map(self._name, inputs)]
        node = f"/{op}_{len(self.graph.nodes)}"
        return Value(self.graph, self.graph.add(op, names, node, domain, **attributes))

    def _name(self, value: Value | str | int) -> str:
        if isinstance(value, int):
            return self.graph.integers(value, scalar=True)
        return value if isinstance(value, str) else value.name

    def __add__(self, other: Value | int) -> Value:
        """Sum."""
        return self.apply("Add", other)

    def __sub__(self, other: Value | int) -> Value:
        """Difference."""
        return self.apply("Sub", other)

    def __mul__(self, other: Value | int) -> Value:
        """Product."""
        return self.apply("Mul", other)

    def __floordiv__(self, other: Value | int) -> Value:
        """Of numbers from 0 only: ONNX rounds towards 0."""
        return self.apply("Div", other)

    def __mod__(self, other: Value | int) -> Value:
        """Remainder, of numbers from 0."""
        return self.apply("Mod", other)

    def __lt__(self, other: Value | int) -> Value:
        """Where it is less."""
        return self.apply("Less", other)

    def equals(self, other: Value | int) -> Value:
        """Where both are the same."""
        return self.apply("Equal", other)

    def choose(self, yes: Value, no: Value | str) -> Value:
        """Of two tensors, by this one's truth."""
        return self.apply("Where", yes, no)

    def expand(self, *axes: int) -> Value:
        """With axes of one inserted."""
        return self.apply("Unsqueeze", self.graph.integers(*axes))

    def pick(self, places: Value | int, axis: int = 0) -> Value:
        """Parts by place along an axis."""
        return self.apply("Gather", places, axis=axis)

    def cut(self, start: int, stop: int, axis: int) -> Value:
        """A range along an axis."""
        limits = (self.graph.integers(number) for number in (start, stop, axis))
        return self.apply("Slice", *limits)

    def shape(self, *dims: int) -> Value:
        """In another shape: -1 is what remains, 0 what was there."""
        return self.apply("Reshape", self.graph.integers(*dims))

    def transpose(self, *order: int) -> Value:
        """With axes in another order."""
        return self.apply("Transpose", perm=list(order))

    def size(self, axis: int) -> Value:
        """A dimension, as a number."""
        return self.apply("Shape").pick(axis)


def count_to(end: Value) -> Value:
    """0, 1, ... up to a number that a tensor says."""
    zero, one = (end.graph.integers(number, scalar=True) for number in (0, 1))
    return Value(end.graph, zero).apply("Range", end, one)


def constant(graph: Graph, name: str, array: NDArray[Any]) -> Value:
    """A small array inside the graph."""
    tensor = graph.onnx.numpy_helper.from_array(np.ascontiguousarray(array))
    graph.add("Constant", [], f"/constants/{name}", value=tensor)
    return Value(graph, f"/constants/{name}/output")
