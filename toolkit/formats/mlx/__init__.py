"""MLX for mlx-lm: 2 to 8 bits, mixed precision by layer, or bf16, fp16, fp32; on Macs and Linux."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.preprocessor import PREPROCESSOR_FILE
from toolkit.decoder import Decoder, Special
from toolkit.errors import PlanError
from toolkit.formats import RuntimeNeeds
from toolkit.formats.mlx import config, layout, modules, reader, schemes, vision
from toolkit.formats.mlx.encoders import STORED
from toolkit.formats.mlx.recipe import MlxRecipe
from toolkit.formats.mlx.session import MlxSession, MlxTokenizer
from toolkit.overrides import path_of
from toolkit.recipe import Recipe
from toolkit.stream import DataFile

RECIPE = MlxRecipe
CONFIG_BYTES = 200_000  # of 40 layers, or of 32 and a tower, rounded up
HOLDS: frozenset[Special] = frozenset(
    ("layer norms", "biases", "split projections", "experts", "pictures")
)
REASONS: Mapping[Special, str] = {
    "block-sparse attention": "mlx-lm's phi3small computes another model than the published one",
}
PACKAGES = ("mlx", "mlx-lm")
# Resident beside weights and cache: 90 MB with the example; 0.6 GB in the gate with the shape of
# Phi-3-mini, on a CPU, where scales become float32.
OVERHEAD_BYTES = 600_000_000
CPU_ITEM_BYTES = 4


def check_shape(recipe: Recipe, decoder: Decoder) -> None:
    """PlanError when a row is no whole groups, or mlx-lm's phi3 lacks a feature."""
    recipe = cast(MlxRecipe, recipe)
    if decoder.heads * decoder.head_dim != decoder.hidden:
        raise PlanError(
            f"{recipe.name}: mlx-lm's phi3 needs heads x head_dim = hidden_size; this model has "
            f"{decoder.heads} x {decoder.head_dim} and {decoder.hidden}"
        )
    if set(decoder.specials) - {"pictures"}:
        _check_experts(recipe, decoder)
    vision.check_vision(recipe, decoder)
    config.check_rope(recipe, decoder)
    schemes.check_schemes(recipe, decoder)


def _check_experts(recipe: MlxRecipe, decoder: Decoder) -> None:
    """PlanError for what mlx-lm's phimoe, its only model with such layers here, lacks."""
    biased = {"qkv", "attention_out", "head"}
    if not decoder.experts or set(decoder.biased) != biased or decoder.is_tied:
        raise PlanError(
            f"{recipe.name}: mlx-lm's phimoe has experts, and biases of attention and head; this "
            f"model ({decoder.family}) has other ones; onnx and openvino can hold it"
        )
    if recipe.quantization.sensitive_bits:
        raise PlanError(
            f"{recipe.name}: quantization.sensitive_bits: knows Phi-3's own layers only; this "
            f"model ({decoder.family}) has experts; allowed none"
        )
    chosen = schemes.choose_schemes(recipe, decoder)
    for sources in modules.list_tensors(decoder).values():
        if len({chosen.get(path_of(source)) for source in sources}) > 1:
            raise PlanError(
                f"{recipe.name}: quantization.overrides: {path_of(sources[0])} to "
                f"{path_of(sources[-1])} are one module here; allowed the same type for all"
            )


def list_choices(recipe: Recipe, decoder: Decoder) -> dict[str, tuple[Any, ...]]:
    """What overrides can say of each matrix, smallest first."""
    return dict(schemes.list_choices(cast(MlxRecipe, recipe), decoder))


def lay_out(recipe: Recipe, decoder: Decoder, context_length: int) -> DataFile:
    """Place every tensor in model.safetensors; the context does not matter to the file."""
    del context_length
    return layout.lay_out(cast(MlxRecipe, recipe), decoder)


def count_item_bytes(provider: str, stored_bytes: int) -> int:
    """Bytes of a number in the cache: on a CPU the runner computes in float32."""
    return CPU_ITEM_BYTES if provider == "cpu" else stored_bytes


