"""Choosing wheels for a device: dependencies are read from the wheels, with the device's markers.

pip can fetch for another platform, but evaluates markers (`; platform_system == "Darwin"`) for the
machine it runs on. So pip fetches single wheels, and what they need is decided here.
"""

import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.metadata import parse_email
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

from toolkit.errors import PreflightError

MAX_ROUNDS = 20
# What a package asks for and does without here. tokenizers downloads with huggingface-hub, which
# brings a dozen others; it reads a file without importing it.
LEFT_OUT = {"tokenizers": {"huggingface-hub"}}


@dataclass(frozen=True)
class Candidate:
    """A wheel that may be chosen, and what its metadata says it needs."""

    path: Path
    name: str
    version: str
    needs: tuple[Requirement, ...]


@dataclass
class Wanted:
    """What is asked of one package by all who need it."""

    specifier: SpecifierSet = field(default_factory=SpecifierSet)
    extras: set[str] = field(default_factory=set)


# Takes requirements such as numpy>=1.26, returns the best wheel of each.
Fetch = Callable[[list[str]], Iterable[Path]]


def resolve(
    roots: Iterable[str], environment: Mapping[str, str], fetch: Fetch
) -> dict[str, Candidate]:
    """Return a wheel for every root and all that is needed, by name.

    Each package gets the newest version that satisfies everyone; a choice that a later requirement
    rules out is made again. PreflightError when that does not end.
    """
    requirements = [Requirement(root) for root in roots]
    chosen: dict[str, Candidate] = {}
    for _ in range(MAX_ROUNDS):
        wanted = _list_wanted(requirements, chosen, environment)
        missing = [
            f"{name}{asked.specifier}"
            for name, asked in sorted(wanted.items())
            if name not in chosen
            or not asked.specifier.contains(chosen[name].version, prereleases=True)
        ]
        if not missing:
            return {name: chosen[name] for name in sorted(wanted)}
        found = [read_candidate(path) for path in fetch(missing)]
        chosen.update({candidate.name: candidate for candidate in found})
    raise PreflightError(
        f"no set of versions satisfies everything that {', '.join(map(str, requirements))} needs; "
        f"still open: {', '.join(missing)}",
        advice="build the artifact with another version of the runtime",
    )


def read_candidate(path: Path) -> Candidate:
    """Read name, version and requirements of a wheel; PreflightError when it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            (entry,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
            metadata, _ = parse_email(archive.read(entry))
        name, version, *_ = parse_wheel_filename(path.name)
        needs = tuple(Requirement(text) for text in metadata.get("requires_dist", ()))
    except (zipfile.BadZipFile, ValueError) as error:
        raise PreflightError(
            f"{path.name}: the index sent a damaged wheel: {error}",
            advice="clear pip's cache and try again: pip cache purge",
        ) from error
    return Candidate(path, name, str(version), needs)


def _list_wanted(
    roots: Iterable[Requirement],
    chosen: Mapping[str, Candidate],
    environment: Mapping[str, str],
) -> dict[str, Wanted]:
    """Follow the requirements through the wheels chosen so far."""
    wanted: dict[str, Wanted] = {}
    followed: set[tuple[str, str]] = set()
    waiting = list(roots)
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        asked = wanted.setdefault(name, Wanted())
        asked.specifier &= requirement.specifier
        asked.extras |= requirement.extras
        for extra in {"", *requirement.extras}:
            if name in chosen and (name, extra) not in followed:
                followed.add((name, extra))
                values = {**environment, "extra": extra}
                waiting += [
                    need
                    for need in chosen[name].needs
                    if (need.marker is None or need.marker.evaluate(values))
                    and canonicalize_name(need.name) not in LEFT_OUT.get(name, ())
                ]
    return wanted
