"""GGUF for llama.cpp: Q4_0, Q8_0, Q4_K_M, Q5_K_M, Q6_K, F16, BF16."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder, Special
from toolkit.errors import PlanError, UnsupportedError
from toolkit.formats import RuntimeNeeds
from toolkit.formats.gguf import header, layout, mix, reader
from toolkit.formats.gguf.encoding import GgufTokenizer
from toolkit.formats.gguf.llamaedge import SCRIPT, choose_template, write_script
from toolkit.formats.gguf.ollama import (
    MODELFILE,
    describe_chat,
    describe_model,
    has_phi3_turns,
    write_modelfile,
)
from toolkit.formats.gguf.proving import write_proven
from toolkit.formats.gguf.recipe import GgufRecipe
from toolkit.formats.gguf.session import GgufSession
from toolkit.formats.gguf.tokenizer import write_vocabulary
from toolkit.formats.gguf.vocabulary import read_vocabulary
from toolkit.overrides import check_patterns, path_of
from toolkit.recipe import Recipe
from toolkit.stream import DataFile

RECIPE = GgufRecipe
HEADER_BYTES = 250_000  # of 40 layers, rounded up
HOLDS: frozenset[Special] = frozenset(("layer norms", "biases", "split projections", "experts"))
REASONS: Mapping[Special, str] = {
    "block-sparse attention": "llama.cpp has no such attention",
    "pictures": "llama.cpp has no Phi-3-vision",
}
PACKAGES = ("gguf", "sentencepiece", "xllamacpp")
CONTEXT_MULTIPLE = 256  # llama.cpp rounds the context up to it
EVEN_PRECISIONS = ("q4_0", "q4_1", "q8_0", "q6_k", "f16")  # one type for all but the head
CACHE_BYTES = 2  # keys and values in float16
# Resident beside weights and cache, generating: 46 MB with the example, 105 MB with the shape of
# Phi-3-mini at 4096 tokens.
OVERHEAD_BYTES = 150_000_000

FOLDED = (
    "llama.cpp weighs a token's experts by another rule: weights are folded to come near the "
    "source, from which a mean KL of about 0.01 remains (0.004 to 0.03 on four random models in "
    "f16); onnx, openvino and mlx have the source's rule"
)


def check_shape(recipe: Recipe, decoder: Decoder) -> None:
    """PlanError when rows hold no whole blocks, or llama.cpp's phi3 lacks a feature."""
    recipe = cast(GgufRecipe, recipe)
    shapes, where = decoder.shapes(), f"{recipe.name}: quantization"
    check_patterns(f"{where}.overrides", recipe.quantization.overrides, decoder)
    for name, kind in mix.choose_types(recipe.quantization, decoder).items():
        if shapes[name][-1] % kind.block_weights:
            columns = shapes[name][-1]
            fits = [k.name.lower() for k in mix.BLOCKS if not columns % k.block_weights]
            raise PlanError(
                f"{where}: {kind.name.lower()} needs rows that are multiples of "
                f"{kind.block_weights}; {name} has rows of {columns}; "
                f"allowed {', '.join(kind for kind in fits if kind != 'f32')}"
            )
    if decoder.is_tied and recipe.quantization.embedding:
        raise PlanError(
            f"{recipe.name}: quantization.embedding: this model's head is its embedding; "
            "set quantization.head alone"
        )
    if decoder.specials:
        _check_experts(recipe, decoder)
    if decoder.heads * decoder.head_dim != decoder.hidden:
        raise PlanError(
            f"{recipe.name}: llama.cpp's phi3 needs heads x head_dim = hidden_size; this model has "
            f"{decoder.heads} x {decoder.head_dim} and {decoder.hidden}"
        )
    if decoder.rope.short_scale != decoder.rope.long_scale:
        raise PlanError(
            f"{recipe.name}: llama.cpp has one scale for LongRoPE; this model has short_mscale "
            f"{decoder.rope.short_scale} and long_mscale {decoder.rope.long_scale}"
        )


