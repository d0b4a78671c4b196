"""Refresh the vendors' lock files from their .in files: every package, every version, every system.

    python -m tests.vendor.make_locks UV [NAME ...] [--upgrade] [UV OPTION ...]

UV is the program uv (pip install uv). On Linux it needs an index that has torch's CPU builds, by
UV_EXTRA_INDEX_URL with --index-strategy unsafe-best-match, or --find-links FOLDER with the wheels.
What is pinned stays unless --upgrade is given.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from toolkit.vendor import LOCKS

NAMES = ("onnx", "openvino", "mlx", "gguf")
# The Pythons for which every pinned package has a wheel on x86-64 Linux.
FIRST_PYTHON, LAST_PYTHON = "3.11", "3.13"
# optimum-intel requires torchvision and an export never imports it; the build on PyPI does not load
# beside a CPU torch.
LEFT_OUT = "torchvision"
HEAD = (
    f"# python: {FIRST_PYTHON} to {LAST_PYTHON}",
    "# Made by: python -m tests.vendor.make_locks UV (its docstring says how)",
)


def make_lock(uv: str, name: str, options: list[str]) -> str:
    """The lock's text."""
    source, lock = LOCKS / f"{name}.in", LOCKS / f"{name}.txt"
    command = [uv, "pip", "compile", "--quiet", "--universal", "--no-annotate", "--no-header"]
    command += ["--python-version", FIRST_PYTHON, "--no-emit-package", LEFT_OUT, *options]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / lock.name
        if lock.is_file():
            shutil.copyfile(lock, made)  # uv keeps the versions it finds in its output file
        subprocess.run([*command, "--output-file", str(made), str(source)], check=True)
        lines = made.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith(("#", "-"))]
    return "\n".join([*HEAD, *(pin for pin in pins if not pin.startswith("torch=="))]) + "\n"


def make_torch_lock() -> str:
    """torch.txt: the same for all that use it; pip takes its CPU build where an index has one."""
    return "\n".join([*HEAD, (LOCKS / "torch.in").read_text(encoding="utf-8")])


def main() -> None:
    """Refresh the named locks, or all."""
    uv, *words = sys.argv[1:]
    names = [word for word in words if word in NAMES]
    options = [word for word in words if word not in NAMES]
    (LOCKS / "torch.txt").write_text(make_torch_lock(), encoding="utf-8")
    for name in names or NAMES:
        text = make_lock(uv, name, options)
        (LOCKS / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(text.splitlines()) - 2} lines")


if __name__ == "__main__":
    main()
