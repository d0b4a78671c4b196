"""Where every tensor lies in model.safetensors; computed from shapes alone."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from toolkit.decoder import Decoder
from toolkit.formats.mlx.encoders import STORED, Groups, Kernels, Plain
from toolkit.formats.mlx.modules import is_kernel, list_shapes, list_tensors
from toolkit.formats.mlx.recipe import MlxRecipe
from toolkit.formats.mlx.schemes import Scheme, choose_schemes
from toolkit.overrides import path_of
from toolkit.stream import DataFile, Encoder, Piece

DATA_FILE = "model.safetensors"
HEADER_MULTIPLE = 8  # safetensors: the data starts at a multiple of it
WORD_BITS = 32  # codes are stored as uint32
# A recipe's dtype as safetensors names it
FLOATS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its name, safetensors dtype, shape, and place in the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def place(recipe: MlxRecipe, decoder: Decoder) -> dict[str, list[Stored]]:
    """What is stored for every tensor of modules.py, in order of use and without gaps."""
    schemes, shapes = choose_schemes(recipe, decoder), list_shapes(decoder)
    placed: dict[str, list[Stored]] = {}
    end = 0
    for name, sources in list_tensors(decoder).items():
        scheme, dtype = schemes.get(path_of(sources[0])), _float_type(recipe, decoder, name)
        placed[name] = []
        for part, kind, stored_shape in _split(name, shapes[name], scheme, dtype):
            item_bytes = 4 if kind == "U32" else STORED[dtype].itemsize
            stored = Stored(part, kind, stored_shape, end, prod(stored_shape) * item_bytes)
            placed[name].append(stored)
            end += stored.nbytes
    return placed


def _float_type(recipe: MlxRecipe, decoder: Decoder, name: str) -> str:
    """The recipe's; a router is float32, and with it the logits that mlx-lm compares."""
    return "fp32" if decoder.kind_of(name) == "router" else recipe.quantization.dtype


def _split(
    name: str, shape: tuple[int, ...], scheme: Scheme | None, dtype: str
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of what is stored for one tensor."""
    if scheme is None or not scheme.is_quantized:
        yield name, FLOATS[dtype], shape
        return
    path, (*rows, columns) = path_of(name), shape
    yield f"{path}.weight", "U32", (*rows, columns * scheme.bits // WORD_BITS)
    for part in ("scales", "biases"):
        yield f"{path}.{part}", FLOATS[dtype], (*rows, columns // scheme.group_size)


def lay_out(recipe: MlxRecipe, decoder: Decoder) -> DataFile:
    """The data file: each tensor's rows go through the encoder of its scheme."""
    schemes, shapes = choose_schemes(recipe, decoder), decoder.all_shapes()
    pieces, tensors = [], list_tensors(decoder)
    end = 0
    for name, stored in place(recipe, decoder).items():
        sources = tensors[name]
        scheme, dtype = schemes.get(path_of(sources[0])), _float_type(recipe, decoder, name)
        encoder: Encoder = Plain(dtype)
        if scheme is not None and scheme.is_quantized:
            encoder = Groups(scheme.bits, scheme.group_size, dtype)
        elif is_kernel(decoder, name):
            encoder = Kernels(dtype, *shapes[name][1:])
        rows, columns = prod(shapes[sources[0]][:-1]), shapes[sources[0]][-1]
        offsets = tuple(tensor.offset for tensor in stored)
        for number, source in enumerate(sources):
            pieces.append(Piece(source, 0, rows, columns, encoder, offsets, number * rows))
        end = stored[-1].offset + stored[-1].nbytes
    return DataFile(DATA_FILE, end, tuple(pieces))


def header_bytes(recipe: MlxRecipe, decoder: Decoder) -> bytes:
    """The head of model.safetensors: its length, then JSON, filled up with spaces."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    for stored in place(recipe, decoder).values():
        for tensor in stored:
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": tensor.shape,
                "data_offsets": (tensor.offset, tensor.offset + tensor.nbytes),
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_MULTIPLE)
    return len(text).to_bytes(8, "little") + text


def make_index(recipe: MlxRecipe, decoder: Decoder) -> dict[str, object]:
    """model.safetensors.index.json, as mlx-lm writes it; parameters are those of the model."""
    stored = [tensor for parts in place(recipe, decoder).values() for tensor in parts]
    return {
        "metadata": {
            "total_size": sum(tensor.nbytes for tensor in stored),
            "total_parameters": sum(prod(shape) for shape in decoder.all_shapes().values()),
        },
        "weight_map": {tensor.name: DATA_FILE for tensor in sorted(stored, key=lambda t: t.name)},
    }
