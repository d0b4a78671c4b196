"""Name the machine and the versions behind a measurement."""

import argparse
import os
import platform
import re
import subprocess
from pathlib import Path

import psutil

VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")


def describe_machine() -> str:
    """Return CPU model, cores, vector units, memory, kernel and Python on one line."""
    memory_gib = psutil.virtual_memory().total / 2**30
    return ", ".join(
        [
            f"{_cpu_model()} ({' '.join(_vector_flags()) or platform.machine()})",
            f"{os.cpu_count()} cores",
            f"{memory_gib:.0f} GiB memory",
            f"{platform.system()} {platform.release().split('-')[0]}",
            f"Python {platform.python_version()}",
        ]
    )


def describe_versions(options: argparse.Namespace) -> str:
    """Return the versions of both sides' tools, as far as `options` names them."""
    number = re.search(r"\d+\.\d+\S*", _first_line([options.phiship, "--version"]))
    versions = [f"phiship {number[0]}"] if number else []
    builder = ("onnxruntime-genai", "onnxruntime", "torch", "transformers")
    versions += _package_versions(options.builder_python, *builder)
    versions += _package_versions(options.optimum_python, "optimum-intel", "nncf", "openvino")
    versions += _package_versions(options.mlx_python, "mlx-lm", "mlx")
    if options.llama_cpp:
        quantize = options.llama_cpp / "build" / "bin" / "llama-quantize"
        commit = re.search(r"commit (\w+)", _first_line([str(quantize), "--dry-run", "-", "Q4_0"]))
        versions.append(f"llama.cpp {commit[1] if commit else '(unknown commit)'}")
    return ", ".join(versions)


def _cpu_model() -> str:
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _vector_flags() -> list[str]:
    words = set(_cpuinfo().split())
    return [flag for flag in VECTOR_FLAGS if flag in words]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text("utf-8") if path.exists() else ""


def _package_versions(python: str | None, *names: str) -> list[str]:
    if not python:
        return []
    script = (
        "import importlib.metadata as m, sys\n"
        "print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    )
    return [_first_line([python, "-c", script, *names])]


def _first_line(command: list[str]) -> str:
    """Return the first line a command prints; empty when it cannot run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
    except OSError:
        return ""
    return done.stdout.partition("\n")[0].strip()
