"""ONNX for onnxruntime-genai: int4 (MatMulNBits), fp16, fp32; for CPU, CUDA and phones."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from toolkit import __version__
from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.merged import find_adapter
from toolkit.decoder import BlockSparse, Decoder, Special
from toolkit.errors import PlanError
from toolkit.formats import RuntimeNeeds
from toolkit.formats.onnx import (
    apart,
    genai,
    graph,
    layout,
    reader,
    schemes,
    sparse,
    tower,
    vision,
)  # fmt: skip
from toolkit.formats.onnx.recipe import OnnxRecipe
from toolkit.formats.onnx.session import OnnxSession, OnnxTokenizer
from toolkit.recipe import Recipe
from toolkit.stream import DataFile

RECIPE = OnnxRecipe
GRAPH_BYTES = 450_000  # of 40 layers and a tower of 24, or 32 with experts, rounded up
HOLDS: frozenset[Special] = frozenset(
    ("layer norms", "biases", "split projections", "experts", "block-sparse attention", "gegelu",
     "multipliers", "masked tokens", "pictures")
)  # fmt: skip
REASONS: Mapping[Special, str] = {}
PACKAGES = ("onnx", "onnxruntime", "onnxruntime-genai")
ROTARY_MULTIPLE = 16  # GroupQueryAttention takes cos tables whose width is a multiple of 8
OVERHEAD_BYTES = {"cpu": 250_000_000, "cuda": 900_000_000}


def check_shape(recipe: Recipe, decoder: Decoder) -> None:
    """PlanError when a row is no multiple of the block, or the rotary width does not suit."""
    recipe = cast(OnnxRecipe, recipe)
    _check_blocks(recipe, decoder)
    vision.check_vision(recipe, decoder)
    schemes.check_schemes(recipe, decoder)
    if decoder.experts:
        _check_experts(recipe)
    if decoder.sparse:
        _check_sparse(recipe, decoder.sparse)
    head, io_dtype = recipe.quantization.head, recipe.io_dtype
    if recipe.linear_bits and head in layout.FLOATS and layout.FLOATS[head] != io_dtype:
        raise PlanError(
            f"{recipe.name}: quantization.head: got {head}; activations are {io_dtype} here; "
            f"allowed int4, int8, {'fp16' if io_dtype == 'float16' else 'fp32'}"
        )
    if decoder.rope.rotary_dim % ROTARY_MULTIPLE:
        raise PlanError(
            f"{recipe.name}: onnxruntime takes rotary widths that are multiples of "
            f"{ROTARY_MULTIPLE}; this model has {decoder.rope.rotary_dim}"
        )


def _check_sparse(recipe: OnnxRecipe, pattern: BlockSparse) -> None:
    """PlanError for what SparseAttention does not compute."""
    if recipe.provider != "cpu" or recipe.io_dtype != "float32":
        raise PlanError(
            f"{recipe.name}: provider {recipe.provider}, {recipe.io_dtype}: this model's "
            "block-sparse attention is proven on CPUs in float32 only; allowed provider cpu with "
            "int4 or fp32"
        )
    if pattern.block % sparse.BLOCK_MULTIPLE:
        raise PlanError(
            f"{recipe.name}: onnxruntime takes blocks of attention that are multiples of "
            f"{sparse.BLOCK_MULTIPLE} tokens; this model has {pattern.block}"
        )


def _check_blocks(recipe: OnnxRecipe, decoder: Decoder) -> None:
    size = recipe.quantization.block_size
    for name, columns, bits in (
        ("hidden_size", decoder.hidden, recipe.linear_bits or recipe.embedding_bits),
        ("intermediate_size", decoder.intermediate, recipe.linear_bits),
        ("heads x head_dim", decoder.heads * decoder.head_dim, recipe.linear_bits),
    ):
        if bits and columns % size:
            fits = [str(n) for n in (16, 32, 64, 128, 256) if columns % n == 0]
            raise PlanError(
                f"{recipe.name}: quantization.block_size: {size} does not divide {name} {columns}; "
                f"allowed {', '.join(fits) or 'none (use fp16 or fp32)'}"
            )


def _check_experts(recipe: OnnxRecipe) -> None:
    """PlanError for what QMoE does not hold."""
    quantization = recipe.quantization
    if quantization.precision != "int4":
        raise PlanError(
            f"{recipe.name}: quantization.precision: got {quantization.precision}; onnxruntime's "
            "operator for experts with weights of their own routing is the quantized one; "
            "allowed int4"
        )
    if not quantization.symmetric:
        raise PlanError(
            f"{recipe.name}: quantization.symmetric: got false; experts are stored without zero "
            "points; allowed true"
        )


def list_choices(recipe: Recipe, decoder: Decoder) -> dict[str, tuple[Any, ...]]:
    """What overrides can say of each matrix, smallest first."""
    return dict(schemes.list_choices(cast(OnnxRecipe, recipe), decoder))


def lay_out(recipe: Recipe, decoder: Decoder, context_length: int) -> DataFile:
    """Place every tensor in model.onnx.data."""
    return _lay_out(cast(OnnxRecipe, recipe), decoder, context_length).data_file()


def _lay_out(recipe: OnnxRecipe, decoder: Decoder, context_length: int) -> layout.Layout:
    vision.check_context(recipe, decoder, context_length)
    placed = layout.lay_out(recipe, decoder, context_length)
    if decoder.vision:
        tower.place_vision(placed, decoder.vision, recipe.quantization.vision or vision.DEFAULT)
    return placed


def needs(recipe: Recipe, decoder: Decoder, context_length: int) -> RuntimeNeeds:
    """What onnxruntime-genai takes to run it."""
    recipe = cast(OnnxRecipe, recipe)
    is_cuda = recipe.provider == "cuda"
    notes, properties = [], {}
    if recipe.adapter_apart:
        properties = {"adapter": apart.FILE}
        notes.append(
            f"it is its source with {apart.FILE} active, which the runner sees to; other programs "
            "have to load it (docs/lora.md), and have the checkpoint without the adapter otherwise"
        )
        notes += ["its adapter was never run on CUDA, only on CPUs"] if is_cuda else []
    if layout.rope_rows(decoder.rope, context_length)[1]:
        who = "the runner, not onnxruntime-genai," if decoder.vision else "onnxruntime-genai"
        notes.append(
            f"beyond {decoder.rope.original_context} tokens the long rotary factors hold: "
            f"{who} computes the whole sequence anew there, once"
        )
    if decoder.experts:
        notes.append(
            "experts need onnxruntime 1.31 or newer; with 1.30 a layer takes 4 times its size in "
            "memory and half a minute to load"
        )
        notes += ["its experts were never run on CUDA, only on CPUs"] if is_cuda else []
    return RuntimeNeeds(
        engine="onnxruntime_genai",
        provider=recipe.provider,
        package="onnxruntime-genai-cuda" if is_cuda else "onnxruntime-genai",
        main_file="model.onnx",
        kv_bytes_per_token=decoder.kv_bytes_per_token(2 if recipe.io_dtype == "float16" else 4),
        overhead_bytes=OVERHEAD_BYTES[recipe.provider]
        + vision.count_memory(recipe, decoder, context_length),
        valid_context=(1, context_length),
        notes=tuple(notes),
        properties=properties,
        companions=("pillow",) if decoder.vision else (),
    )


def rest_bytes(tokenizer_bytes: int) -> int:
    """The graph, the configuration, the tokenizer's files."""
    return GRAPH_BYTES + tokenizer_bytes


