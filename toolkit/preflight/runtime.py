"""The engine: whether it imports there, or whether wheels of it fit system and Python."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.artifact import Manifest
from toolkit.device import EngineFacts, Facts, read_version
from toolkit.preflight.finding import Finding, join_version
from toolkit.wheels import is_same_version

OLDEST_PYTHON = (3, 9)
PYTHON_ADVICE = (
    "install a newer Python there, where the system offers one beside its own (apt install "
    "python3.11 python3.11-venv), and name it with `python:` in devices.yaml"
)
ANOTHER_PYTHON = "name the Python that has it with `python:` in devices.yaml"


@dataclass(frozen=True)
class Floor:
    """The oldest C library (of macOS: the oldest system) and Python that wheels are built for."""

    system: tuple[int, int]
    python: tuple[int, int]


# Tags of the wheels on PyPI, asked with pip on 2026-11-21 for onnxruntime-genai 0.18.0,
# openvino-genai 2026.4.1, xllamacpp 2026.10.11549, mlx 0.32.4; of all that a package pulls in, the
# most demanding wheel counts. Python 3.10 gets an older onnxruntime-genai, 0.11.4, which was not
# built for it on ARM Linux.
WHEELS = {
    "onnxruntime-genai": {
        "x86_64": Floor((2, 28), (3, 10)),
        "aarch64": Floor((2, 28), (3, 11)),
        "arm64": Floor((14, 0), (3, 10)),
    },
    "onnxruntime-genai-cuda": {
        "x86_64": Floor((2, 28), (3, 10)),
        "aarch64": Floor((2, 34), (3, 11)),
    },
    "openvino-genai": {
        "x86_64": Floor((2, 28), (3, 10)),
        "aarch64": Floor((2, 35), (3, 10)),
        "arm64": Floor((11, 0), (3, 10)),
    },
    "xllamacpp": {
        "x86_64": Floor((2, 17), (3, 10)),
        "aarch64": Floor((2, 17), (3, 10)),
        "arm64": Floor((13, 0), (3, 10)),
    },
    "mlx-lm": {
        "x86_64": Floor((2, 35), (3, 10)),
        "aarch64": Floor((2, 35), (3, 10)),
        "arm64": Floor((14, 0), (3, 10)),
    },
}


def check_python(facts: Facts, package: str) -> Finding:
    """Python is new enough for the agent, and for wheels of a package that is still to come."""
    needed, who = OLDEST_PYTHON, "phiship"
    floor = WHEELS.get(package, {}).get(facts.arch)
    if floor and not (facts.engine and facts.engine.importable):
        needed, who = max((floor.python, package), (OLDEST_PYTHON, "phiship"))
    text = f"Python {facts.python}; {who} needs {join_version(needed)} or newer"
    if facts.python_version >= needed:
        return Finding("python", "ok", text)
    return Finding("python", "refused", text, PYTHON_ADVICE)


def check_engine(facts: Facts, manifest: Manifest, *, installs: bool) -> Finding:
    """The engine imports, or there are wheels of it; how its import ended, when it is there."""
    engine, runtime = facts.engine, manifest.runtime
    wheels = check_wheels(facts, runtime.package)
    is_brought = installs and wheels.verdict != "refused"
    if engine is not None and engine.importable:
        missing = engine.list_missing(runtime.companions)
        if missing and not is_brought:
            return _explain_missing(facts, engine, missing)
        if is_same_version(engine.version, runtime.version) or not engine.version:
            text = f"{engine.package} {engine.version} can be imported"
            rest = f"; {' and '.join(missing)} beside it comes with this push" if missing else ""
            return Finding("engine", "ok", text + rest)
        text = f"{engine.package} {engine.version} is there; it was checked with {runtime.version}"
        return Finding("engine", "ok" if is_brought else "warning", text)
    if engine is None:
        return wheels
    if engine.is_installed:
        return _explain_import(facts, engine, is_replaced=is_brought)
    if wheels.verdict == "refused" or installs:
        return _check_venv(facts, wheels)
    return Finding(
        "engine",
        "refused",
        f"{facts.python_path} cannot import {engine.module}: {engine.error}",
        f"install it on the device: {facts.python_path} -m pip install "
        f"{runtime.package}=={runtime.version}, or {ANOTHER_PYTHON}",
    )


def _explain_missing(facts: Facts, engine: EngineFacts, missing: Sequence[str]) -> Finding:
    """An engine that is there without what the artifact needs beside it."""
    return Finding(
        "engine",
        "refused",
        f"{engine.package} {engine.version} can be imported, and {' and '.join(missing)}, which "
        f"this artifact needs beside it, is missing in {facts.python_path}",
        f"install it on the device: {facts.python_path} -m pip install "
        f"{' '.join(map(shlex.quote, missing))}, or "
        f"{ANOTHER_PYTHON}",
    )


def _explain_import(facts: Facts, engine: EngineFacts, *, is_replaced: bool) -> Finding:
    """An engine that is there and fails; no obstacle when this push brings another."""
    if engine.signal:
        text = (
            f"importing {engine.module} is killed by {engine.signal}: its wheel uses "
            "instructions that this processor lacks, or is damaged"
        )
        advice = f"install another version of {engine.package} there"
        return Finding("engine", "warning" if is_replaced else "refused", text, advice)
    text = f"{facts.python_path} cannot import {engine.module}: {engine.error}"
    if "shared object" in engine.error:  # which no other wheel brings either
        advice = "install that library on the device: libgomp.so.1 is in libgomp1 of Debian"
        return Finding("engine", "refused", text, advice)
    advice = f"repair it there, or {ANOTHER_PYTHON}"
    return Finding("engine", "warning" if is_replaced else "refused", text, advice)


def _check_venv(facts: Facts, wheels: Finding) -> Finding:
    """A runtime that is still to come needs a virtual environment; pip is not needed."""
    if facts.has_venv is not False or wheels.verdict == "refused":
        return wheels
    return Finding(
        "engine",
        "refused",
        f"{facts.python_path} has no module venv, which installing a runtime needs",
        "install it there (apt install python3-venv)",
    )


def check_wheels(facts: Facts, package: str) -> Finding:
    """There are wheels for this machine and C library (of a Mac: system)."""
    floors = WHEELS.get(package)
    if floors is None:
        return Finding("wheels", "warning", f"nothing is known of the wheels of {package}")
    floor = floors.get(facts.arch)
    where = "macOS" if facts.system == "Darwin" else "Linux"
    if floor is None or (facts.system == "Darwin") != (facts.arch == "arm64"):
        text = f"there are no wheels of {package} for {where} on {facts.machine}"
        return Finding("wheels", "refused", text)
    name, _, _ = facts.libc.partition(" ")
    if facts.system != "Darwin" and name not in ("glibc", ""):
        needed = f"glibc {join_version(floor.system)} or newer is needed"
        text = f"the C library is {facts.libc}; {package} has no wheels for it: {needed}"
        return Finding("wheels", "refused", text, _advise_libc(facts, package))
    return _compare_floor(facts, package, floor)


def _compare_floor(facts: Facts, package: str, floor: Floor) -> Finding:
    is_mac = facts.system == "Darwin"
    mac_version = read_version((facts.system_version or "").partition(" ")[2])
    found = mac_version if is_mac else facts.libc_version
    text = (
        f"{'macOS' if is_mac else 'glibc'} {join_version(found) or 'of unknown version'}; "
        f"{package} needs {join_version(floor.system)} or newer"
    )
    if not found:
        return Finding("wheels", "warning", text)
    if found >= floor.system:
        return Finding("wheels", "ok", text)
    return Finding("wheels", "refused", text, _advise_libc(facts, package))


def _advise_libc(facts: Facts, package: str) -> str:
    if facts.libc == "bionic":
        return (
            "install a Debian in Termux (proot-distro) and push to an sshd of that, or build "
            f"{package} in Termux and name the Python that has it with `python:` in devices.yaml"
        )
    if facts.libc.startswith("musl"):
        return "take a system or a container image with glibc (Debian 12 has 2.36)"
    if facts.jetson:
        return "update the board: JetPack 6 has glibc 2.35"
    if facts.system == "Darwin":
        return "update macOS"
    return "update the device's system to one with a newer glibc (Debian 12 has 2.36)"
