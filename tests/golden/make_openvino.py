"""Make openvino.json: digests of the weights that optimum-intel with NNCF writes.

    python -m tests.golden.make_openvino VENDOR_PYTHON

VENDOR_PYTHON is a Python with optimum-intel, nncf, openvino, torch and transformers. The digests
are keyed by variant, scheme and this project's name of the constant. It takes about ten minutes.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.digests import write_digests
from toolkit.formats.openvino.reader import read_constants, unpack

GOLDEN = Path(__file__).with_name("openvino.json")
_INT4 = ["--weight-format", "int4", "--ratio", "1.0"]
# scheme -> options of `optimum-cli export openvino`
SCHEMES = {
    "int4": [*_INT4, "--sym", "--group-size", "128"],
    "int4-row": [*_INT4, "--sym", "--group-size", "-1"],
    "int4-everywhere": [*_INT4, "--sym", "--group-size", "32", "--all-layers"],
    "int4-asym": [*_INT4, "--group-size", "64"],
    "int4-asym-row": [*_INT4, "--group-size", "-1"],
    "int8": ["--weight-format", "int8"],
    "f16": ["--weight-format", "fp16"],
}
PACKAGES = ("nncf", "openvino", "optimum", "optimum-intel", "torch", "transformers")


def digest_constants(folder: Path) -> dict[str, str]:
    """Short sha256 of each weight, scale and zero point, by this project's names."""
    named = {rename(name): node for name, node in read_constants(folder).items()}
    return {name: digest(node) for name, node in named.items() if ".weight" in name}


def digest(constant: Any) -> str:
    """The first 16 hex digits of the sha256 of a constant's shape and values.

    Values, not bytes: every type here fits a float32, and zero points may be packed or not.
    """
    values = unpack(constant)
    content = f"{values.shape}".encode() + np.ascontiguousarray(values).tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def rename(name: str) -> str:
    """The exporter's name of a constant as this project writes it."""
    return name.removeprefix("self.").replace("._openvino_orig_weight", ".weight")


def export(python: str, checkpoint: Path, scheme: str, work: Path) -> Path:
    """Run the vendor's exporter; returns its folder."""
    out = work / f"{checkpoint.name}-{scheme}"
    command = [python, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    command += ["--model", str(checkpoint), "--task", "text-generation-with-past"]
    # CI: NNCF reports its use to an analytics service unasked, but not from CI jobs.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CI": "true"}
    subprocess.run(
        [*command, *SCHEMES[scheme], str(out)], check=True, capture_output=True, env=environment
    )
    return out


def main() -> None:
    """Export every variant in every scheme and write the digests."""
    python = sys.argv[1]
    show = f"from importlib.metadata import version; print(*map(version, {PACKAGES}))"
    versions = subprocess.run([python, "-c", show], capture_output=True, text=True, check=True)
    write_digests(
        GOLDEN,
        "python -m tests.golden.make_openvino VENDOR_PYTHON",
        dict(zip(PACKAGES, versions.stdout.split(), strict=True)),
        SCHEMES,
        lambda checkpoint, scheme, work: digest_constants(export(python, checkpoint, scheme, work)),
    )


if __name__ == "__main__":
    main()
