"""A checkpoint in a local folder: config, tensors by row range, tokenizer files."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import fileio
from toolkit.checkpoint import ranks
from toolkit.checkpoint.config import Config, read_config, read_json
from toolkit.checkpoint.preprocessor import PREPROCESSOR_FILE, read_preprocessing
from toolkit.checkpoint.quantized import check_quantization
from toolkit.checkpoint.safetensors import FP8, TensorInfo, read_index
from toolkit.decoder import Decoder
from toolkit.errors import CheckpointError
from toolkit.vision import Preprocessing

TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of others, by name
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
    ranks.RANKS_FILE,
)
# How runtimes are to read tokenizer.json, where the checkpoint names code of its own.
FAST_TOKENIZER = "PreTrainedTokenizerFast"
CONFIG_FILES = ("config.json", "generation_config.json", PREPROCESSOR_FILE)
RAW_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    FP8: np.dtype("u1"),  # codes, which fp8.py makes floats of
}
END_OF_TURN = "<|end|>"
PIECE_WEIGHTS = 1 << 21
FINGERPRINT_BYTES = 1 << 16
LOCAL_REVISION = "local"


def to_float32(raw: NDArray[Any]) -> NDArray[np.float32]:
    """Widen raw weights (bf16 as uint16 bits, float16 or float32) to float32, exactly."""
    if raw.dtype == np.uint16:
        bits: NDArray[np.uint32] = np.left_shift(raw, 16, dtype=np.uint32)
        return bits.view(np.float32)
    return raw.astype(np.float32)


@dataclass
class Checkpoint:
    """A folder of safetensors. Bytes are read on request only; one process, one thread."""

    folder: Path
    config: Config
    tensors: dict[str, TensorInfo]
    revision: str = LOCAL_REVISION
    _descriptors: dict[str, int] = field(default_factory=dict, repr=False)
    _maps: dict[str, fileio.MappedFile | None] = field(default_factory=dict, repr=False)
    _buffers: dict[np.dtype[Any], NDArray[Any]] = field(default_factory=dict, repr=False)
    _means: dict[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path, revision: str = LOCAL_REVISION) -> "Checkpoint":
        """Read config and headers of `folder`; CheckpointError when they are missing or damaged.

        A checkpoint that is stored in another way than Phi-3's comes as a view that reads it so.
        """
        from toolkit.checkpoint.views import present

        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}",
                advice="give a folder, or a Hugging Face id such as owner/name@revision",
            )
        config = read_config(folder / "config.json")
        check_quantization(config)
        return present(cls(folder, config, read_index(folder), revision))

    @property
    def files(self) -> list[str]:
        """Names of the files that the weights lie in."""
        return sorted({info.file for info in self.tensors.values()})

    def config_bytes(self) -> bytes:
        """config.json, as an artifact has it."""
        return (self.folder / "config.json").read_bytes()

    def dump_config(self) -> bytes:
        """`config` as a file."""
        return json.dumps(dict(self.config.fields), indent=2).encode() + b"\n"

    @property
    def tokenizer_folder(self) -> Path:
        """The folder with the tokenizer's files and the chat template."""
        return self.folder

    @property
    def adapter_digest(self) -> str:
        """Hex sha256 of the adapter that is merged in (lora.py); empty without one."""
        return ""

    def reopen(self) -> "Checkpoint":
        """The same with files and buffers of its own, for another thread."""
        return Checkpoint(self.folder, self.config, self.tensors, self.revision)

    def close(self) -> None:
        """Close every file that was opened for reading."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        self._maps.clear()

    @cached_property
    def generation(self) -> dict[str, Any]:
        """generation_config.json; empty when there is none."""
        path = self.folder / "generation_config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json; empty when there is none."""
        path = self.tokenizer_folder / "tokenizer_config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """What preprocessor_config.json says of pictures; CheckpointError when it is missing."""
        return read_preprocessing(self.folder / PREPROCESSOR_FILE)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends generation: generation_config.json first, then config.json.

        The token that ends a turn belongs to them, also where a fine-tune was saved without its
        generation_config.json and names <|endoftext|> only.
        """
        found = self.generation.get("eos_token_id", self.config.fields.get("eos_token_id"))
        ids = found if isinstance(found, list) else [found]
        if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise self.config.error("eos_token_id", found, "a token id or a list of them")
        return tuple(dict.fromkeys([*ids, *self._added_ids(END_OF_TURN)]))

    def _added_ids(self, content: str) -> list[int]:
        """Ids of an added token by its text, from tokenizer.json; none when there is no file."""
        path = self.tokenizer_folder / "tokenizer.json"
        if self._has_ranks_only:
            specials = ranks.list_added(self._ranks_file, self._vocab, self._listed_tokens())
            return [token for token, text in specials.items() if text == content]
        added = read_json(path).get("added_tokens") or () if path.is_file() else ()
        try:
            return [int(token["id"]) for token in added if token["content"] == content]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: added_tokens: damaged ({error!r}); allowed a list of tokens with id and "
                "content"
            ) from error

    def special_id(self, key: str) -> int | None:
        """`bos_token_id` or `pad_token_id`, generation_config.json first; None when absent."""
        found = self.generation.get(key, self.config.fields.get(key))
        return found if isinstance(found, int) else None

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files that are there, with all chat templates."""
        folder = self.tokenizer_folder
        files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
        return [*files, *sorted((folder / MORE_TEMPLATES).glob("*.jinja"))]

    @cached_property
    def made_tokenizer(self) -> bytes | None:
        """What tokenizer.json says where it is to be made of a tiktoken file; None elsewhere.

        CheckpointError when that file, or the list of added tokens, is damaged.
        """
        if not self._has_ranks_only:
            return None
        made = ranks.make_tokenizer(self._ranks_file, self._vocab, self._listed_tokens())
        # As text: the parsed one takes 45 MB.
        return json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    @property
    def _ranks_file(self) -> Path:
        return self.tokenizer_folder / ranks.RANKS_FILE

    @property
    def _has_ranks_only(self) -> bool:
        return (
            self._ranks_file.is_file() and not (self.tokenizer_folder / "tokenizer.json").is_file()
        )

    @property
    def _vocab(self) -> int:
        return self.config.integer("vocab_size")

    def _listed_tokens(self) -> dict[int, str]:
        """Added tokens by id, as tokenizer_config.json lists them."""
        listed = self.tokenizer_config.get("added_tokens_decoder") or {}
        try:
            return {int(token): str(entry["content"]) for token, entry in listed.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / 'tokenizer_config.json'}: added_tokens_decoder: damaged "
                f"({error!r}); allowed a mapping of ids to tokens with content"
            ) from error

    def tokenizer_contents(self) -> dict[str, bytes]:
        """The tokenizer's files as every artifact has them: by name what they say.

        Verbatim, but for a tiktoken file: it becomes tokenizer.json, for runtimes that read the
        former read it wrong.
        """
        paths = [path for path in self.tokenizer_files() if path.name != ranks.RANKS_FILE]
        contents = {self._name(path): path.read_bytes() for path in paths}
        if self.made_tokenizer:
            config = {**self.tokenizer_config, "tokenizer_class": FAST_TOKENIZER}
            config.pop("auto_map", None)  # code that reads the tiktoken file
            contents["tokenizer_config.json"] = json.dumps(config, indent=2).encode() + b"\n"
            contents["tokenizer.json"] = self.made_tokenizer
        return contents

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files, as artifacts have them, into `folder`."""
        for name, content in self.tokenizer_contents().items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.tokenizer_folder).as_posix()

    def check(self, decoder: Decoder) -> None:
        """Compare names and shapes with the architecture; CheckpointError on any difference."""
        if decoder.vision:
            self.preprocessing  # noqa: B018 - without it no picture can be read
        self.compare(decoder, decoder.all_shapes)

    def compare(
        self, decoder: Decoder, list_shapes: Callable[[], Mapping[str, tuple[int, ...]]]
    ) -> None:
        """Compare with the tensors that there should be; CheckpointError on any difference."""
        where = f"{self.folder}: config.json and the tensors contradict each other"
        if decoder.layers > len(self.tensors):  # before a list of 10**12 layers is made
            raise CheckpointError(
                f"{where}: config.json says {decoder.layers} layers; "
                f"found only {len(self.tensors)} tensors"
            )
        shapes = list_shapes()
        for name, shape in shapes.items():
            if name not in self.tensors:
                raise CheckpointError(f"{where}: {name} {list(shape)} is missing")
            if self.tensors[name].shape != shape:
                found = list(self.tensors[name].shape)
                raise CheckpointError(f"{where}: {name}: found {found}; expected {list(shape)}")
        if unknown := sorted(set(self.tensors) - set(shapes) - self._ignored(decoder)):
            raise CheckpointError(
                f"{where}: {unknown[0]} is not part of {self.config.architecture} "
                f"({len(unknown)} unknown tensors); nothing is dropped silently"
            )

    def _ignored(self, decoder: Decoder) -> set[str]:
        """Tensors that may be there and are not used, each for its reason."""
        tied_copy = {decoder.names.head} if decoder.is_tied else set()
        rotary = {name for name in self.tensors if name.endswith("rotary_emb.inv_freq")}
        return tied_copy | rotary

    def read_rows(
        self, name: str, start: int = 0, count: int | None = None, piece: int = PIECE_WEIGHTS
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (first row, raw [rows, columns]) in pieces of about `piece` weights.

        bf16 comes as uint16 bits, float16 and float32 as themselves; vectors count as one row.
        The array is a view of the file or a buffer, which the next step takes away, of whichever
        tensor: one iterator at a time, and no writing. CheckpointError when the file ends early;
        IndexError for rows that are not there.
        """
        info = self.tensors[name]
        columns = info.shape[-1]
        total = math.prod(info.shape[:-1])
        stop = total if count is None else start + count
        if not 0 <= start <= stop <= total:
            raise IndexError(f"{name}: rows {start} to {stop}; it has {total}")
        dtype = RAW_DTYPES[info.dtype]
        step = max(1, piece // columns)
        for row in range(start, stop, step):
            rows = min(step, stop - row)
            offset, size = info.offset + row * columns * dtype.itemsize, rows * columns
            mapped = self._map(info)
            if mapped and (part := mapped.load(offset, size * dtype.itemsize)) is not None:
                yield row, part.view(dtype).reshape(rows, columns)
                mapped.unload(offset, size * dtype.itemsize)
                continue
            raw = self._buffer(dtype, max(step * columns, piece))[:size]
            self._read_at(info, fileio.as_bytes(raw), offset)
            yield row, raw.reshape(rows, columns)

    def read(self, name: str) -> NDArray[np.float32]:
        """Read a whole tensor as float32; for small tensors and the reference forward."""
        info = self.tensors[name]
        out = np.empty(info.shape, np.float32)
        rows = out.reshape(-1, info.shape[-1])
        for row, raw in self.read_rows(name):
            rows[row : row + len(raw)] = to_float32(raw)
        return out

    def read_column_means(self, name: str) -> NDArray[np.float32]:
        """The mean of each column of a matrix, float32; that of the latest matrix is remembered."""
        if name not in self._means:
            rows, columns = self.tensors[name].shape
            total = np.zeros(columns)
            for _, raw in self.read_rows(name):
                total += to_float32(raw).sum(axis=0, dtype=np.float64)
            self._means = {name: (total / rows).astype(np.float32)}
        return self._means[name]

    def _map(self, info: TensorInfo) -> fileio.MappedFile | None:
        """The file of a tensor; None where it is to be read into a buffer."""
        if info.file not in self._maps:
            self._maps[info.file] = fileio.map_file(self.folder / info.file)
        return None if info.offset % info.item_bytes else self._maps[info.file]

    def _read_at(self, info: TensorInfo, view: memoryview, offset: int) -> None:
        try:
            fileio.read_at(self._descriptor(info.file), view, offset)
        except (EOFError, OSError) as error:
            raise CheckpointError(f"{self.folder / info.file}: {info.name}: {error}") from error

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = fileio.open_to_read(self.folder / file)
        return self._descriptors[file]

    def _buffer(self, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
        if dtype not in self._buffers or self._buffers[dtype].size < size:
            self._buffers[dtype] = np.empty(size, dtype)
        return self._buffers[dtype]

    def fingerprint(self) -> str:
        """Hex sha256 over configs, tokenizer, and each tensor's header, first and last 64 KiB.

        Not a hash of every weight: that would cost more than the conversion. Any training step
        moves weights in the sampled parts.
        """
        digest = hashlib.sha256()
        configs = [self.tokenizer_folder / name for name in CONFIG_FILES]
        for path in [*filter(Path.is_file, configs), *self.tokenizer_files()]:
            digest.update(self._name(path).encode() + b"\0" + path.read_bytes())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            size = min(FINGERPRINT_BYTES, info.nbytes)
            piece = bytearray(size)
            for offset in (info.offset, info.offset + info.nbytes - size):
                self._read_at(info, memoryview(piece), offset)
                digest.update(piece)
        return digest.hexdigest()
