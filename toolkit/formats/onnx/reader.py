"""Read an artifact back with onnx's own reader and dequantize it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.decoder import Decoder, Parts, Rows
from toolkit.errors import require
from toolkit.formats.onnx import apart

Tensors = Iterator[tuple[str, NDArray[np.float32]]]
# The two codes of a byte as float32, the low half first, in one number to look up.
PAIRS = np.array([(byte & 15, byte >> 4) for byte in range(256)], np.float32).view(np.float64)[:, 0]
GRAPHS = ("model.onnx", "embedding.onnx")  # the second where a model sees


def dequantize(
    folder: Path, decoder: Decoder, rename: Callable[[str], str] = str
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield (checkpoint name, float32 weights) for every tensor of the text decoder.

    `rename` turns another converter's names of nodes and initializers into this project's.
    """
    weights, names = _Weights(folder, rename), decoder.names
    yield names.embedding, weights.embedding()
    for layer in range(decoder.layers):
        prefix = f"model.layers.{layer}"
        out = Rows(names.attention_out.format(layer), 0, decoder.hidden)
        norm = f"{prefix}.input_layernorm"
        yield from weights.norm(norm, names.attention_norm.format(layer), decoder)
        qkv = [(f"{prefix}.attn.qkv_proj", decoder.qkv(layer))]
        yield from weights.linears(qkv, decoder)
        yield from weights.linears([(f"{prefix}.attn.o_proj", (out,))], decoder)
        norm = f"{prefix}.post_attention_layernorm"
        yield from weights.norm(norm, names.mlp_norm.format(layer), decoder)
        if decoder.experts:
            router = weights.plain(f"{prefix}.moe.router.weight")
            yield names.router.format(layer), np.ascontiguousarray(router.T)
            yield from weights.experts(f"{prefix}.moe", decoder, layer)
        else:
            gate_up = [
                (f"{prefix}.mlp.gate_proj", decoder.gate(layer)),
                (f"{prefix}.mlp.up_proj", decoder.up(layer)),
            ]
            yield from weights.linears(gate_up, decoder)
            down = Rows(decoder.down(layer), 0, decoder.hidden)
            yield from weights.linears([(f"{prefix}.mlp.down_proj", (down,))], decoder)
    yield from weights.norm("model.norm", names.final_norm, decoder)
    head = Rows(decoder.head_name, 0, decoder.vocab)
    yield from weights.linears([("lm_head", (head,))], decoder)


class _Weights:
    """Initializers by name, read one at a time; nodes say how each is coded."""

    def __init__(self, folder: Path, rename: Callable[[str], str]) -> None:
        self._onnx = require("onnx")
        self._folder = folder
        self._adapter = apart.read(folder)
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
        return self._blocks(node, *node.input[1:4])

    def norm(self, name: str, source: str, decoder: Decoder) -> Tensors:
        """A norm's weight and, if any, bias; the last one's without the logits' scale."""
        is_last = source == decoder.names.final_norm
        factor = np.float32(decoder.logit_scale if is_last else 1.0)
        yield source, self.plain(f"{name}.weight") / factor
        if bias := decoder.bias_of(source):
            yield bias, self.plain(f"{name}.bias") / factor

    def linears(self, nodes: Sequence[tuple[str, Parts]], decoder: Decoder) -> Tensors:
        """The checkpoint's matrices, and their biases, that these nodes have rows of.

        With what an adapter apart adds to them.
        """
        parts = [part for _, some in nodes for part in some]
        rows = [self.linear(name) for name, _ in nodes]
        whole = np.concatenate(rows) if len(rows) > 1 else rows[0]
        for name, weights in _take_apart(parts, whole):
            update = apart.multiply(self._adapter, name)
            yield name, weights if update is None else weights + update
        if decoder.bias_of(parts[0].tensor):
            bias = np.concatenate([self.plain(f"{name}.bias") for name, _ in nodes])
            for name, values in _take_apart(parts, bias):
                yield decoder.bias_of(name), values

    def experts(self, prefix: str, decoder: Decoder, layer: int) -> Tensors:
        """Every expert's matrices; one expert's are in memory at a time."""
        node = self._nodes[f"/{prefix.replace('.', '/')}/experts"]
        bits = next(a.i for a in node.attribute if a.name == "expert_weight_bits")
        fc1, fc2 = ([self._map(node.input[i]) for i in pair] for pair in ((2, 3), (5, 6)))
        for expert in range(len(fc1[0])):
            woven = _scale(fc1[0][expert], fc1[1][expert], bits)
            (gate,), (up,) = decoder.gate(layer, expert), decoder.up(layer, expert)
            yield gate.tensor, np.ascontiguousarray(woven[0::2])
            yield up.tensor, np.ascontiguousarray(woven[1::2])
            yield decoder.down(layer, expert), _scale(fc2[0][expert], fc2[1][expert], bits)

    def _map(self, name: str) -> NDArray[Any]:
        """A tensor of the data file, not read before it is used."""
        tensor = self._tensors[name]
        places = {entry.key: entry.value for entry in tensor.external_data}
        dtype = self._onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.memmap(
            self._folder / places["location"], dtype, "r", int(places["offset"]), tuple(tensor.dims)
        )

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
        values -= points
        values *= wide_scales
        return values.reshape(rows, -1)

    def _array(self, name: str) -> NDArray[Any]:
        array: NDArray[Any] = self._onnx.numpy_helper.to_array(
            self._tensors[name], base_dir=str(self._folder)
        )
        return array


def _take_apart(parts: Sequence[Rows], rows: NDArray[np.float32]) -> Tensors:
    """Put rows back into the tensors that they are parts of."""
    if len(parts) == 1:
        yield parts[0].tensor, rows
        return
    counts: dict[str, int] = {}
    for part in parts:
        counts[part.tensor] = counts.get(part.tensor, 0) + part.count
    found = {name: np.empty((n, *rows.shape[1:]), np.float32) for name, n in counts.items()}
    start = 0
    for part in parts:
        found[part.tensor][part.span] = rows[start : start + part.count]
        start += part.count
    yield from found.items()


def _scale(codes: NDArray[np.uint8], scales: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """[rows, columns] of symmetric blocks."""
    rows, blocks = scales.shape
    values = _unpack(codes.reshape(rows, blocks, -1), bits)
    values -= np.float32(1 << (bits - 1))
    values *= scales[:, :, None].astype(np.float32)
    return values.reshape(rows, -1)


def _unpack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    """Codes as float32, the low half of a byte first; the last axis grows for 4 bits."""
    if bits == 8:
        return codes.astype(np.float32)
    pairs: NDArray[np.float32] = PAIRS[np.ascontiguousarray(codes)].view(np.float32)
    return pairs
