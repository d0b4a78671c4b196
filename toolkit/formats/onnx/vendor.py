"""The vendor's way: onnxruntime-genai's model builder."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.errors import PlanError
from toolkit.formats.onnx import reader
from toolkit.formats.onnx.recipe import OnnxRecipe
from toolkit.recipe import Recipe
from toolkit.vendor import Command, Export, Places, Vendor, measure_bf16

VENDOR = Vendor(
    name="onnx",
    title="onnxruntime-genai's model builder",
    packages=("onnxruntime-genai", "onnxruntime", "onnx-ir", "torch", "transformers"),
    uses_torch=True,
    modules=("torch", "transformers", "onnx_ir", "onnxruntime_genai.models.builder"),
)
# 21.7 to 23.7 GB for 7.64 GB of bf16 weights: it holds the model and two copies on their way out.
MEMORY_FACTOR = 3.0
FINAL_NORM = re.compile(r"model\.layers\.\d+\.final_norm_layernorm\.weight")
LINEAR = re.compile(r"/(.+)/MatMul(_Q[48])?")
SHARED = "/model/embed_tokens/Reshape/output_0"  # a tied head's codes, as the embedding takes them
WINDOW_NOTE = (
    "the builder leaves the sliding window out of the graph: beyond {} tokens its runtime refuses"
    " a text, or the model attends to more than its source does"
)
BASE_BYTES = 800_000_000  # Python with torch and transformers imported


def plan_export(recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, places: Places) -> Export:
    """The builder's command; PlanError when it has no option for what the recipe asks."""
    recipe = cast(OnnxRecipe, recipe)
    options = [*_quantization_options(recipe, decoder), "hf_token=false", "hf_remote=false"]
    argv = (
        places.python, "-m", "onnxruntime_genai.models.builder",
        "-i", str(checkpoint.folder), "-o", str(places.out), "-c", str(places.scratch / "cache"),
        "-p", recipe.quantization.precision, "-e", recipe.provider, "--extra_options", *options,
    )  # fmt: skip
    window, notes = decoder.window, list(_embedding_notes(recipe))
    if window is not None:
        notes.append(WINDOW_NOTE.format(window))
    return Export(
        commands=(Command("onnxruntime-genai's builder", argv),),
        memory_bytes=BASE_BYTES + round(MEMORY_FACTOR * measure_bf16(checkpoint)),
        last_context=window,
        notes=tuple(notes),
    )


def dequantize(folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Read the builder's artifact back: (checkpoint name, float32)."""
    return reader.dequantize(folder, decoder, rename)


def rename(name: str) -> str:
    """The builder's name of a node or an initializer, as this project writes it."""
    if name in ("/model/embed_tokens/Gather", "/model/embed_tokens/GatherBlockQuantized"):
        return "/embed/gather"
    if name == "lm_head.MatMul.weight_Q4":
        return SHARED
    if FINAL_NORM.fullmatch(name):
        return "model.norm.weight"
    if node := LINEAR.fullmatch(name):
        return f"/{node[1].replace('.', '/')}"
    return name.replace(".MatMul.weight", ".weight")


def _quantization_options(recipe: OnnxRecipe, decoder: Decoder) -> list[str]:
    wanted = recipe.quantization
    if wanted.overrides:
        raise _beyond(recipe, "quantization.overrides")
    if wanted.precision == "fp16" and recipe.provider == "cpu":
        raise _beyond(recipe, "quantization.precision: fp16 is written for cuda only, not for cpu")
    is_shared = decoder.is_tied and recipe.embedding_bits == recipe.head_bits == 4
    is_near = recipe.embedding_bits == 8 and not decoder.is_tied  # what it costs is not measurable
    if recipe.embedding_bits and not (is_shared or is_near):
        raise _beyond(
            recipe,
            f"quantization.embedding: {wanted.embedding}; an embedding that is also the head can "
            "be int4 with it, others are float",
        )
    # Said whenever it matters: left out, the builder shares, and quantizes the embedding too.
    shared = [f"shared_embeddings={str(is_shared).lower()}"] if decoder.is_tied else []
    if not recipe.linear_bits:
        return shared
    options = [f"block_size={wanted.block_size}", f"accuracy_level={wanted.accuracy_level}"]
    if not wanted.symmetric:
        options.append("is_symmetric=false")
    if wanted.head == "int8":
        options.append("matmul_mixed_precision=last_matmul:int8")
    elif not recipe.head_bits:
        options.append("nodes_to_exclude=/lm_head/MatMul")
    return options + shared


def _beyond(recipe: OnnxRecipe, what: str) -> PlanError:
    return PlanError(
        f"{recipe.name}: onnxruntime-genai's builder cannot do this: {what}",
        advice="use `engine: native`",
    )


def _embedding_notes(recipe: OnnxRecipe) -> list[str]:
    written = {"float16": "fp16", "float32": "fp32"}[recipe.io_dtype]
    wanted = recipe.quantization.embedding
    if wanted in (written, "int4"):
        return []
    if wanted == "int8":
        return [f"the builder stores the embedding as {written}, not int8, in more bytes"]
    return [f"the builder stores the embedding as {written}, the same values in more bytes"]
