"""An MLX folder for mlx-lm, as mlx_lm.convert writes it and mlx-community publishes it."""

import json
from pathlib import Path
from typing import Any

from toolkit.adopt.found import (
    CONFIGS,
    Found,
    Given,
    find_chat,
    list_tokenizer,
    read_config_file,
    read_ids,
    require_file,
)
from toolkit.checkpoint.config import Config
from toolkit.checkpoint.safetensors import INDEX, SINGLE, read_weight_map
from toolkit.checkpoint.split import list_parts
from toolkit.decoder import Decoder
from toolkit.errors import ArtifactError, UnsupportedError
from toolkit.families import read_decoder
from toolkit.formats.mlx import OVERHEAD_BYTES, count_item_bytes

CONFIG = "config.json"
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U32": 4, "U8": 1}
LARGEST_HEADER_BYTES = 100_000_000


def inspect(given: Given) -> Found:
    """Read and check the folder; ArtifactError names file, key, found and allowed."""
    config = read_config_file(require_file(given.path / CONFIG, "mlx-lm reads it"))
    decoder = read_decoder(config)
    if decoder.vision:
        raise UnsupportedError(f"{config.where}: supported are models of text alone")
    shards, dtypes = _read_weights(given.path)
    norm = _check_tensors(given.path, dtypes, decoder)
    configs = {n: given.path / n for n in (*CONFIGS, INDEX) if (given.path / n).is_file()}
    chat, notes = find_chat(given, _read_stops(given.path, config, decoder.vocab), decoder.vocab)
    context = given.choose_context(decoder.context, str(given.path / CONFIG))
    valid, more = _valid_context(decoder, context)
    provider = given.choose_provider(("metal", "cpu"))
    item_bytes = count_item_bytes(provider, ITEM_BYTES[norm])
    return Found(
        format="mlx",
        engine="mlx_lm",
        provider=provider,
        package="mlx-lm",
        main_file=shards[0].name,
        files={**configs, **{path.name: path for path in shards}, **list_tokenizer(given)},
        chat=chat,
        context_length=context,
        valid_context=valid,
        data_bytes=sum(path.stat().st_size for path in shards),
        kv_bytes_per_token=decoder.kv_bytes_per_token(item_bytes),
        overhead_bytes=OVERHEAD_BYTES,
        notes=notes + more,
    )


def _read_stops(folder: Path, config: Config, vocab: int) -> tuple[int, ...]:
    """For mlx-lm generation_config.json wins over config.json."""
    path = folder / "generation_config.json"
    if path.is_file():
        generation = read_config_file(path)
        if generation.fields.get("eos_token_id") is not None:
            return read_ids(generation, "eos_token_id", vocab)
    return read_ids(config, "eos_token_id", vocab)


def _read_weights(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of weights, and each tensor's dtype."""
    if (folder / INDEX).is_file():
        names = sorted(set(read_weight_map(folder / INDEX).values()))
    else:
        names = [SINGLE]
    shards = [require_file(folder / name, "it holds weights") for name in names]
    dtypes = {name: kind for path in shards for name, kind in _read_header(path).items()}
    return shards, dtypes


def _read_header(path: Path) -> dict[str, str]:
    """Each tensor's dtype; ArtifactError unless the file is as long as its header says."""
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        raw = stream.read(header_bytes) if header_bytes < LARGEST_HEADER_BYTES else b""
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        end = 8 + header_bytes + max(int(entry["data_offsets"][1]) for entry in header.values())
        dtypes = {name: str(entry["dtype"]) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: its header is damaged: {error!r}") from error
    if end != size_bytes:
        raise ArtifactError(
            f"{path}: found {size_bytes} bytes; its header says {end}",
            advice="copy or download this file again",
        )
    return dtypes


def _check_tensors(folder: Path, dtypes: dict[str, str], decoder: Decoder) -> str:
    """ArtifactError when a tensor of the architecture is missing; returns the norms' dtype."""
    for name in decoder.shapes():
        apart = () if name in dtypes else list_parts(name)  # as a Llama's are stored
        if missing := [one for one in apart or (name,) if one not in dtypes]:
            raise ArtifactError(
                f"{folder}: {missing[0]} is missing among the weights ({len(dtypes)} tensors); "
                "config.json's architecture has it"
            )
    norm = dtypes[decoder.names.final_norm]
    if norm not in ("BF16", "F16", "F32"):
        raise ArtifactError(f"{folder}: {decoder.names.final_norm}: dtype: got {norm}; allowed "
                            "BF16, F16, F32")  # fmt: skip
    return norm


def _valid_context(decoder: Decoder, context: int) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Lengths that agree with the source: mlx-lm's phi3 has no window and one set of factors."""
    first, last, notes = 1, context, []
    rope = decoder.rope
    if rope.is_long and rope.short_factors != rope.long_factors:
        first = min(rope.original_context + 1, context)
        notes.append(
            f"mlx-lm uses LongRoPE's long factors at every length, the source from {first} tokens "
            "on: answers to shorter texts differ from its"
        )
    if decoder.window is not None and decoder.window < last:
        last = decoder.window
        notes.append(f"mlx-lm has no sliding window for phi3: answers differ beyond {last} tokens")
    return (first, last), tuple(notes)
