"""Read an artifact back with onnx's own reader and dequantize it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import Decoder
from toolkit.errors import require

GRAPHS = ("model.onnx", "embedding.onnx")  # the second where a model sees


def dequantize(
    folder: Path, decoder: Decoder, rename: Callable[[str], str] = str
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (checkpoint name, float32 weights) for every tensor of the text decoder.

    `rename` turns another converter's names of nodes and initializers into this project's.
    """
    weights = _Weights(folder, rename)
    names = decoder.names
    yield names.embedding, weights.embedding()
    for layer in range(decoder.layers):
        prefix = f"model.layers.{layer}"
        yield names.attention_norm.format(layer), weights.plain(f"{prefix}.input_layernorm.weight")
        yield names.qkv.format(layer), weights.linear(f"{prefix}.attn.qkv_proj")
        yield names.attention_out.format(layer), weights.linear(f"{prefix}.attn.o_proj")
        yield (
            names.mlp_norm.format(layer),
            weights.plain(f"{prefix}.post_attention_layernorm.weight"),
        )
        gate, up = (
            weights.linear(f"{prefix}.mlp.gate_proj"),
            weights.linear(f"{prefix}.mlp.up_proj"),
        )
        yield names.gate_up.format(layer), np.concatenate([gate, up])
        yield names.down.format(layer), weights.linear(f"{prefix}.mlp.down_proj")
    yield names.final_norm, weights.plain("model.norm.weight")
    yield decoder.head_name, weights.linear("lm_head")


class _Weights:
    """Initializers by name, read one at a time; nodes say how each is coded."""

    def __init__(self, folder: Path, rename: Callable[[str], str]) -> None:
        self._onnx = require("onnx")
        self._folder = folder
        graphs = [self._load(name) for name in GRAPHS if (folder / name).is_file()]
        self._tensors = {one.name: one for graph in graphs for one in graph.initializer}
        self._tensors |= {rename(name): tensor for name, tensor in self._tensors.items()}
        self._nodes = {rename(node.name): node for graph in graphs for node in graph.node}

    def _load(self, name: str) -> Any:
        return self._onnx.load(str(self._folder / name), load_external_data=False).graph

    def plain(self, name: str) -> NDArray[np.float32]:
        """A float tensor as float32."""
        return self._array(name).astype(np.float32)

    def embedding(self) -> NDArray[np.float32]:
        """The embedding, plain or in blocks."""
        node = self._nodes["/embed/gather"]
        if node.op_type == "Gather":
            return self.plain(node.input[0])
        return self._blocks(node, node.input[0], *node.input[2:])

    def linear(self, name: str) -> NDArray[np.float32]:
        """An [out, in] matrix."""
        node = self._nodes[f"/{name.replace('.', '/')}"]
        if node.op_type == "MatMul":
            return np.ascontiguousarray(self.plain(node.input[1]).T)
        return self._blocks(node, *node.input[1:])

    def _blocks(
        self, node: Any, codes: str, scales: str, zero_points: str = ""
    ) -> NDArray[np.float32]:
        """[rows, columns]: value = (code - zero point) * scale."""
        bits = next(a.i for a in node.attribute if a.name == "bits")
        wide_scales = self.plain(scales)[:, :, None]
        rows, blocks, _ = wide_scales.shape
        points: Any = np.float32(1 << (bits - 1))
        if zero_points:
            packed = self._array(zero_points).reshape(rows, -1)
            points = _unpack(packed, bits)[:, :blocks, None]
        values = _unpack(self._array(codes).reshape(rows, blocks, -1), bits)
        weights: NDArray[np.float32] = (values - points) * wide_scales
        return weights.reshape(rows, -1)

    def _array(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = self._onnx.numpy_helper.to_array(
            self._tensors[name], base_dir=str(self._folder)
        )
        return array


def _unpack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """Codes as float32, the low half of a byte first; the last axis grows for 4 bits."""
    if bits == 8:
        return codes.astype(np.float32)
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)
    return pairs.reshape(*codes.shape[:-1], -1).astype(np.float32)
