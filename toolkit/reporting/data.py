"""Reading the files that `report` takes beside artifacts."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from toolkit.errors import SettingsError
from toolkit.measuring.result import Result
from toolkit.quality.details import SCHEMA, Details

USEFUL = (
    "`phiship check ARTIFACT --details FILE`, `phiship bench --out FILE` or `--json`, "
    "or `phiship parity --json`"
)

SIGNED = ("delta_p", "temperature_celsius", "settings")
LARGEST = 1e300  # perplexities of a broken artifact are below; more would overflow in a chart


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's side of a parity, as its `engine` event says; `recipe` may be unknown."""

    name: str
    wall_s: float
    cpu_s: float
    peak_memory_bytes: int
    size_bytes: int
    kl_to_source: float
    top1: float
    recipe: str = ""


@dataclass(frozen=True)
class Origin:
    """A file that numbers came from, as the page names it."""

    name: str
    sha256: str
    holds: str


@dataclass(frozen=True)
class Data:
    """What a file held; several are one by `+`."""

    details: tuple[Details, ...] = ()
    benches: tuple[Result, ...] = ()
    built: tuple[Built, ...] = ()
    origins: tuple[Origin, ...] = ()

    def __add__(self, other: "Data") -> "Data":
        """Both, in their order."""
        return Data(
            self.details + other.details, self.benches + other.benches, self.built + other.built,
            self.origins + other.origins,
        )  # fmt: skip


def read_data(path: Path) -> Data:
    """Read a JSON file or JSON lines; SettingsError when nothing in it is for a report."""
    if str(path) == "-":
        raise SettingsError(
            "--data -: standard input is not read", advice="write it to a file and give that"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    found = Data()
    seen: list[str] = []
    for place, value in _list_values(content, path):
        kind = _tell_kind(value)
        seen.append(kind)
        if kind in READERS:
            found += _read_value(kind, value, place, path)
    if found == Data():
        raise SettingsError(_explain_nothing(path, seen), advice=f"files come from {USEFUL}")
    sha256 = hashlib.sha256(content).hexdigest()
    return found + Data(origins=(Origin(path.name, sha256, _say_what(found)),))


def _list_values(content: bytes, path: Path) -> list[tuple[str, Any]]:
    """Every JSON value with its place: the whole file, else each of its lines."""
    try:
        return [(str(path), json.loads(content))]
    except (ValueError, RecursionError):
        lines = content.split(b"\n")
    values = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values.append((f"{path}:{number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise SettingsError(
                f"{path}:{number}: no JSON: {error}", advice=f"files come from {USEFUL}"
            ) from None
    return values


def _tell_kind(value: Any) -> str:
    """The event's name; for a whole file, what its fields say it is; else empty."""
    if not isinstance(value, dict):
        return ""
    if isinstance(value.get("event"), str):
        return str(value["event"])
    if {"kl", "texts"} <= value.keys():
        return "details"
    return "bench" if {"lengths", "machine"} <= value.keys() else ""


def _read_value(kind: str, value: dict[str, Any], place: str, path: Path) -> Data:
    try:
        found = READERS[kind](value, path)
    except msgspec.ValidationError as error:
        raise SettingsError(
            f"{place}: no {kind} that this phiship reads: {error}",
            advice="make the file again with this version",
        ) from None
    for one in (*found.details, *found.benches, *found.built):
        _require_numbers(msgspec.to_builtins(one), place)
    return found


def _require_numbers(value: Any, place: str, field: str = "", *, is_signed: bool = False) -> None:
    """SettingsError for a number that no command writes: JSON readers take NaN and 1e999."""
    if isinstance(value, dict):
        for name, one in value.items():
            may = is_signed or (field != "errors" and _may_be_negative(name))
            _require_numbers(one, place, f"{field}.{name}" if field else name, is_signed=may)
    elif isinstance(value, list | tuple):
        for number, one in enumerate(value):
            _require_numbers(one, place, f"{field}[{number}]", is_signed=is_signed)
    elif isinstance(value, int | float):
        least = -LARGEST if is_signed else 0
        if not least <= value <= LARGEST:  # false for NaN, too
            allowed = "a finite number" if is_signed else "a finite number, not below 0"
            raise SettingsError(
                f"{place}: {field}: got {str(value)[:24]}; allowed: {allowed}",
                advice="make the file again",
            )


def _may_be_negative(name: str) -> bool:
    """Changes, logarithms, degrees, and what an engine takes as its own settings."""
    return name in SIGNED or "Δp" in name or name.startswith("ln ")


def _read_details(value: dict[str, Any], path: Path) -> Data:
    details = msgspec.convert(value, Details)
    if details.schema != SCHEMA:
        raise SettingsError(f"{path}: schema {details.schema}; this phiship reads {SCHEMA}")
    counts = {len(details.ids), len(details.texts), len(details.kl), sum(details.sequences)}
    if counts | {len(details.delta_p), len(details.same_top)} != counts or len(counts) != 1:
        raise SettingsError(
            f"{path}: damaged: its lists of tokens differ in length",
            advice="write the file again with: phiship check ARTIFACT --details FILE",
        )
    return Data(details=(details,))


def _read_built(value: dict[str, Any], path: Path) -> Data:
    built = msgspec.convert(value, Built)
    return Data(built=(msgspec.structs.replace(built, recipe=built.recipe or path.stem),))


READERS: dict[str, Callable[[dict[str, Any], Path], Data]] = {
    "details": _read_details,
    "bench": lambda value, _: Data(benches=(msgspec.convert(value, Result),)),
    "engine": _read_built,
}


def _explain_nothing(path: Path, seen: list[str]) -> str:
    names = sorted({name for name in seen if name})
    said = f"its events are {', '.join(names)}" if names else "it holds JSON of another kind"
    return f"{path}: nothing for a report: {said}; a report reads details, bench and engine"


def _say_what(data: Data) -> str:
    parts = [f"details of {one.artifact}" for one in data.details]
    parts += [f"bench of {one.title}" for one in data.benches]
    parts += [f"{one.recipe} built by {one.name}" for one in data.built]
    return ", ".join(parts)
