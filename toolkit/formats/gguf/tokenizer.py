"""The tokenizer's part of model.gguf: tokens, merges, special ids, the chat template."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.templates import DEFAULT, TOOL_USE, read_source
from toolkit.errors import CheckpointError, require
from toolkit.formats.gguf.stripping import STRIP_KEY, name_model, strip_template, texts_to_strip
from toolkit.formats.gguf.vocabulary import Token, Vocabulary

ARCHITECTURE = "phi3"  # of a file with a vocabulary alone, which any will do for
# Tokens that llama.cpp takes for the end of generation by their text (src/llama-vocab.cpp)
KNOWN_STOPS = ("<|end|>", "<|endoftext|>", "</s>")


def write_vocabulary(
    path: Path, checkpoint: Checkpoint, vocabulary: Vocabulary, name: str = ""
) -> None:
    """Write a file without tensors; `name` is the model's, which decides about white space."""
    writer = require("gguf").GGUFWriter(path=None, arch=ARCHITECTURE)
    writer.add_name(name_model(name, vocabulary.tokens))
    add_tokenizer(writer, checkpoint, vocabulary)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def add_tokenizer(writer: Any, checkpoint: Checkpoint, vocabulary: Vocabulary) -> None:
    """Add tokens, merges, special ids and the chat template; `splitting` has to be known."""
    tokens = vocabulary.tokens
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.splitting)
    writer.add_token_list([token.text for token in tokens])
    if not vocabulary.is_byte_level:
        writer.add_token_scores([token.score for token in tokens])
        if not vocabulary.has_front:
            writer.add_add_space_prefix(False)  # llama.cpp's default is what Phi-3 does
    writer.add_token_types([int(token.kind) for token in tokens])
    logging.getLogger("gguf").setLevel(logging.ERROR)  # it warns of Phi-3's own post-processor
    special = require("gguf").SpecialVocab(
        checkpoint.tokenizer_folder, load_merges=vocabulary.is_byte_level, n_vocab=len(tokens)
    )
    strippers = texts_to_strip(tokens)
    if strippers:
        writer.add_string(STRIP_KEY, json.dumps(strippers))
    special.chat_template = _list_templates(checkpoint, strippers)
    special.special_token_ids.setdefault("eos", checkpoint.stop_ids[0])
    special.add_to_gguf(writer, quiet=True)
    _add_stops(writer, checkpoint, tokens, special.special_token_ids["eos"])


def _list_templates(checkpoint: Checkpoint, strippers: Sequence[str]) -> str | list[Any] | None:
    """The checkpoint's own templates as the file has them; None where there are none."""
    try:
        source = read_source(checkpoint)
    except CheckpointError:
        return None  # a build has asked for them already
    text = strip_template(source.text, strippers)
    if not source.tool_use:
        return text
    named = {DEFAULT: text, TOOL_USE: strip_template(source.tool_use, strippers)}
    return [{"name": name, "template": one} for name, one in named.items()]


def _add_stops(writer: Any, checkpoint: Checkpoint, tokens: Sequence[Token], end_id: int) -> None:
    """Name every stop id: besides `eos` GGUF has room for an end of turn and one of message."""
    if (last := max(checkpoint.stop_ids)) >= len(tokens):
        raise checkpoint.config.error("eos_token_id", last, f"ids below {len(tokens)}")
    turn_id = next((i for i in checkpoint.stop_ids if tokens[i].text == "<|end|>"), None)
    others = [i for i in checkpoint.stop_ids if i != end_id and tokens[i].text not in KNOWN_STOPS]
    if turn_id is None and others:
        turn_id = others.pop(0)
    if len(others) > 1:
        texts = ", ".join(repr(tokens[i].text) for i in others)
        raise CheckpointError(
            f"{checkpoint.folder}: eos_token_id: a GGUF file can name one more stop token besides "
            f"those that llama.cpp knows ({', '.join(KNOWN_STOPS)}); found {texts}"
        )
    if turn_id is not None:
        writer.add_eot_token_id(turn_id)
    if others:
        writer.add_eom_token_id(others[0])
