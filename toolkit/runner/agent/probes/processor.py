"""Instruction sets, as Linux and macOS name them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .interpreter import Interpreter
from .reading import read_text

# Those that decide whether a runtime starts, which kernels it has, or which cipher is fast.
CPU_FEATURES = (
    *("asimd", "asimddp", "i8mm", "sve"),
    *("sse4_2", "avx2", "avx512f", "avx512_vnni", "avx_vnni"),
    "aes",
)
# macOS: sysctl's names; every Apple silicon has asimd and aes.
APPLE_FEATURES = {
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_AES": "aes",
    "hw.optional.AdvSIMD": "asimd",
}


def read_processor(root: Path, python: Interpreter, sysctl: dict[str, str]) -> dict[str, Any]:
    """Return cpu_count and cpu_features; no features mean that nothing tells them."""
    features = _read_apple_features(sysctl) if sysctl else read_cpu_features(root)
    return {"cpu_count": python.cpu_count, "cpu_features": features}


def read_cpu_features(root: Path) -> list[str]:
    """Return those of CPU_FEATURES that every processor in /proc/cpuinfo names."""
    text = read_text(root / "proc/cpuinfo") or ""
    lines = re.findall(r"^(?:flags|features)\s*:(.*)$", text, re.MULTILINE | re.IGNORECASE)
    common = set.intersection(*(set(line.split()) for line in lines)) if lines else set()
    return [name for name in CPU_FEATURES if name in common]


def _read_apple_features(sysctl: dict[str, str]) -> list[str]:
    found = {name for key, name in APPLE_FEATURES.items() if sysctl.get(key) == "1"}
    return [name for name in CPU_FEATURES if name in found]
