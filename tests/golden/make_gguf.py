"""Make gguf.json: digests of what llama.cpp's converter and llama-quantize write.

    python -m tests.golden.make_gguf CONVERT_PYTHON LLAMA_CPP

CONVERT_PYTHON is a Python that runs LLAMA_CPP/convert_hf_to_gguf.py (torch, transformers,
sentencepiece); LLAMA_CPP/build/bin/llama-quantize is built. Checkpoints are converted to bf16,
which loses nothing, and quantized from there; f16 is the converter's own.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf

from tests.bytelevel import write_phi4_checkpoint
from tests.formats.gguf_cases import CASES, write_case

GOLDEN = Path(__file__).with_name("gguf.json")
CONVERTED = ("bf16", "f16")
QUANTIZED = ("q4_0", "q8_0", "q4_k_m", "q5_k_m", "q6_k", "iq4_xs")
# A deep checkpoint is there for the mixes alone.
MIXES = ("q4_k_m", "q5_k_m", "iq4_xs")
# Embedding and head in a type of their own.
WITH_ENDS = {"mha": ("q4_k_m+q8_0", "q4_0+iq4_nl", "iq4_xs+q4_k")}
# Cases whose metadata is kept: plain, LongRoPE, window.
WITH_METADATA = ("mha", "longrope_gqa", "window")
# The converter knows a byte-level BPE by the ids it gives to a text, hence the published one only:
# it is told what it says of Phi-4-mini's.
CONVERT_BYTE_LEVEL = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
script, sys.argv = sys.argv[1] + "/convert_hf_to_gguf.py", sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def digest_tensors(path: Path) -> dict[str, str]:
    """Type and short sha256 of each tensor's bytes."""
    return {
        tensor.name: f"{tensor.tensor_type.name} {digest(tensor.data.tobytes())}"
        for tensor in gguf.GGUFReader(path).tensors
    }


def read_metadata(path: Path) -> dict[str, Any]:
    """Every key's type and value; arrays as length and short sha256 of their JSON."""
    fields = gguf.GGUFReader(path).fields.items()
    return {
        name: [field.types[-1].name, _shorten(field.contents())]
        for name, field in fields
        if not name.startswith("GGUF.")
    }


def digest(content: bytes) -> str:
    """The first 16 hex digits of the sha256."""
    return hashlib.sha256(content).hexdigest()[:16]


def _shorten(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return {"length": len(value), "sha256": digest(json.dumps(value).encode())}


def run(*command: object) -> str:
    """Run a command; its standard output."""
    done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    return done.stdout


def convert_byte_level(python: str, llama_cpp: Path, work: Path) -> dict[str, Any]:
    """Metadata of a checkpoint with Phi-4-mini's kind of tokenizer, as the converter writes it."""
    checkpoint, out = write_phi4_checkpoint(work / "byte-level"), work / "byte-level.gguf"
    run(python, "-c", CONVERT_BYTE_LEVEL, llama_cpp, checkpoint, "--outtype", "f16",
        "--outfile", out)  # fmt: skip
    return read_metadata(out)


def main() -> None:
    """Convert and quantize every case and write the digests."""
    python, llama_cpp = sys.argv[1], Path(sys.argv[2])
    quantize = llama_cpp / "build" / "bin" / "llama-quantize"
    version = re.search(r"GGML_VERSION_MAJOR (\d+)\).*?MINOR (\d+)\).*?PATCH (\d+)\)",
                        (llama_cpp / "ggml" / "CMakeLists.txt").read_text(), re.DOTALL)  # fmt: skip
    golden: dict[str, Any] = {
        "made_by": "python -m tests.golden.make_gguf CONVERT_PYTHON LLAMA_CPP",
        "versions": {"ggml": ".".join(version.groups()) if version else "unknown"},
        "metadata": {},
        "tensors": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        for case in CASES:
            checkpoint = write_case(Path(temporary) / case, case)
            tensors: dict[str, Any] = {}
            for precision in CONVERTED:
                out = Path(temporary) / f"{case}-{precision}.gguf"
                run(python, llama_cpp / "convert_hf_to_gguf.py", checkpoint,
                    "--outtype", precision, "--outfile", out)  # fmt: skip
                tensors[precision] = digest_tensors(out)
            if case in WITH_METADATA:
                golden["metadata"][case] = read_metadata(out)
            for precision in (*QUANTIZED, *WITH_ENDS.get(case, ())):
                out = Path(temporary) / f"{case}-{precision}.gguf"
                base, _, ends = precision.upper().partition("+")
                both = ["--token-embedding-type", ends, "--output-tensor-type", ends]
                run(quantize, *(both if ends else ()), Path(temporary) / f"{case}-bf16.gguf",
                    out, base, 1)  # fmt: skip
                tensors[precision] = digest_tensors(out)
            kept = MIXES if case == "deep" else tensors
            golden["tensors"][case] = {precision: tensors[precision] for precision in kept}
            print(case, flush=True)
        golden["byte_level"] = convert_byte_level(python, llama_cpp, Path(temporary))
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
