"""YAML to frozen structs; every error says file:line: key: found, allowed."""

import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

from toolkit.errors import SettingsError

T = TypeVar("T")
SIZE_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
PathKeys = tuple[str | int, ...]


class ByteSize(int):
    """A count of bytes, written as 8GiB, 2.5 GB or a whole number."""

    @classmethod
    def parse(cls, text: object) -> "ByteSize":
        """Read a size; ValueError says what is allowed."""
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?i?B|)", str(text))
        if not found or found.group(2) not in SIZE_UNITS:
            raise ValueError(f"Expected a size such as 8GiB, 500MB or 1.5 GB, got {text!r}")
        return cls(float(found.group(1)) * SIZE_UNITS[found.group(2)])


def _decode(kind: type, value: object) -> object:
    return kind.parse(value) if issubclass(kind, ByteSize) else value


def load(path: Path, kind: type[T]) -> T:
    """Read `path` as `kind` (msgspec Structs inside); SettingsError names line, key and allowed."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 text: {error.reason}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}:{_error_line(error)}: not YAML: {_problem(error)}") from error
    _refuse_twice(path, node)
    try:
        return msgspec.convert(data, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise SettingsError(_explain(path, kind, data, node, str(error))) from error


def _error_line(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else 1


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).replace("\n", " ")


def _refuse_twice(path: Path, node: yaml.Node | None) -> None:
    """Refuse a key given twice: YAML would silently keep the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                line = key.start_mark.line + 1
                raise SettingsError(f"{path}:{line}: {key.value}: given twice; keep one")
            seen.add(key.value)
            _refuse_twice(path, value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_twice(path, item)


def _explain(path: Path, kind: Any, data: Any, node: yaml.Node | None, message: str) -> str:
    """Turn msgspec's message into `file:line: key: got X; allowed Y`."""
    keys = _error_path(message)
    unknown = re.search(r"unknown field `([^`]*)`", message)
    missing = re.search(r"missing required field `([^`]*)`", message)
    if unknown or missing:
        field = (unknown or missing).group(1)  # type: ignore[union-attr]
        where = _line(node, (*keys, field) if unknown else keys)
        dotted = ".".join(map(str, (*keys, field)))
        allowed = ", ".join(_fields(_kind_at(kind, keys)))
        found = "unknown key" if unknown else "missing"
        return (
            f"{path}:{where}: {dotted}: {found}; allowed {allowed}"
            if unknown
            else (f"{path}:{where}: {dotted}: {found}; this key is required")
        )
    dotted = ".".join(map(str, keys)) or "(the file)"
    allowed = _allowed(_kind_at(kind, keys), message)
    return f"{path}:{_line(node, keys)}: {dotted}: got {_value(data, keys)!r}; allowed {allowed}"


def _error_path(message: str) -> PathKeys:
    found = re.search(r"- at `(?:key in )?\$([^`]*)`", message)
    keys: list[str | int] = []
    for name, index in re.findall(r"\.([^.\[]+)|\[([^\]]*)\]", found.group(1) if found else ""):
        keys.append(name if name else (int(index) if index.isdigit() else index))
    return tuple(keys)


def _line(node: yaml.Node | None, keys: PathKeys) -> int:
    """Line of the deepest part of `keys` that the file has."""
    line = node.start_mark.line + 1 if node else 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = [pair for pair in node.value if key in ("...", pair[0].value)]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
    return line


def _value(data: Any, keys: PathKeys) -> Any:
    for key in keys:
        if isinstance(data, dict) and key not in data:
            break
        data = data[key]
    return data


def _kind_at(kind: Any, keys: PathKeys) -> Any:
    for key in keys:
        arguments = [item for item in get_args(kind) if item is not type(None)]
        if get_origin(kind) in (list, tuple, dict):
            kind = arguments[-1 if get_origin(kind) is dict else 0]
            continue
        if arguments and get_origin(kind) is not Literal:
            kind = arguments[0]
        kind = get_type_hints(kind).get(str(key), Any) if isinstance(kind, type) else Any
    arguments = [item for item in get_args(kind) if item is not type(None)]
    is_optional = arguments and type(None) in get_args(kind) and len(arguments) == 1
    return arguments[0] if is_optional else kind


def _fields(kind: Any) -> list[str]:
    return list(getattr(kind, "__struct_fields__", ()))


def _allowed(kind: Any, message: str) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if fields := _fields(kind):
        return f"a mapping with the keys {', '.join(fields)}"
    return re.sub(r" - at `.*$", "", message).partition(", got")[0].replace("Expected ", "")
