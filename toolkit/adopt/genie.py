"""A bundle for Qualcomm's Genie (QNN): genie_config.json, and binaries for one kind of chip.

Its keys are those of the Genie dialog configuration (Qualcomm AI Runtime SDK). What the binaries
hold cannot be seen without Qualcomm's tools.
"""

from pathlib import Path

from toolkit.adopt.found import (
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
from toolkit.errors import ArtifactError

CONFIG = "genie_config.json"
FORMAT = "genie"
BACKENDS = {"QnnHtp": "npu", "QnnGpu": "gpu", "QnnGenAiTransformer": "cpu"}
OTHER_FILES = ("sample_prompt.txt", "htp_backend_ext_config.json", "metadata.json")
NOTE = (
    "Qualcomm's own runtime (genie-t2t-run, libGenie) runs it, on the kind of chip that it was "
    "compiled for; phiship's runner does not, so it goes to a device by bundle or adb only"
)


def inspect(given: Given) -> Found:
    """Read and check the bundle; ArtifactError names file, key, found and allowed.

    The memory predicted is that of the binaries, which hold the cache too.
    """
    dialog = descend(read_config_file(given.path / CONFIG), "dialog")
    context = descend(dialog, "context")
    engine = descend(dialog, "engine")
    backend = descend(engine, "backend")
    vocab = context.integer("n-vocab")
    tokenizer = descend(dialog, "tokenizer")
    where = f"{tokenizer.where}.path"
    files = {CONFIG: given.path / CONFIG}
    needed = [resolve_beside(given.path, tokenizer.fields.get("path"), where)]
    if "extensions" in backend.fields:
        extensions = backend.fields["extensions"]
        needed.append(resolve_beside(given.path, extensions, f"{backend.where}.extensions"))
    binaries = _list_binaries(given.path, descend(engine, "model"))
    for path in (*needed, *binaries, *_list_others(given.path)):
        files[path.relative_to(given.path).as_posix()] = path
    chat, notes = find_chat(given, read_ids(context, "eos-token", vocab), vocab)
    size = context.integer("size")
    chosen = given.choose_context(size, f"{context.where}.size")
    return Found(
        format=FORMAT,
        engine=FORMAT,
        provider=_read_backend(backend),
        package=FORMAT,
        main_file=CONFIG,
        files={**list_tokenizer(given, needs=()), **files},
        chat=chat,
        context_length=chosen,
        valid_context=(1, chosen),
        data_bytes=sum(path.stat().st_size for path in binaries),
        kv_bytes_per_token=0,
        overhead_bytes=0,
        notes=(*notes, NOTE),
    )


def _read_backend(backend: Config) -> str:
    found = backend.fields.get("type")
    if found in BACKENDS:
        return BACKENDS[str(found)]
    raise ArtifactError(f"{backend.where}.type: got {found!r}; allowed {', '.join(BACKENDS)}")


def _list_binaries(folder: Path, model: Config) -> list[Path]:
    """The files that the engine loads: context binaries, or one of the GenAiTransformer."""
    kind = model.fields.get("type")
    if kind == "binary":
        binary = descend(model, "binary")
        names = binary.fields.get("ctx-bins")
        where = f"{binary.where}.ctx-bins"
        if not isinstance(names, list) or not names:
            raise ArtifactError(f"{where}: got {names!r}; allowed a list of files")
        return [resolve_beside(folder, name, f"{where}[{i}]") for i, name in enumerate(names)]
    if kind == "library":
        library = descend(model, "library")
        name = library.fields.get("model-bin")
        return [resolve_beside(folder, name, f"{library.where}.model-bin")]
    raise ArtifactError(f"{model.where}.type: got {kind!r}; allowed binary, library")


def _list_others(folder: Path) -> list[Path]:
    return [folder / name for name in OTHER_FILES if (folder / name).is_file()]
