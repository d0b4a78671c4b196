"""OpenVINO IR for openvino-genai: int4, int8, f16; for Intel CPUs, GPUs and NPUs."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder, Special
from toolkit.errors import PlanError, UnsupportedError
from toolkit.formats import RuntimeNeeds
from toolkit.formats.openvino import graph, reader, sparse, tokenizer, vision
from toolkit.formats.openvino.layout import MAIN_FILE, list_stacks
from toolkit.formats.openvino.recipe import OpenvinoRecipe
from toolkit.formats.openvino.session import OpenvinoSession, OpenvinoTokenizer, SeeingSession
from toolkit.overrides import check_patterns, list_matrices, path_of, resolve
from toolkit.recipe import Recipe
from toolkit.runner.sight import LANGUAGE
from toolkit.stream import DataFile

RECIPE = OpenvinoRecipe
NETWORK_BYTES = 2_100_000  # of 40 layers, or Phi-3-small's 32, rounded up
HOLDS: frozenset[Special] = frozenset(
    ("layer norms", "biases", "split projections", "experts", "block-sparse attention", "gegelu",
     "multipliers", "masked tokens", "pictures")
)  # fmt: skip
REASONS: Mapping[Special, str] = {}
PACKAGES = ("openvino", "openvino-genai", "openvino-tokenizers", "transformers")
GROUP_SIZES = (32, 64, 128)
NPU_GROUP_SIZES = (-1, 128)
CACHE_BYTES = 2  # float16; the CPU's default for quantized artifacts is 8 bits, half of it
# Resident beside weights and cache, generating: 145 MB with the example, 350 MB with the shape of
# Phi-3-mini. Pages of the mapped data file come on top and can go at any time.
OVERHEAD_BYTES = 400_000_000


def check_shape(recipe: Recipe, decoder: Decoder) -> None:
    """PlanError when groups do not fill rows, or a tied head or an NPU rules the choice out."""
    recipe = cast(OpenvinoRecipe, recipe)
    where = f"{recipe.name}: quantization.overrides"
    check_patterns(where, recipe.quantization.overrides, decoder)
    vision.check_vision(recipe, decoder)
    _check_groups(recipe, decoder)
    _check_stacks(recipe, decoder)
    _check_tied(recipe, decoder)
    if decoder.sparse and recipe.provider != "cpu":
        raise PlanError(
            f"{recipe.name}: provider: got {recipe.provider}; this model's block-sparse attention "
            "needs the attention of OpenVINO that takes masks, and was run on CPUs only; allowed "
            "cpu"
        )
    if recipe.provider == "npu":
        _check_npu(recipe)


def _check_groups(recipe: OpenvinoRecipe, decoder: Decoder) -> None:
    quantization = recipe.quantization
    size = quantization.group_size
    for name, columns in (
        ("hidden_size", decoder.hidden),
        ("intermediate_size", decoder.intermediate),
        ("heads x head_dim", decoder.heads * decoder.head_dim),
    ):
        if quantization.has_int4 and columns % (size if size > 0 else 2):
            fits = [str(n) for n in (-1, *GROUP_SIZES) if columns % (n if n > 0 else 2) == 0]
            raise PlanError(
                f"{recipe.name}: quantization.group_size: {size} does not divide {name} {columns}; "
                f"allowed {', '.join(fits) or 'none (use int8 or f16)'}"
            )


def _check_stacks(recipe: OpenvinoRecipe, decoder: Decoder) -> None:
    """PlanError when experts that are stored as one constant would get different types."""
    chosen = resolve(recipe.quantization.overrides, decoder)
    for names in list_stacks(decoder).values():
        if len({chosen.get(name) for name in names}) > 1:
            raise PlanError(
                f"{recipe.name}: quantization.overrides: {path_of(names[0])} to "
                f"{path_of(names[-1])} are one constant here; allowed the same type for all"
            )


def _check_tied(recipe: OpenvinoRecipe, decoder: Decoder) -> None:
    embedding, head = recipe.quantization.embedding, recipe.quantization.head
    if decoder.is_tied and embedding != head:
        raise PlanError(
            f"{recipe.name}: quantization.head: got {head} beside embedding {embedding}; this "
            f"model's head is its embedding, one tensor; allowed {embedding}"
        )


def _check_npu(recipe: OpenvinoRecipe) -> None:
    quantization = recipe.quantization
    for key, kinds in (
        ("precision", (quantization.precision,)),
        ("overrides", quantization.overrides.values()),
    ):
        if "int8" in kinds:
            raise PlanError(
                f"{recipe.name}: quantization.{key}: got int8, which has zero points; NPU drivers "
                "take symmetric layers only; allowed int4, f16"
            )
    if quantization.has_int4 and not quantization.symmetric:
        raise PlanError(
            f"{recipe.name}: quantization.symmetric: got false; NPU drivers take symmetric int4 "
            "only; allowed true"
        )
    if quantization.has_int4 and quantization.group_size not in NPU_GROUP_SIZES:
        raise PlanError(
            f"{recipe.name}: quantization.group_size: got {quantization.group_size}; NPU drivers "
            "take whole rows or groups of 128; allowed -1, 128"
        )


def list_choices(recipe: Recipe, decoder: Decoder) -> dict[str, tuple[Any, ...]]:
    """What overrides can say of each matrix, smallest first; an NPU takes no int8 layers."""
    recipe = cast(OpenvinoRecipe, recipe)
    if recipe.quantization.precision != "int4":
        return {}
    is_npu = recipe.provider == "npu"
    found = dict.fromkeys(list_matrices(decoder), ("int4", "f16" if is_npu else "int8"))
    outer = dict.fromkeys((decoder.names.embedding, decoder.head_name), ("int4", "int8"))
    return {**found, **outer}


def lay_out(recipe: Recipe, decoder: Decoder, context_length: int) -> DataFile:
    """Place every tensor in openvino_model.bin; the context does not matter to it."""
    del context_length
    recipe = cast(OpenvinoRecipe, recipe)
    if decoder.vision:
        return vision.lay_out(recipe, decoder)
    return graph.lay_out(recipe, decoder).data_file()


def needs(recipe: Recipe, decoder: Decoder, context_length: int) -> RuntimeNeeds:
    """What openvino-genai takes to run it."""
    recipe = cast(OpenvinoRecipe, recipe)
    notes = []
    if decoder.rope.is_long and context_length > decoder.rope.original_context:
        notes.append(
            f"beyond {decoder.rope.original_context} tokens the long rotary factors hold: the "
            "runner computes the whole sequence anew there, once; a program that shares cached "
            "keys among prompts (openvino-genai's prefix caching, its default) leaves the source"
        )
    properties, more_bytes = {}, 0
    if decoder.vision:
        more_bytes = vision.count_memory(recipe, decoder, context_length)
        notes.append(vision.NOTE)
    if decoder.sparse:
        properties, more_bytes = sparse.PROPERTIES, sparse.count_mask_bytes(decoder, context_length)
        notes.append(
            "block-sparse attention: the runner pins ATTENTION_BACKEND=SDPA; another program has "
            "to do the same, for openvino-genai's default drops the pattern silently"
        )
    return RuntimeNeeds(
        engine="openvino_genai",
        provider=recipe.provider,
        package="openvino-genai",
        main_file=f"{LANGUAGE}.xml" if decoder.vision else MAIN_FILE,
        kv_bytes_per_token=decoder.kv_bytes_per_token(CACHE_BYTES),
        overhead_bytes=OVERHEAD_BYTES + more_bytes,
        valid_context=(1, context_length),
        notes=tuple(notes),
        properties=properties,
        companions=("pillow",) if decoder.vision else (),
    )


def rest_bytes(tokenizer_bytes: int) -> int:
    """The network, the tokenizer's files, and networks as large as they."""
    return NETWORK_BYTES + 2 * tokenizer_bytes


