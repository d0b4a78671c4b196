"""An ONNX folder for onnxruntime-genai, as Microsoft's model builder writes it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.adopt.found import (
    CONFIGS,
    Found,
    Given,
    descend,
    find_chat,
    list_tokenizer,
    read_config_file,
    read_ids,
    resolve_beside,
)
from toolkit.checkpoint.config import Config
from toolkit.errors import ArtifactError, UnsupportedError, require
from toolkit.formats.onnx import OVERHEAD_BYTES

CONFIG = "genai_config.json"
TYPES = ("phi3",)
PROVIDERS = {"cpu": "onnxruntime-genai", "cuda": "onnxruntime-genai-cuda"}


def inspect(given: Given) -> Found:
    """Read and check the folder; ArtifactError names file, key, found and allowed."""
    model = descend(read_config_file(given.path / CONFIG), "model")
    _check_type(model)
    decoder = descend(model, "decoder")
    vocab = model.integer("vocab_size")
    provider = given.choose_provider((_read_provider(decoder),))
    main = resolve_beside(given.path, decoder.fields.get("filename"), f"{decoder.where}.filename")
    graph = _load_graph(main)
    data = _list_data(graph, main)
    cache = _cache_bytes(graph, decoder, main)
    chat, notes = find_chat(given, read_ids(model, "eos_token_id", vocab), vocab)
    context = given.choose_context(model.integer("context_length"), f"{given.path / CONFIG}")
    configs = {n: given.path / n for n in CONFIGS if (given.path / n).is_file()}
    named = {path.relative_to(given.path).as_posix(): path for path in (main, *data)}
    return Found(
        format="onnx",
        engine="onnxruntime_genai",
        provider=provider,
        package=PROVIDERS[provider],
        main_file=main.relative_to(given.path).as_posix(),
        files={CONFIG: given.path / CONFIG, **named, **list_tokenizer(given), **configs},
        chat=chat,
        context_length=context,
        valid_context=(1, context),
        data_bytes=sum(path.stat().st_size for path in named.values()),
        kv_bytes_per_token=cache,
        overhead_bytes=OVERHEAD_BYTES[provider],
        notes=(*notes, *_note_adapters(given.path)),
    )


def _note_adapters(folder: Path) -> Iterator[str]:
    """What to know of files that are not taken over: which of them is meant, nothing says."""
    for path in sorted(folder.glob("*.onnx_adapter")):
        yield f"{path.name} was left out: this is the model without that adapter"


def _check_type(model: Config) -> None:
    if (found := model.fields.get("type")) not in TYPES:
        raise UnsupportedError(
            f"{model.where}.type: got {found!r}; supported: {', '.join(TYPES)} "
            "(Phi-3-mini, Phi-3-medium, Phi-3.5-mini)"
        )
    for part in ("vision", "speech", "embedding"):
        if part in model.fields:
            raise UnsupportedError(f"{model.where}.{part}: supported are models of text alone")


def _read_provider(decoder: Config) -> str:
    """The provider the config asks for; onnxruntime-genai takes the CPU when it names none."""
    options = descend(decoder, "session_options").fields.get("provider_options", [])
    where = f"{decoder.where}.session_options.provider_options"
    if not isinstance(options, list) or not all(isinstance(one, dict) for one in options):
        raise ArtifactError(f"{where}: got {options!r}; allowed a list of objects")
    names = [name.lower() for one in options for name in one]
    provider = names[0] if names else "cpu"
    if provider not in PROVIDERS:
        raise UnsupportedError(
            f"{where}: got {provider!r}; supported: {', '.join(PROVIDERS)}",
            advice="take the folder that was made for one of these",
        )
    return provider


def _load_graph(main: Path) -> Any:
    onnx = require("onnx")
    try:
        return onnx.load(str(main), load_external_data=False).graph
    except Exception as error:  # protobuf's DecodeError, which is not to be imported here
        raise ArtifactError(f"{main}: not an ONNX graph: {error}") from error


def _list_data(graph: Any, main: Path) -> list[Path]:
    """Files that hold weights of the graph; ArtifactError when one is missing or too short."""
    ends: dict[Path, int] = {}
    for tensor in _list_external(graph):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        path = resolve_beside(main.parent, entries.get("location"), f"{main}: {tensor.name}")
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        ends[path] = max(ends.get(path, 0), end)
    for path, end in ends.items():
        if path.stat().st_size < end:
            raise ArtifactError(
                f"{path}: found {path.stat().st_size} bytes; {main.name} reads {end}",
                advice="copy or download this file again",
            )
    return sorted(ends)


def _list_external(graph: Any) -> Iterator[Any]:
    external = require("onnx").TensorProto.EXTERNAL
    constants = (item.t for node in graph.node for item in node.attribute if item.HasField("t"))
    for tensor in (*graph.initializer, *constants):
        if tensor.data_location == external:
            yield tensor


def _cache_bytes(graph: Any, decoder: Config, main: Path) -> int:
    """Bytes a token adds to the cache: of the graph's own inputs, compared with the config."""
    onnx = require("onnx")
    layers, heads = (
        decoder.integer(f"num_{what}") for what in ("hidden_layers", "key_value_heads")
    )
    names = descend(decoder, "inputs").fields
    inputs = {one.name: one.type.tensor_type for one in graph.input}
    total = 0
    for layer in range(layers):
        for kind in ("key", "value"):
            pattern = str(names.get(f"past_{kind}_names", ""))
            name = pattern.replace("%d", str(layer))
            if name not in inputs:
                raise ArtifactError(
                    f"{decoder.where}.inputs.past_{kind}_names: got {pattern!r}; {main.name} has "
                    f"no input {name!r}"
                )
            shape = [dimension.dim_value for dimension in inputs[name].shape.dim]
            width = decoder.integer("head_size")
            if len(shape) != 4 or shape[1] != heads or shape[3] != width:
                raise ArtifactError(
                    f"{main}: {name}: found shape {shape}; {decoder.where} says {heads} heads of "
                    f"{width}"
                )
            dtype = onnx.helper.tensor_dtype_to_np_dtype(inputs[name].elem_type)
            total += heads * width * int(dtype.itemsize)
    return total
