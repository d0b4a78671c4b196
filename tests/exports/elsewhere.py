"""Artifacts as others publish them, made of the example's, whole and damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.adopt import Wish, adopt
from toolkit.artifact import MANIFEST
from toolkit.console import Console
from toolkit.report import Report

Change = Callable[[Path], object]

OWN_FILES = (MANIFEST, "Modelfile", "llamaedge.sh")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PUBLISHED = "phi3-mini-4k-instruct-cpu-int4-rtn-block-32-acc-level-4.onnx"


def strip(artifact: Path, folder: Path) -> Path:
    """A copy without what phiship adds."""
    shutil.copytree(artifact, folder)
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def publish_onnx(artifact: Path, folder: Path) -> Path:
    """The layout of microsoft/Phi-3-mini-4k-instruct-onnx: names of files, two levels down."""
    import onnx

    home = folder / "cpu_and_mobile" / "cpu-int4-rtn-block-32-acc-level-4"
    strip(artifact, home)
    model = onnx.load(str(home / "model.onnx"), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{PUBLISHED}.data"
    (home / "model.onnx").unlink()
    (home / PUBLISHED).write_bytes(model.SerializeToString())
    (home / "model.onnx.data").rename(home / f"{PUBLISHED}.data")

    def change(config: dict[str, Any]) -> None:
        config["model"]["decoder"]["filename"] = PUBLISHED

    edit(home / "genai_config.json", change)
    (folder / "README.md").write_text("# Phi-3\n")
    return home


def write_genie(example: Path, folder: Path) -> Path:
    """A bundle as Qualcomm AI Hub exports it; its binaries are noise, for no host can run them."""
    folder.mkdir(parents=True)
    shutil.copyfile(example / "tokenizer.json", folder / "tokenizer.json")
    names = [f"phi_3_5_mini_instruct_part_{part}_of_2.bin" for part in (1, 2)]
    for name in names:
        (folder / name).write_bytes(b"\x02" * 5000)
    (folder / "htp_backend_ext_config.json").write_text('{"devices": []}')
    backend = {
        "version": 1,
        "type": "QnnHtp",
        "QnnHtp": {"version": 1, "use-mmap": True, "poll": True, "kv-dim": 64},
        "extensions": "htp_backend_ext_config.json",
    }
    model = {"version": 1, "type": "binary", "binary": {"version": 1, "ctx-bins": names}}
    dialog = {
        "version": 1,
        "type": "basic",
        "context": {
            "version": 1, "size": 512, "n-vocab": 2048, "bos-token": 1, "eos-token": [1984, 1991],
        },
        "sampler": {"version": 1, "seed": 42, "temp": 0.8, "top-k": 40, "top-p": 0.95},
        "tokenizer": {"version": 1, "path": "tokenizer.json"},
        "engine": {"version": 1, "n-threads": 3, "backend": backend, "model": model},
    }  # fmt: skip
    (folder / "genie_config.json").write_text(json.dumps({"dialog": dialog}))
    return folder


def take(path: Path, out: Path, **wish: Any) -> Path:
    """Adopt."""
    return adopt(path, out, Wish(**wish), Console(as_json=True), Report("adopt"))


def drop(name: str) -> Change:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def cut(name: str, count: int = 1000) -> Change:
    """Take away a file's last bytes."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def put(name: str, *path: str, value: object) -> Change:
    """Set a key of a JSON file."""

    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return lambda folder: edit(folder / name, change)


def rewrite_gguf(source: Path, target: Path, **changes: Any) -> Path:
    """The metadata of a GGUF file, changed key by key (dots as __), without its tensors."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = changes.pop("architecture", "phi3")
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = changes.pop(name.replace(".", "__"), field.contents())
        if value is not None:
            kind, *inner = field.types
            writer.add_key_value(name, value, kind, inner[0] if inner else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    assert not changes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