def needs(recipe: Recipe, decoder: Decoder, context_length: int) -> RuntimeNeeds:
    """What mlx-lm takes to run it; PlanError when no length of the context is the source's."""
    recipe = cast(MlxRecipe, recipe)
    valid, notes = _valid_context(recipe, decoder, context_length)
    if decoder.experts:
        notes.append(
            "checked with mlx-lm 0.32.2; older ones, which make the weights of a token's experts "
            "sum to 1, give other answers"
        )
    if decoder.vision:
        notes += vision.describe_tower(decoder.vision)
    item_bytes = count_item_bytes(recipe.provider, STORED[recipe.quantization.dtype].itemsize)
    return RuntimeNeeds(
        engine="mlx_lm",
        provider=recipe.provider,
        package="mlx-lm",
        main_file=layout.DATA_FILE,
        kv_bytes_per_token=decoder.kv_bytes_per_token(item_bytes),
        overhead_bytes=OVERHEAD_BYTES + (vision.PICTURE_BYTES if decoder.vision else 0),
        valid_context=valid,
        notes=tuple(notes),
        always_long_rope=recipe.rope_factors == "long",
        companions=("pillow",) if decoder.vision else (),
    )


def rest_bytes(tokenizer_bytes: int) -> int:
    """Configurations, the index, the tokenizer's files."""
    return CONFIG_BYTES + tokenizer_bytes


def header_bytes(recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint) -> bytes:
    """The header of model.safetensors."""
    del checkpoint
    return layout.header_bytes(cast(MlxRecipe, recipe), decoder)


def write_rest(
    folder: Path, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint, context_length: int
) -> None:
    """Write index, configurations and the tokenizer's files, these verbatim."""
    del context_length
    recipe = cast(MlxRecipe, recipe)
    _write_json(folder / "model.safetensors.index.json", layout.make_index(recipe, decoder))
    _write_json(folder / "config.json", config.make_config(recipe, decoder, checkpoint))
    _write_json(folder / "generation_config.json", config.make_generation(checkpoint))
    checkpoint.write_tokenizer(folder)
    if decoder.vision:
        shutil.copyfile(checkpoint.folder / PREPROCESSOR_FILE, folder / PREPROCESSOR_FILE)


def write_tokenizer(folder: Path, recipe: Recipe, decoder: Decoder, checkpoint: Checkpoint) -> None:
    """Write the tokenizer's files and config.json, which transformers reads for them."""
    made = config.make_config(cast(MlxRecipe, recipe), decoder, checkpoint)
    _write_json(folder / "config.json", made)
    checkpoint.write_tokenizer(folder)


def open_tokenizer(folder: Path) -> MlxTokenizer:
    """Open mlx-lm's tokenizer of a folder."""
    return MlxTokenizer(folder)


def write_chat(folder: Path, name: str, chat: Chat, context_length: int) -> tuple[str, ...]:
    """Nothing: no other program is told of the chat."""
    del folder, name, chat, context_length
    return ()


def dequantize(folder: Path, decoder: Decoder) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Read the artifact back: (checkpoint name, float32)."""
    return reader.dequantize(folder, decoder)


def open_session(folder: Path) -> MlxSession:
    """Open the artifact in mlx-lm, on the CPU."""
    return MlxSession(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _valid_context(
    recipe: MlxRecipe, decoder: Decoder, context_length: int
) -> tuple[tuple[int, int], list[str]]:
    """Lengths that agree with the source, and what to know of the others."""
    first, last = 1, context_length
    original = decoder.rope.original_context
    notes = []
    if recipe.rope_factors == "short":
        if context_length > original:
            raise PlanError(
                f"{recipe.name}: context_length: got {context_length}; rope_factors: short holds "
                f"up to {original} tokens, for mlx-lm never changes to the long ones",
                advice=f"give --context {original} or less, or a recipe with rope_factors: long",
            )
    elif recipe.rope_factors == "long":
        first = original + 1
        if context_length < first:
            raise PlanError(
                f"{recipe.name}: context_length: got {context_length}; rope_factors: long is the "
                f"source's from {first} tokens on",
                advice=f"give --context {first} or more, or a recipe with rope_factors: short",
            )
        notes.append(
            f"mlx-lm uses LongRoPE's long factors at every length, the source from {first} tokens "
            "on: answers to shorter texts differ from its; rope_factors: short is for those"
        )
    if decoder.window is not None and decoder.window < last:
        last = decoder.window
        notes.append(
            f"mlx-lm has no sliding window for phi3: beyond {last} tokens the model attends to "
            "more than its source does, and answers differ"
        )
    return (first, last), notes