def _check_experts(recipe: GgufRecipe, decoder: Decoder) -> None:
    """PlanError for what llama.cpp's phimoe, its only model with such layers here, lacks."""
    where, quantization = f"{recipe.name}: quantization", recipe.quantization
    if not decoder.experts or set(decoder.biased) != {"qkv", "attention_out", "head"}:
        raise PlanError(
            f"{recipe.name}: llama.cpp's phimoe has experts, and biases of attention and head; "
            f"this model ({decoder.family}) has other ones; onnx and openvino can hold it"
        )
    if quantization.precision not in EVEN_PRECISIONS:
        raise PlanError(
            f"{where}.precision: got {quantization.precision}, a mix for Phi-3's own layers; "
            f"allowed with experts {', '.join(EVEN_PRECISIONS)}"
        )
    types = mix.choose_types(quantization, decoder)
    for sources in layout.source_names(decoder).values():
        if len({types[source] for source in sources}) > 1:
            raise PlanError(
                f"{where}.overrides: {path_of(sources[0])} to {path_of(sources[-1])} are one "
                "tensor here; allowed the same type for all"
            )


def list_choices(recipe: Recipe, decoder: Decoder) -> dict[str, tuple[Any, ...]]:
    """What overrides can say of each matrix, smallest first."""
    return dict(mix.list_choices(cast(GgufRecipe, recipe).quantization, decoder))


def lay_out(recipe: Recipe, decoder: Decoder, context_length: int) -> DataFile:
    """Place every tensor in model.gguf; the context does not matter to the file."""
    del context_length
    return layout.lay_out(cast(GgufRecipe, recipe), decoder)


def needs(recipe: Recipe, decoder: Decoder, context_length: int) -> RuntimeNeeds:
    """What llama.cpp takes to run it; PlanError when the context asks for the other factors."""
    recipe = cast(GgufRecipe, recipe)
    valid, notes = find_valid_context(decoder, context_length)
    _check_factors(recipe, decoder, context_length, has_long=valid[0] > 1)
    if decoder.experts:
        notes.append(FOLDED)
    return RuntimeNeeds(
        engine="llama_cpp",
        provider="cpu",
        package="xllamacpp",
        main_file=layout.DATA_FILE,
        kv_bytes_per_token=decoder.kv_bytes_per_token(CACHE_BYTES),
        overhead_bytes=OVERHEAD_BYTES,
        valid_context=valid,
        notes=(*notes, *_fallback_notes(recipe, decoder)),
    )


def rest_bytes(tokenizer_bytes: int) -> int:
    """The header with the tokenizer, the Modelfile, and LlamaEdge's start script."""
    return HEADER_BYTES + tokenizer_bytes


def header_bytes(recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint) -> bytes:
    """Metadata, tokenizer and tensor infos, padded to the data's alignment."""
    return header.header_bytes(cast(GgufRecipe, recipe), decoder, checkpoint)


def write_rest(
    folder: Path, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, context_length: int
) -> None:
    """Write what Ollama and LlamaEdge take; llama.cpp itself needs the one file only."""
    tokens = read_vocabulary(checkpoint.tokenizer_folder, decoder.vocab).tokens
    model = describe_model(checkpoint, tokens, context_length)
    write_text(folder / MODELFILE, write_modelfile(model))
    write_text(folder / SCRIPT, write_script(recipe.name, context_length))


