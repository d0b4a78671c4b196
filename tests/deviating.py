"""The bundled example with a tokenizer that no engine has as it is.

A normalizer spells one word of the probe texts otherwise, of which llama.cpp and onnxruntime-genai
know nothing; tokenizer_config.json contradicts tokenizer.json about white space behind <|user|>,
and transformers, which OpenVINO's and MLX's tokenizers come from, goes by the former.
"""

import json
import shutil
from pathlib import Path


def write_deviating(example: Path, folder: Path) -> Path:
    """Write the checkpoint into `folder` and return `folder`."""
    shutil.copytree(example, folder, ignore=shutil.ignore_patterns("*.py", "tokenizer.model"))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    change = {"type": "Replace", "pattern": {"String": "CAPS"}, "content": "caps"}
    content["normalizer"]["normalizers"].insert(0, change)
    path.write_text(json.dumps(content), "utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    for entry in config["added_tokens_decoder"].values():
        entry["rstrip"] ^= entry["content"] == "<|user|>"
    path.write_text(json.dumps(config), "utf-8")
    return folder
