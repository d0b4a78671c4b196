"""Make onnx.json: digests of the weights that onnxruntime-genai's own builder writes.

    python -m tests.golden.make_onnx BUILDER_PYTHON

BUILDER_PYTHON is a Python with onnxruntime-genai, onnx, torch and transformers. The digests are
keyed by variant, scheme and this project's name of the initializer.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx

from tests.golden.digests import write_digests

GOLDEN = Path(__file__).with_name("onnx.json")
# scheme -> precision, provider and extra options of the builder
SCHEMES = {
    "cpu-int4": ("int4", "cpu", ["block_size=32", "accuracy_level=4"]),
    "cpu-int4-asym": ("int4", "cpu", ["block_size=32", "accuracy_level=4", "is_symmetric=false"]),
    "cpu-int4-block128": ("int4", "cpu", ["block_size=128", "accuracy_level=4"]),
    "cpu-fp32": ("fp32", "cpu", []),
    "cuda-int4": ("int4", "cuda", ["block_size=32"]),
    "cuda-fp16": ("fp16", "cuda", []),
}


def digest_initializers(folder: Path) -> dict[str, str]:
    """Short sha256 of each initializer's bytes, by this project's names."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    return {
        rename(tensor.name): digest_tensor(tensor, folder) for tensor in model.graph.initializer
    }


def digest_tensor(tensor: Any, folder: Path) -> str:
    """The first 16 hex digits of the sha256 of an initializer's bytes."""
    array = onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def rename(name: str) -> str:
    """The builder's name of an initializer as this project writes it."""
    parts = name.replace(".MatMul.weight", ".weight").split(".")
    if "final_norm_layernorm" in parts:
        return "model.norm.weight"
    return ".".join(parts)


def build(python: str, checkpoint: Path, scheme: str, work: Path) -> Path:
    """Run the vendor's builder; returns its folder."""
    precision, provider, options = SCHEMES[scheme]
    out = work / f"{checkpoint.name}-{scheme}"
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint)]
    command += ["-o", str(out), "-p", precision, "-e", provider, "-c", str(work / "cache")]
    command += ["--extra_options", *options] if options else []
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return out


def main() -> None:
    """Build every variant in every scheme and write the digests."""
    python = sys.argv[1]
    show = "import onnxruntime_genai as g, onnxruntime as o; print(g.__version__, o.__version__)"
    versions = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True)
    genai, runtime = versions.stdout.split()
    write_digests(
        GOLDEN,
        "python -m tests.golden.make_onnx BUILDER_PYTHON",
        {"onnxruntime-genai": genai, "onnxruntime": runtime},
        SCHEMES,
        lambda checkpoint, scheme, work: digest_initializers(
            build(python, checkpoint, scheme, work)
        ),
    )


if __name__ == "__main__":
    main()
