"""Sealed folders of random bytes: all that transfer and staging need."""

import random
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from toolkit.artifact import (
    SCHEMA,
    Chat,
    Limits,
    Manifest,
    Quality,
    Runtime,
    Smoke,
    Source,
    hash_file,
    list_files,
    write_manifest,
)
from toolkit.ssh.transfer import Blob

QUESTION = Smoke(prompt="Is anybody there?", expect="yes", max_tokens=4)


def seal_noise(
    folder: Path,
    *,
    seed: int = 0,
    size_bytes: int = 300_000,
    checked: bool = True,
    smoke: Smoke | None = QUESTION,
    memory_bytes: int = 1_000_000,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write an artifact whose weights are noise, and `more` files; it can be pushed and not run."""
    noise = random.Random(seed)
    (folder / "parts").mkdir(parents=True)
    for name, text in more.items():
        (folder / name).write_text(text)
    (folder / "model.onnx").write_bytes(noise.randbytes(1000))
    with (folder / "parts" / "model.data").open("wb") as stream:
        for start in range(0, size_bytes, 1 << 24):
            stream.write(noise.randbytes(min(1 << 24, size_bytes - start)))
    (folder / "empty.txt").write_bytes(b"")
    runtime = Runtime(
        engine="onnxruntime_genai",
        provider="cpu",
        package="onnxruntime-genai",
        version="0.11.0",
        main_file="model.onnx",
    )
    chat = Chat(
        turns={"user": ("<|user|>\n", "<|end|>\n")},
        generation="<|assistant|>\n",
        stop_ids=(3,),
        stop_texts=("<|end|>",),
    )
    manifest = Manifest(
        schema=SCHEMA,
        name=f"noise {seed}",
        format="onnx",
        plan_digest="0" * 64,
        plan={},
        source=Source(model="noise", revision="none", digest="0" * 64),
        tools={},
        runtime=runtime,
        context_length=512,
        valid_context=(1, 512),
        device_memory_bytes=memory_bytes,
        chat=chat,
        limits=Limits(),
        smoke=smoke,
        quality=Quality(checked=checked, runtime="none"),
        files=list_files(folder),
    )
    write_manifest(folder, manifest)
    return folder


def make_blob(path: Path, content: bytes) -> Blob:
    """Write a file and describe it as a blob."""
    path.write_bytes(content)
    return Blob(path.name, path, hash_file(path), len(content))
