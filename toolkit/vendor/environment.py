"""Pinned environments, one per vendor, in the user's cache folder.

An environment is a virtual environment with a stamp, written last, that holds the digest of what
it was made from; one without its stamp is not there.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from toolkit import fileio
from toolkit.console import Console
from toolkit.errors import BuildError, MissingExtraError
from toolkit.vendor import Command, Vendor, python_of
from toolkit.vendor.running import run

STAMP = "phiship-stamp.json"
PYTHONS = re.compile(r"^# python: (\d+)\.(\d+) to (\d+)\.(\d+)$", re.MULTILINE)
PROBE_TIMEOUT_S = 120
SETUP_ADVICE = (
    "is the network there, and the disk large enough? On Linux pip must be told of an index with "
    "torch's CPU builds (PIP_EXTRA_INDEX_URL; docs/vendor.md)"
)


@dataclass(frozen=True)
class Environment:
    """A finished environment: its folder, its lock's digest, and what is installed in it."""

    folder: Path
    digest: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Found:
    """What is in a vendor's place: state is ready, outdated, being made, half-made or missing."""

    state: str
    folder: Path
    size_bytes: int
    versions: dict[str, str]


def cache_folder() -> Path:
    """Where environments go: the user's cache folder, as each system has it."""
    home = Path.home()
    if sys.platform == "darwin":
        default = home / "Library" / "Caches"
    elif sys.platform == "win32":
        default = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        default = home / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "phiship" / "vendor"


def read_lock(vendor: Vendor) -> str:
    """The text of the vendor's lock file, a pip requirements file with every version pinned."""
    return (vendor.locks / f"{vendor.name}.txt").read_text(encoding="utf-8")


