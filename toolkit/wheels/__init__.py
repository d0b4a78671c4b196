"""Runtimes for devices without internet: their wheels are chosen and fetched here, and pushed.

tags.py says what a device takes, pip.py fetches, resolve.py chooses with the device's markers, and
collect.py keeps what was chosen, so that a second deploy needs no network.
"""

import hashlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from toolkit.artifact import Runtime
from toolkit.device import EngineFacts, Facts


@dataclass(frozen=True)
class Wheel:
    """A wheel on this machine; `name` in its normal form, lower case with dashes."""

    name: str
    version: str
    path: Path
    sha256: str
    size_bytes: int

    @property
    def file_name(self) -> str:
        """The name that an installer has to see: it says for whom the wheel is."""
        return self.path.name


@dataclass(frozen=True)
class WheelSet:
    """A runtime's wheels with all it depends on, and the pip that installs them."""

    id: str
    wheels: tuple[Wheel, ...]
    pip: Wheel

    @property
    def files(self) -> dict[str, str]:
        """Every file's sha256 by name, pip's too: what the device is asked to install."""
        return {wheel.file_name: wheel.sha256 for wheel in (*self.wheels, self.pip)}

    @property
    def size_bytes(self) -> int:
        """What has to be sent when the device has none of it."""
        return sum(wheel.size_bytes for wheel in (*self.wheels, self.pip))

    @property
    def installed_bytes(self) -> int:
        """What the wheels take once they are unpacked."""
        return sum(
            entry.file_size
            for wheel in self.wheels
            for entry in zipfile.ZipFile(wheel.path).infolist()
        )


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """A runtime that is on a device: its packages' versions, and whether its Python still runs."""

    packages: dict[str, str]
    python: str
    python_version: str
    usable: bool


def name_runtime(package: str, version: str, wheels: tuple[Wheel, ...], facts: Facts) -> str:
    """Return a runtime's id; it covers the content of the wheels and the Python they are for."""
    hashes = sorted(wheel.sha256 for wheel in wheels)
    digest = hashlib.sha256("\n".join([facts.python_path, facts.python, *hashes]).encode())
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{package}-{version}")
    return f"{safe}-{digest.hexdigest()[:12]}"


def find_fitting(installed: Mapping[str, Installed], runtime: Runtime, facts: Facts) -> str | None:
    """Return the id of a runtime on the device with the engine's version and all; None without."""
    package, companions = canonicalize_name(runtime.package), runtime.companions
    for name, found in installed.items():
        is_same_python = (found.python, found.python_version) == (facts.python_path, facts.python)
        version = found.packages.get(package, "")
        is_whole = found.usable and all(_is_met(one, found.packages) for one in companions)
        if is_whole and is_same_python and is_same_version(version, runtime.version):
            return name
    return None


def _is_met(companion: str, packages: Mapping[str, str]) -> bool:
    """Tell whether a package, given as a name or as name>=version, is among those installed."""
    wanted = Requirement(companion)
    version = packages.get(canonicalize_name(wanted.name))
    return version is not None and wanted.specifier.contains(version, prereleases=True)


def fits(engine: EngineFacts | None, runtime: Runtime) -> bool:
    """Tell whether an engine that is there already is the one the artifact was checked with.

    With all that the artifact needs beside it, as far as that is known.
    """
    return (
        engine is not None
        and not engine.list_missing(runtime.companions)
        and engine.importable
        and engine.package == runtime.package
        and is_same_version(engine.version, runtime.version)
    )


def is_same_version(found: str, wanted: str) -> bool:
    """Compare what a module says of itself with a package's version; a build's name is no part."""
    return _read_version(found) == _read_version(wanted) is not None


def _read_version(text: str) -> Version | None:
    """Read 0.18.0, 0.18.0+cu12, and 2026.4.1.0-3408-ab01d17, whose end no standard knows."""
    for candidate in (text, text.partition("-")[0]):
        try:
            return Version(Version(candidate).public)
        except InvalidVersion:
            continue
    return None
