"""Makes the tiny Phi-3's tokenizer in both forms of the real one. Needs sentencepiece, protobuf.

`tokenizer.model` is a SentencePiece BPE trained here with the normalizer and trainer settings
found in Phi-3's own file. `tokenizer.json` is derived from its pieces, so both give the same ids.
The added tokens are those of Phi-3-mini: same names, order and flags, placed after the pieces.
"""

import io
import json
import string
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PIECES = 1984
CONTEXT_TOKENS = 512
SPACE = "\u2581"

# Phi-3-mini's template: every turn ends with <|end|>, a finished conversation with eos_token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# (content, rstrip, special), as Phi-3-mini flags them. rstrip swallows the whitespace after the
# token, so the newline that the chat template puts there costs no token.
CONTROL_TOKENS = (("<unk>", False, True), ("<s>", False, True), ("</s>", True, False))
ADDED_TOKENS = (
    ("<|endoftext|>", False, True),
    ("<|assistant|>", True, True),
    ("<|placeholder1|>", True, True),
    ("<|placeholder2|>", True, True),
    ("<|placeholder3|>", True, True),
    ("<|placeholder4|>", True, True),
    ("<|system|>", True, True),
    ("<|end|>", True, True),
    ("<|placeholder5|>", True, True),
    ("<|placeholder6|>", True, True),
    ("<|user|>", True, True),
)
SPECIAL_ROLES = {
    "bos_token": "<s>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
    "unk_token": "<unk>",
}


def added_token_id(content: str) -> int:
    """The id of an added token: they follow the pieces, in order."""
    return PIECES + [token for token, _, _ in ADDED_TOKENS].index(content)


def train_sentencepiece(sentences: Iterable[str]) -> bytes:
    """Trains the BPE and returns the serialized SentencePiece model (PIECES pieces)."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9999,
        required_chars=string.printable.strip(),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    return _rank_spaces_last(model.getvalue())


def _rank_spaces_last(model: bytes) -> bytes:
    """Gives runs of spaces the lowest scores, as in Phi-3's own file.

    Otherwise a run takes the space that belongs to the word behind it, which onnxruntime-genai,
    splitting at words first, never does: the same text would get other ids there.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    lowest = min(piece.score for piece in proto.pieces)
    for piece in proto.pieces:
        if len(piece.piece) > 1 and set(piece.piece) == {SPACE}:
            piece.score += lowest - 1
    return bytes(proto.SerializeToString())


def read_pieces(model: bytes) -> list[tuple[str, float]]:
    """Every piece of a serialized SentencePiece model with its score, in id order."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return [(piece.piece, piece.score) for piece in proto.pieces]


def derive_merges(pieces: list[tuple[str, float]]) -> list[str]:
    """All the ways two pieces join into a third, best score first.

    SentencePiece joins the neighbours whose union scores highest, whatever the two halves are, so
    each split of a piece becomes a merge of the same standing (ties: by the halves' ids).
    """
    ids = {piece: index for index, (piece, _) in enumerate(pieces)}
    merges = []
    for piece, score in pieces:
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        for left, right in splits:
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], f"{left} {right}"))
    return [merge for _, _, _, merge in sorted(merges)]


def _added_token(content: str, rstrip: bool, special: bool) -> dict[str, Any]:
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": rstrip,
        "normalized": False,
        "special": special,
    }


def _all_added_tokens() -> dict[int, dict[str, Any]]:
    tokens = dict(enumerate(CONTROL_TOKENS)) | dict(enumerate(ADDED_TOKENS, PIECES))
    return {index: _added_token(*token) for index, token in tokens.items()}


def _template(*parts: tuple[str, int]) -> list[dict[str, Any]]:
    """A TemplateProcessing sequence: every part with <s> before it."""
    template: list[dict[str, Any]] = []
    for sequence, type_id in parts:
        template.append({"SpecialToken": {"id": "<s>", "type_id": type_id}})
        template.append({"Sequence": {"id": sequence, "type_id": type_id}})
    return template


def describe_tokenizer(pieces: list[tuple[str, float]]) -> dict[str, Any]:
    """The content of tokenizer.json for these pieces."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **token} for index, token in _all_added_tokens().items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": _template(("A", 0)),
            "pair": _template(("A", 0), ("B", 1)),
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, (piece, _) in enumerate(pieces)},
            "merges": derive_merges(pieces),
        },
    }


def describe_tokenizer_config() -> dict[str, Any]:
    """The content of tokenizer_config.json, with Phi-3-mini's keys."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): token for i, token in _all_added_tokens().items()},
        **SPECIAL_ROLES,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": CONTEXT_TOKENS,
        "padding_side": "left",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
    }


def describe_special_tokens() -> dict[str, Any]:
    """The content of special_tokens_map.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {role: {"content": content, **flags} for role, content in SPECIAL_ROLES.items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` the way transformers does: UTF-8, two spaces, a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, sentences: Iterable[str]) -> None:
    """Trains on `sentences` and writes the four tokenizer files into `folder`."""
    model = train_sentencepiece(sentences)
    (folder / "tokenizer.model").write_bytes(model)
    write_json(folder / "tokenizer.json", describe_tokenizer(read_pieces(model)))
    write_json(folder / "tokenizer_config.json", describe_tokenizer_config())
    write_json(folder / "special_tokens_map.json", describe_special_tokens())