def write_tokenizer(folder: Path, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint) -> None:
    """Write model.gguf with the vocabulary alone.

    UnsupportedError when llama.cpp has no such tokenizer, or no such splitting into words.
    """
    vocabulary = read_vocabulary(checkpoint.tokenizer_folder, decoder.vocab)
    path = folder / layout.DATA_FILE
    if vocabulary.foreign:
        raise UnsupportedError(f"llama.cpp has no tokenizer for {vocabulary.foreign}")
    if not vocabulary.is_byte_level:
        write_vocabulary(path, checkpoint, vocabulary, recipe.model)
        return
    proof = write_proven(path, vocabulary, checkpoint, recipe.model)
    if proof.differing and not vocabulary.splitting:
        raise UnsupportedError(
            "llama.cpp has no pre-tokenizer for this tokenizer.json; the nearest, "
            f"{proof.name}, encodes {proof.differing} of {proof.texts} texts differently"
        )


def open_tokenizer(folder: Path) -> GgufTokenizer:
    """Open llama.cpp's tokenizer of model.gguf."""
    return GgufTokenizer(folder / layout.DATA_FILE)


def write_chat(folder: Path, name: str, chat: Chat, context_length: int) -> tuple[str, ...]:
    """Write the two again for a chat that is not written as Phi-3's."""
    if has_phi3_turns(chat):
        return ()
    model, template = describe_chat(chat, context_length), choose_template(chat)
    write_text(folder / MODELFILE, write_modelfile(model))
    write_text(folder / SCRIPT, write_script(name, context_length, template))
    notes = [f"LlamaEdge renders chats by its own template {template}, the nearest to the model's"]
    if model.differences:
        differ = ", ".join(model.differences)
        notes.append(f"Ollama's Modelfile has the nearest Go template: {differ}")
    return tuple(notes)


def dequantize(folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Read the artifact back: (checkpoint name, float32)."""
    return reader.dequantize(folder, decoder)


def open_session(folder: Path) -> GgufSession:
    """Open the artifact in llama.cpp, on the CPU."""
    return GgufSession(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text with the line ends it has, on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")


def find_valid_context(decoder: Decoder, context_length: int) -> tuple[tuple[int, int], list[str]]:
    """Lengths that agree with the source when `context_length` tokens are allocated."""
    first, last = 1, min(context_length, decoder.context)
    notes = []
    if decoder.window is not None and decoder.window < last:
        last = decoder.window
        notes.append(
            f"llama.cpp has no sliding window for phi3: beyond {last} tokens the model attends to "
            "more than its source does, and answers differ"
        )
    original = decoder.rope.original_context
    allocated = -(-context_length // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
    if decoder.rope.is_long and allocated > original:
        first = original + 1
        notes.append(
            f"llama.cpp picks LongRoPE's factors by the allocated context: with {allocated} the "
            f"long ones hold for short texts too, where the source uses the short ones; allocate "
            f"{original} or less for texts that short"
        )
    return (first, last), notes


def _check_factors(
    recipe: GgufRecipe, decoder: Decoder, context_length: int, *, has_long: bool
) -> None:
    """PlanError when crossing to LongRoPE's long factors was not asked for, or cannot be."""
    original, asked = decoder.rope.original_context, recipe.rope_factors
    where = f"{recipe.name}: context_length: got {context_length}"
    if has_long and asked == "short":
        raise PlanError(
            f"{where}; rope_factors: short holds up to {original} tokens: with more allocated "
            "llama.cpp takes LongRoPE's long factors for texts of every length",
            advice=f"give --context {original} or less, or a recipe with rope_factors: long",
        )
    if asked == "long" and not has_long:
        allowed = f"{original + 1} or more" if decoder.rope.is_long else "a model with LongRoPE"
        raise PlanError(f"{where} with rope_factors: long; allowed {allowed}")


def _fallback_notes(recipe: GgufRecipe, decoder: Decoder) -> list[str]:
    """Say where rows are no multiple of 256."""
    found = mix.find_fallbacks(recipe.quantization, decoder)
    if not found:
        return []
    kinds = ", ".join(sorted({kind.name for kind in found.values()}))
    text = (
        f"{len(found)} tensors whose rows are no multiple of 256 are {kinds}, as in llama-quantize"
    )
    return [text]
