"""GPUs and NPUs by the files they leave: no driver is loaded, nothing is imported."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .interpreter import Interpreter
from .reading import Run, list_paths, read_text

INTEL = "0x8086"
# Jetson Linux (L4T) major version -> JetPack, from NVIDIA's archive of both.
JETPACKS = {32: 4, 34: 5, 35: 5, 36: 6, 38: 7, 39: 7}


def read_accelerators(
    root: Path, run: Run, python: Interpreter, sysctl: dict[str, str]
) -> dict[str, Any]:
    """Return accelerators, jetson and cuda."""
    found = _list_intel(root)
    if sysctl and python.machine == "arm64":
        # Metal comes with the chip; there is no other GPU in such a Mac.
        chip = sysctl.get("machdep.cpu.brand_string", "")
        found.append({"kind": "metal", "name": chip, "is_accessible": True})
    jetson = _read_jetson(root, run)
    driver = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _nvidia_driver(root))
    if jetson or driver:
        name = f"driver {driver.group(1)}" if driver else "Tegra"
        found.append({"kind": "nvidia", "name": name, "is_accessible": True})
    return {"accelerators": found, "jetson": jetson, "cuda": read_cuda(root)}


def _nvidia_driver(root: Path) -> str:
    return (read_text(root / "proc/driver/nvidia/version") or "").partition("\n")[0] + " "


def _list_intel(root: Path) -> list[dict[str, Any]]:
    """Return Intel's GPUs and NPUs; a Raspberry Pi has render nodes too, of another vendor."""
    found = []
    for kind, device, system, pattern in (
        ("intel_gpu", "dev/dri", "sys/class/drm", "renderD*"),
        ("intel_npu", "dev/accel", "sys/class/accel", "accel*"),
    ):
        for node in list_paths(root / device, pattern):
            vendor = read_text(root / system / node.name / "device/vendor") or ""
            if vendor.strip() == INTEL:
                is_accessible = os.access(node, os.R_OK | os.W_OK)
                found.append({"kind": kind, "name": node.name, "is_accessible": is_accessible})
    return found


def _read_jetson(root: Path, run: Run) -> dict[str, Any] | None:
    """Return l4t, jetpack and power_mode; None on what is no Jetson.

    /etc/nv_tegra_release begins: # R36 (release), REVISION: 4.3, GCID: ...
    """
    text = read_text(root / "etc/nv_tegra_release") or ""
    release = re.search(r"# R(\d{1,3}) \(release\), REVISION: (\d{1,3}(?:\.\d{1,3})*)", text)
    if release is None:
        return None
    mode = re.search(r"NV Power Mode: *(\S+)", run(["nvpmodel", "-q"]) or "")
    return {
        "l4t": f"{release.group(1)}.{release.group(2)}",
        "jetpack": JETPACKS.get(int(release.group(1))),
        "power_mode": mode.group(1) if mode else None,
    }


def read_cuda(root: Path) -> str | None:
    """Return the version of the CUDA toolkit in its usual place, or of its run time library."""
    folder = root / "usr/local/cuda"
    text = read_text(folder / "version.json") or ""
    found = re.search(r'"cuda"\s*:\s*\{[^{}]*"version"\s*:\s*"([0-9.]+)"', text)
    found = found or re.search(r"CUDA Version ([0-9.]+)", read_text(folder / "version.txt") or "")
    if found:
        return found.group(1)
    libraries = list_paths(root / "usr/local", "cuda*/lib64/libcudart.so.*")
    libraries += list_paths(root / "usr/lib", "*-linux-gnu/libcudart.so.*")
    versions = [path.name.partition(".so.")[2] for path in libraries]
    return max(versions, key=len, default=None)
