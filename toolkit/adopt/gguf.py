"""A GGUF file for llama.cpp: its metadata say everything, the tokenizer too."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.adopt.found import Found, Given, add_stops
from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder, Rope
from toolkit.errors import ArtifactError, CheckpointError, UnsupportedError, require
from toolkit.families.phi3 import NAMES
from toolkit.formats.gguf import CACHE_BYTES, OVERHEAD_BYTES, find_valid_context
from toolkit.formats.gguf.layout import DATA_FILE, source_names
from toolkit.formats.gguf.llamaedge import SCRIPT, choose_template, write_script
from toolkit.formats.gguf.ollama import MODELFILE, describe_chat, write_modelfile
from toolkit.formats.gguf.tokenizer import KNOWN_STOPS
from toolkit.formats.gguf.vocabulary import TokenType
from toolkit.quality.chat import read_chat

SUFFIX = ".gguf"
ARCHITECTURE = "phi3"
ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED)
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
DEFAULT_THETA = 10000.0


def inspect(given: Given) -> Found:
    """Read and check the file; ArtifactError names file, key, found and allowed."""
    reader = _open(given.path)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    metadata = _Metadata(given.path, fields)
    metadata.check_architecture()
    tensors = {one.name: tuple(int(n) for n in reversed(one.shape)) for one in reader.tensors}
    decoder = _read_decoder(metadata, tensors)
    _check_tensors(given.path, tensors, decoder)
    chat, notes = _read_chat(metadata, decoder.vocab)
    context = given.choose_context(decoder.context, f"{given.path}: phi3.context_length")
    valid, more = find_valid_context(decoder, context)
    return Found(
        format="gguf",
        engine="llama_cpp",
        provider=given.choose_provider(("cpu", "cuda", "metal", "vulkan")),
        package="xllamacpp",
        main_file=DATA_FILE,
        files={DATA_FILE: given.path},
        chat=chat,
        context_length=context,
        valid_context=valid,
        data_bytes=given.path.stat().st_size,
        kv_bytes_per_token=decoder.kv_bytes_per_token(CACHE_BYTES),
        overhead_bytes=OVERHEAD_BYTES,
        notes=(*notes, *more),
        written={
            MODELFILE: write_modelfile(describe_chat(chat, context)),
            SCRIPT: write_script(given.name, context, choose_template(chat)),
        },
    )


def _open(path: Path) -> Any:
    library = require("gguf")
    try:
        return library.GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ArtifactError(
            f"{path}: not a GGUF file, or cut short: {error}",
            advice="copy or download this file again",
        ) from error


class _Metadata:
    """The file's keys, read with their types checked."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path, self._fields = path, fields

    def check_architecture(self) -> None:
        """UnsupportedError unless llama.cpp's phi3 runs it, from one file."""
        found = self.read("general.architecture", str)
        if found != ARCHITECTURE:
            raise UnsupportedError(
                f"{self.path}: general.architecture: got {found!r}; supported: {ARCHITECTURE} "
                "(Phi-3-mini, Phi-3-medium, Phi-3.5-mini)"
            )
        if (count := self.read("split.count", int, 1)) > 1:
            raise UnsupportedError(
                f"{self.path}: split.count: got {count}; supported is a model in one file",
                advice="join it: llama-gguf-split --merge FIRST_FILE OUT.gguf",
            )

    def read(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A value of a kind; ArtifactError when it is another, or missing without a default."""
        field = self._fields.get(key)
        found = default if field is None else field.contents()
        if isinstance(found, kind) and not (isinstance(found, bool) and kind is not bool):
            return found
        kinds = kind if isinstance(kind, tuple) else (kind,)
        allowed = " or ".join(one.__name__ for one in kinds)
        raise ArtifactError(f"{self.path}: {key}: got {found!r}; allowed {allowed}")

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above 0 of the architecture."""
        found = self.read(f"{ARCHITECTURE}.{key}", int, default)
        if found > 0:
            return int(found)
        raise ArtifactError(
            f"{self.path}: {ARCHITECTURE}.{key}: got {found}; allowed a number above 0"
        )

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return key in self._fields


def _read_decoder(metadata: _Metadata, tensors: Mapping[str, tuple[int, ...]]) -> Decoder:
    """The architecture, as its keys say it (llama.cpp's phi3)."""
    heads, hidden = metadata.count("attention.head_count"), metadata.count("embedding_length")
    head_dim = metadata.count("attention.key_length", hidden // heads)
    context = metadata.count("context_length")
    window = metadata.read("phi3.attention.sliding_window", int, 0)
    factors = tensors.get("rope_factors_long.weight", (0,))[0]
    tokens = metadata.read("tokenizer.ggml.tokens", list)
    return Decoder(
        family="phi3",
        layers=metadata.count("block_count"),
        hidden=hidden,
        intermediate=metadata.count("feed_forward_length"),
        heads=heads,
        kv_heads=metadata.count("attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab=len(tokens),
        context=context,
        norm_epsilon=metadata.read("phi3.attention.layer_norm_rms_epsilon", (float, int)),
        rope=Rope(
            theta=metadata.read("phi3.rope.freq_base", (float, int), DEFAULT_THETA),
            rotary_dim=metadata.count("rope.dimension_count", head_dim),
            original_context=metadata.count("rope.scaling.original_context_length", context),
            long_factors=(1.0,) * factors,
        ),
        window=window if 0 < window < context else None,
        is_tied="output.weight" not in tensors,
        names=NAMES,
    )


def _check_tensors(path: Path, tensors: Mapping[str, tuple[int, ...]], decoder: Decoder) -> None:
    """ArtifactError when a tensor is missing, or of another shape than the metadata say."""
    shapes = decoder.shapes()
    for name, (source,) in source_names(decoder).items():
        if tensors.get(name) != shapes[source]:
            found = f"shape {list(tensors[name])}" if name in tensors else "nothing"
            raise ArtifactError(
                f"{path}: {name}: found {found}; the metadata say {list(shapes[source])}",
                advice="this file is damaged or no whole model: download it again",
            )


def _read_chat(metadata: _Metadata, vocab: int) -> tuple[Chat, tuple[str, ...]]:
    """The chat template of the metadata as data, and the ids at which llama.cpp ends."""
    from tokenizers import AddedToken, Tokenizer, models

    texts = [str(text) for text in metadata.read("tokenizer.ggml.tokens", list)]
    kinds = metadata.read("tokenizer.ggml.token_type", list)
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, []))
    added = [text for text, kind in zip(texts, kinds, strict=True) if kind in ADDED]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in added])
    stop_ids = _read_stops(metadata, texts, vocab)
    fields: dict[str, Any] = {"chat_template": _find_template(metadata)}
    for name, key in SPECIAL.items():
        if metadata.has(f"tokenizer.ggml.{key}_token_id"):
            fields[name] = texts[_read_id(metadata, f"tokenizer.ggml.{key}_token_id", vocab)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
        config = Config(str(metadata.path), {"eos_token_id": list(stop_ids)})
        checkpoint = Checkpoint(folder, config, {})
        try:
            return add_stops(read_chat(checkpoint), stop_ids, checkpoint)
        except (CheckpointError, ArtifactError, UnsupportedError) as error:
            where = str(folder / "tokenizer_config.json")
            raise ArtifactError(
                str(error).replace(where, str(metadata.path)).replace(name, str(metadata.path)),
                advice=error.advice,
            ) from error


def _find_template(metadata: _Metadata) -> str:
    key = "tokenizer.chat_template"
    if metadata.has(key):
        return str(metadata.read(key, str))
    raise ArtifactError(
        f"{metadata.path}: {key}: missing: how this model is asked is unknown",
        advice="write it with gguf_new_metadata.py --chat-template, or build from the checkpoint",
    )


def _read_stops(metadata: _Metadata, texts: Sequence[str], vocab: int) -> tuple[int, ...]:
    """Ids that the metadata name, then those that llama.cpp knows by their text."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    ids = [_read_id(metadata, key, vocab) for key in keys if metadata.has(key)]
    ids += [texts.index(text) for text in KNOWN_STOPS[:2] if text in texts]
    return tuple(dict.fromkeys(ids))


def _read_id(metadata: _Metadata, key: str, vocab: int) -> int:
    found = int(metadata.read(key, int))
    if 0 <= found < vocab:
        return found
    raise ArtifactError(f"{metadata.path}: {key}: got {found}; allowed ids from 0 to {vocab - 1}")
