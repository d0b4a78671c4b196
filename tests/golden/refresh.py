"""Make every digest again from the vendors' own tools, in the environments of `phiship vendor`.

    python -m tests.golden.refresh

Run by `make test-vendor`, after the live comparisons; `git diff tests/golden` then shows what the
vendors write differently.
"""

import subprocess
import sys

from toolkit import formats
from toolkit.formats.gguf.vendor import LLAMA_CPP
from toolkit.vendor import python_of
from toolkit.vendor.environment import locate


def main() -> None:
    """Run every make_*.py of a vendor with its environment's Python."""
    for name in ("onnx", "openvino", "mlx", "gguf"):
        folder = locate(formats.get_vendor(name).VENDOR).folder
        arguments = {
            "mlx": [],  # mlx-lm is in this environment too
            "gguf": [str(python_of(folder)), str(folder / LLAMA_CPP)],
        }.get(name, [str(python_of(folder))])
        print(f"{name}:", flush=True)
        subprocess.run([sys.executable, "-m", f"tests.golden.make_{name}", *arguments], check=True)


if __name__ == "__main__":
    main()
