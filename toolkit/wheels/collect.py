"""A runtime's wheels for a device: from the cache when they were chosen before, else by pip."""

import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from packaging.utils import parse_wheel_filename

from toolkit.artifact import hash_file
from toolkit.device import Facts
from toolkit.errors import BuildError
from toolkit.wheels import Wheel, WheelSet, name_runtime
from toolkit.wheels.pip import Tell, download
from toolkit.wheels.resolve import resolve
from toolkit.wheels.tags import list_tags, make_environment

# What else has to be there, which the package's own metadata does not ask for.
COMPANIONS = {("mlx-lm", "Linux"): "mlx-lm[cpu]"}
INSTALLER = "pip"
FRESH = ".fresh-"
STALE_S = 86_400


class Choice(msgspec.Struct, frozen=True):
    """The wheels that were chosen once, sha256 by file name, pip's among them."""

    package: str
    version: str
    wheels: dict[str, str]


def collect_wheels(
    package: str, version: str, facts: Facts, folder: Path, tell: Tell = lambda _: None,
    companions: Sequence[str] = (),
) -> WheelSet:  # fmt: skip
    """Return all wheels that `package==version` and its companions need, fetched into `folder`.

    What was chosen for the same kind of device before is chosen again, without any network. `tell`
    gets what pip says while it works. PreflightError when no wheel fits or no index answers.
    """
    note = folder / f"{_digest_question([package, version, *companions], facts)[:16]}.json"
    wheels = _read_choice(note)
    if not wheels:
        root = f"{COMPANIONS.get((package, facts.system), package)}=={version}"
        wheels = _choose([root, *companions], facts, folder, tell)
        hashes = {wheel.file_name: wheel.sha256 for wheel in wheels}
        _write_choice(note, Choice(package, version, hashes))
    (pip,) = (wheel for wheel in wheels if wheel.name == INSTALLER)
    content = tuple(wheel for wheel in wheels if wheel.name != INSTALLER)
    return WheelSet(name_runtime(package, version, content, facts), content, pip)


def cache_folder() -> Path:
    """Return where wheels are kept between deploys."""
    home = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or home) / "phiship" / "wheels"


def _choose(
    requirements: Sequence[str], facts: Facts, folder: Path, tell: Tell
) -> tuple[Wheel, ...]:
    """Let pip fetch what the packages need, and pip's own wheel for the device's Python."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=FRESH) as fresh:

            def fetch(requirements: list[str]) -> list[Path]:
                # A folder for each round: it holds then just what was asked for.
                place = Path(tempfile.mkdtemp(dir=fresh))
                return download(requirements, facts, place, tell)

            chosen = resolve([*requirements, INSTALLER], make_environment(facts), fetch)
            return tuple(_keep(candidate.path, folder) for candidate in chosen.values())
    except OSError as error:
        raise BuildError(
            f"{folder}: wheels cannot be kept there: {error.strerror or error}",
            advice="free some space, or set XDG_CACHE_HOME to another folder",
        ) from error


def _sweep(folder: Path) -> None:
    """Remove what fetches left that were killed."""
    for path in folder.glob(f"{FRESH}*"):
        if time.time() - path.stat().st_mtime > STALE_S:
            shutil.rmtree(path, ignore_errors=True)


def _keep(path: Path, folder: Path) -> Wheel:
    """Move a wheel into the cache, whole or not at all."""
    return _describe(path.replace(folder / path.name))


def _describe(path: Path) -> Wheel:
    name, version, *_ = parse_wheel_filename(path.name)
    return Wheel(name, str(version), path, hash_file(path), path.stat().st_size)


def _digest_question(wanted: Sequence[str], facts: Facts) -> str:
    """Return the digest of all that decides which wheels are chosen."""
    question = [*wanted, facts.python, facts.system, facts.machine, *list_tags(facts)]
    return hashlib.sha256("\n".join(question).encode()).hexdigest()


def _read_choice(note: Path) -> tuple[Wheel, ...]:
    """Return the wheels of an earlier choice; none unless all of them are there, unchanged."""
    try:
        choice = msgspec.json.decode(note.read_bytes(), type=Choice)
        wheels = tuple(_describe(note.with_name(name)) for name in choice.wheels)
    except (OSError, msgspec.DecodeError):
        return ()
    return wheels if choice.wheels == {w.file_name: w.sha256 for w in wheels} else ()


def _write_choice(note: Path, choice: Choice) -> None:
    fresh = note.with_name(f".{note.name}.{os.getpid()}")
    fresh.write_bytes(msgspec.json.encode(choice))
    fresh.replace(note)