def digest_lock(vendor: Vendor) -> str:
    """Hex sha256 over all that decides what is installed: the locks and the extra steps."""
    digest = hashlib.sha256()
    for path in sorted({*vendor.requirements, *vendor.locks.glob(f"{vendor.name}*.txt")}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for step in vendor.steps(Path("ENVIRONMENT")):
        digest.update("\0".join(step.argv).encode() + b"\0")
    return digest.hexdigest()


def locate(vendor: Vendor) -> Environment:
    """The vendor's environment; MissingExtraError when it is missing, outdated or broken."""
    folder = cache_folder() / vendor.name
    stamp = _read_stamp(folder)
    advice = f"make it with: phiship vendor setup {vendor.name}"
    if stamp is None:
        what = "is not finished" if folder.exists() else "is missing"
        raise MissingExtraError(
            f"the environment of {vendor.title} {what}: {folder}", advice=advice
        )
    if stamp.digest != digest_lock(vendor):
        raise MissingExtraError(
            f"the environment of {vendor.title} was made from another lock file: {folder}",
            advice=advice,
        )
    if problem := _find_damage(vendor, folder):
        raise MissingExtraError(
            f"the environment of {vendor.title} is broken: {problem}",
            advice=f"make it again with: phiship vendor setup {vendor.name} --again",
        )
    return stamp


def look(vendor: Vendor) -> Found:
    """What is in the vendor's place, without running anything."""
    folder = cache_folder() / vendor.name
    stamp = _read_stamp(folder)
    if stamp is None and _read_claim(folder):
        state = "being made"
    elif stamp is None:
        state = "half-made" if folder.exists() else "missing"
    else:
        state = "ready" if stamp.digest == digest_lock(vendor) else "outdated"
    return Found(state, folder, _measure(folder), stamp.versions if stamp else {})


def setup(
    vendor: Vendor, console: Console, *, python: str = sys.executable, again: bool = False
) -> Environment:
    """Make the vendor's environment, or keep the one that is there; returns it.

    BuildError when the packages cannot be installed, MissingExtraError when `python` is not one
    the lock was made for. Until the last step is done there is no stamp, so nothing half-made is
    ever used; whatever ends this function early removes the folder as well.
    """
    if not again:
        try:
            return locate(vendor)
        except MissingExtraError:
            pass
    _check_python(vendor, python)
    folder = cache_folder() / vendor.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{vendor.name}.log")
    with _alone(folder):
        _remove(folder)
        log.write_bytes(b"")
        try:
            for command in list_steps(vendor, folder, python):
                run(command, log, console, advice=SETUP_ADVICE)
            return _stamp(vendor, folder)
        except BaseException:
            _remove(folder)
            raise


def list_steps(vendor: Vendor, folder: Path, python: str) -> tuple[Command, ...]:
    """The commands that make an environment, in order; the last one proves that it works."""
    pip = (str(python_of(folder)), "-m", "pip", "--disable-pip-version-check", "install")
    # --no-deps: the locks are complete, and leave out on purpose what would break a CPU torch.
    imports = "; ".join(f"import {module}" for module in vendor.modules)
    return (
        Command(f"make the environment of {vendor.name}", (python, "-m", "venv", str(folder))),
        *(
            Command(f"install {path.stem}", (*pip, "--no-deps", "--requirement", str(path)))
            for path in vendor.requirements
        ),
        *vendor.steps(folder),
        Command(f"try {vendor.title}", (str(python_of(folder)), "-c", imports), vendor.variables),
    )


def _check_python(vendor: Vendor, python: str) -> None:
    """The lock's pins exist for some Pythons only; ask before a gigabyte is fetched."""
    show = "import sys; print(*sys.version_info[:2])"
    try:
        done = subprocess.run(
            [python, "-I", "-c", show], capture_output=True, text=True, check=True,
            timeout=PROBE_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise MissingExtraError(f"{python}: not a Python that runs: {error}") from error
    major, minor = map(int, done.stdout.split())
    limits = PYTHONS.search(read_lock(vendor))
    if limits is None:
        return
    first, last = (int(limits[1]), int(limits[2])), (int(limits[3]), int(limits[4]))
    if not first <= (major, minor) <= last:
        raise MissingExtraError(
            f"{vendor.title} is pinned for Python {first[0]}.{first[1]} to {last[0]}.{last[1]}; "
            f"{python} is {major}.{minor}",
            advice=f"name another: phiship vendor setup {vendor.name} --python python3.12",
        )


def _find_damage(vendor: Vendor, folder: Path) -> str:
    """One clause that says what is wrong with a stamped environment; empty when nothing is."""
    for name in vendor.files:
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
    ask = (
        "import importlib.util, sys; "
        "print(*(m for m in sys.argv[1:] if importlib.util.find_spec(m) is None))"
    )
    tops = [module.partition(".")[0] for module in vendor.modules]
    try:
        done = subprocess.run(
            [python_of(folder), "-I", "-c", ask, *tops], capture_output=True, text=True,
            timeout=PROBE_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return f"{python_of(folder)} does not run: {error}"
    if done.returncode:
        return f"{python_of(folder)} does not run: {done.stderr.strip()[-200:]}"
    missing = done.stdout.split()
    return f"{', '.join(missing)} cannot be imported from {folder}" if missing else ""


def _stamp(vendor: Vendor, folder: Path) -> Environment:
    """Write the stamp durably, under a temporary name first."""
    show = (
        "import json; from importlib import metadata; "
        "print(json.dumps({d.name: d.version for d in metadata.distributions()}))"
    )
    done = subprocess.run(
        [python_of(folder), "-I", "-c", show], capture_output=True, text=True, check=True
    )
    made = Environment(folder, digest_lock(vendor), {**json.loads(done.stdout), **vendor.versions})
    content = {"digest": made.digest, "versions": made.versions}
    temporary = folder / f"{STAMP}.new"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    fileio.sync(temporary)
    temporary.replace(folder / STAMP)
    fileio.sync_folder(folder)
    return made


def _read_stamp(folder: Path) -> Environment | None:
    try:
        content = json.loads((folder / STAMP).read_text(encoding="utf-8"))
        return Environment(folder, str(content["digest"]), dict(content["versions"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remove(folder: Path) -> None:
    """Remove an environment, its stamp first: a removal that is cut short leaves none."""
    (folder / STAMP).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the vendor's place; BuildError while another live process does."""
    if other := _read_claim(folder):
        raise BuildError(f"{folder} is being made by process {other}", advice="wait for its end")
    claim = _claim_path(folder)
    claim.write_text(str(os.getpid()))
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def _claim_path(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.pid")


def _read_claim(folder: Path) -> int:
    """The live process, another one than this, that makes the environment; 0 when none does."""
    try:
        other = int(_claim_path(folder).read_text())
    except (OSError, ValueError):
        return 0
    return other if other != os.getpid() and psutil.pid_exists(other) else 0


def _measure(folder: Path) -> int:
    files = (path for path in folder.rglob("*") if not path.is_symlink() and path.is_file())
    return sum(path.stat().st_size for path in files)