def header_bytes(recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint) -> bytes:
    """Nothing stands before the data."""
    del recipe, decoder, checkpoint
    return b""


def write_rest(
    folder: Path, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, context_length: int
) -> None:
    """Write the network, tokenizer and detokenizer, configurations, the tokenizer's own files."""
    del context_length
    recipe = cast(OpenvinoRecipe, recipe)
    if decoder.vision:
        vision.write_networks(folder, recipe, decoder, checkpoint)
    else:
        graph.make_network(recipe, decoder).write(folder / MAIN_FILE)
        (folder / "config.json").write_bytes(checkpoint.config_bytes())
    checkpoint.write_tokenizer(folder)
    with suppress(UnsupportedError):  # which the build has said: the source's own answers then
        tokenizer.write_tokenizer(checkpoint, folder)
    generation = {**checkpoint.generation, "eos_token_id": list(checkpoint.stop_ids)}
    text = json.dumps(generation, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def write_tokenizer(folder: Path, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint) -> None:
    """Write the tokenizer as networks, which is all that openvino-genai reads of it."""
    del recipe, decoder
    tokenizer.write_tokenizer(checkpoint, folder)


def open_tokenizer(folder: Path) -> OpenvinoTokenizer:
    """Open openvino-genai's tokenizer of a folder."""
    return OpenvinoTokenizer(folder)


def write_chat(folder: Path, name: str, chat: Chat, context_length: int) -> tuple[str, ...]:
    """Nothing: no other program is told of the chat."""
    del folder, name, chat, context_length
    return ()


def dequantize(folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Read the artifact back: (checkpoint name, float32)."""
    return reader.dequantize(folder, decoder)


def open_session(folder: Path, **properties: str) -> OpenvinoSession:
    """Open the artifact in openvino-genai, on the CPU."""
    kind = SeeingSession if (folder / f"{LANGUAGE}.xml").exists() else OpenvinoSession
    return kind(folder, **properties)
