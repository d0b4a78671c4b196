"""The head of model.gguf: metadata and tensor infos, written by gguf-py.

Keys follow Phi3MiniModel of llama.cpp's convert_hf_to_gguf.py and the GGUF specification.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.errors import require
from toolkit.formats.gguf.layout import ALIGN_BYTES, place
from toolkit.formats.gguf.mix import FILE_TYPES
from toolkit.formats.gguf.proving import complete
from toolkit.formats.gguf.recipe import GgufRecipe
from toolkit.formats.gguf.stripping import name_model
from toolkit.formats.gguf.tokenizer import add_tokenizer
from toolkit.formats.gguf.vocabulary import Token, read_vocabulary

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION (ggml.h)


def header_bytes(recipe: GgufRecipe, decoder: Decoder, checkpoint: Checkpoint) -> bytes:
    """Everything before the data, padded to its alignment."""
    writer = require("gguf").GGUFWriter(path=None, arch=decoder.family)
    vocabulary = complete(read_vocabulary(checkpoint.tokenizer_folder, decoder.vocab), checkpoint)
    _add_general(writer, recipe, decoder, vocabulary.tokens)
    _add_architecture(writer, decoder, checkpoint)
    add_tokenizer(writer, checkpoint, vocabulary)
    _add_tensors(writer, recipe, decoder)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = path.read_bytes()
    return head + bytes(-len(head) % ALIGN_BYTES)


def _add_general(
    writer: Any, recipe: GgufRecipe, decoder: Decoder, tokens: Sequence[Token]
) -> None:
    total = sum(int(np.prod(shape)) for shape in decoder.shapes().values())
    writer.add_type("model")
    writer.add_name(name_model(recipe.model, tokens))
    writer.add_size_label(require("gguf").size_label(total, total, 0, 0))
    writer.add_file_type(FILE_TYPES[recipe.quantization.precision])
    writer.add_quantization_version(QUANTIZATION_VERSION)


def _add_architecture(writer: Any, decoder: Decoder, checkpoint: Checkpoint) -> None:
    rope = decoder.rope
    writer.add_context_length(decoder.context)
    writer.add_rope_scaling_orig_ctx_len(rope.original_context)
    writer.add_embedding_length(decoder.hidden)
    writer.add_feed_forward_length(decoder.intermediate)
    writer.add_block_count(decoder.layers)
    writer.add_head_count(decoder.heads)
    writer.add_head_count_kv(decoder.kv_heads)
    writer.add_layer_norm_rms_eps(decoder.norm_epsilon)
    if decoder.experts:
        writer.add_expert_count(decoder.experts.count)
        writer.add_expert_used_count(decoder.experts.per_token)
    writer.add_rope_dimension_count(rope.rotary_dim)
    writer.add_rope_freq_base(rope.theta)
    # Always there: several runtimes refuse a phi3 file without it. The checkpoint's own number,
    # as the converter has it, even where the window is wider than the context.
    writer.add_sliding_window(checkpoint.config.fields.get("sliding_window") or 0)
    if rope.is_long:
        writer.add_rope_scaling_attn_factors(rope.long_scale)


def _add_tensors(writer: Any, recipe: GgufRecipe, decoder: Decoder) -> None:
    types = require("gguf").GGMLQuantizationType
    for tensor in place(recipe, decoder)[0]:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),  # only looked at where raw_dtype is not given
            tensor.nbytes,
            raw_dtype=types(int(tensor.kind)),
        )