def header_bytes(recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint) -> bytes:
    """Nothing stands before the data."""
    del recipe, decoder, checkpoint
    return b""


def write_rest(
    folder: Path, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, context_length: int
) -> None:
    """Write model.onnx, genai_config.json and the tokenizer's files, verbatim."""
    recipe = cast(OnnxRecipe, recipe)
    placed, producer = _lay_out(recipe, decoder, context_length), f"phiship {__version__}"
    adapter = find_adapter(checkpoint) if recipe.adapter_apart else None
    if adapter:
        apart.write(folder / apart.FILE, recipe, adapter)
    adapted = adapter.changes if adapter else ()
    _write_model(folder / "model.onnx", graph.make_model(placed, producer, adapted))
    config = genai.make_config(recipe, decoder, checkpoint, context_length)
    if decoder.vision:
        eyes = decoder.vision
        _write_model(folder / vision.VISION_FILE, vision.make_vision(placed, eyes, producer))
        _write_model(folder / vision.EMBEDDING_FILE, vision.make_embedding(placed, eyes, producer))
        vision.extend_config(config)
        processor = vision.make_processor(eyes, checkpoint.preprocessing)
        _write_json(folder / "processor_config.json", processor)
    _write_json(folder / "genai_config.json", config)
    checkpoint.write_tokenizer(folder)


def write_tokenizer(folder: Path, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint) -> None:
    """Write the tokenizer's files and genai_config.json, which says the kind of model."""
    config = genai.make_config(cast(OnnxRecipe, recipe), decoder, checkpoint, decoder.context)
    _write_json(folder / "genai_config.json", config)
    checkpoint.write_tokenizer(folder)


def open_tokenizer(folder: Path) -> OnnxTokenizer:
    """Open onnxruntime-genai's tokenizer of a folder."""
    return OnnxTokenizer(folder)


def _write_model(path: Path, model: Any) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_chat(folder: Path, name: str, chat: Chat, context_length: int) -> tuple[str, ...]:
    """Nothing: no other program is told of the chat."""
    del folder, name, chat, context_length
    return ()


def dequantize(folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Read the artifact back: (checkpoint name, float32)."""
    return reader.dequantize(folder, decoder)


def open_session(folder: Path, adapter: str = "") -> OnnxSession:
    """Open the artifact in onnxruntime-genai, on the CPU provider, with its adapter active."""
    return OnnxSession(folder, adapter)
