"""YAML to frozen structs; every error says file:line: key: found, allowed.

PyYAML's nodes give the lines; the types of the msgspec Structs say what is allowed.
"""

import difflib
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import msgspec
import yaml

from toolkit.errors import SettingsError

T = TypeVar("T")
SIZE_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
SIZE_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE_TEXT = "a size such as 8GiB, 500MB, 1.5 GB or a whole number of bytes"
WORDS: Mapping[Any, str] = {
    bool: "true or false",
    dict: "a mapping",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "text",
    tuple: "a list",
    type(None): "nothing",
}
# YAML 1.1 takes 1e-3 for text, since it has no dot.
PLAIN_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


class ByteSize(int):
    """A count of bytes, written as 8GiB, 2.5 GB or a whole number."""

    @classmethod
    def parse(cls, text: object) -> "ByteSize":
        """Read a size; ValueError says what is allowed."""
        whole = re.fullmatch(r"\d+", str(text))
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?B)", str(text))
        if whole:
            return cls(int(str(text)))
        if not found or found.group(2) not in SIZE_UNITS:
            raise ValueError(f"got {text!r}; allowed {SIZE_TEXT}")
        return cls(float(found.group(1)) * SIZE_UNITS[found.group(2)])


def load(path: Path, kind: type[T], given: Mapping[str, object] | None = None) -> T:
    """Read `path` as `kind`: Structs, unions of tagged Structs, and mappings and lists of them.

    `given` are top-level fields that the caller knows and the file may not say. SettingsError names
    file, line, key, what was found and what is allowed.
    """
    text = _read_text(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _not_yaml(path, text, error) from error
    except RecursionError as error:
        raise SettingsError(f"{path}:1: not readable: nested too deeply") from error
    if root is None:
        raise SettingsError(f"{path}:1: the file is empty; allowed {_describe(kind)}")
    spot = _Spot(path, (), root, root.start_mark.line + 1)
    value: T = _read(spot, kind, given or {})
    return value


@dataclass(frozen=True)
class _Spot:
    """A value of the file, the keys that lead to it, and the line to name in errors."""

    path: Path
    keys: tuple[str | int, ...]
    node: yaml.Node
    line: int

    def error(self, text: str, line: int | None = None, key: str | None = None) -> SettingsError:
        """Return the SettingsError for this spot, or for `key` (at `line`) inside it."""
        keys = self.keys if key is None else (*self.keys, key)
        dotted = "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).lstrip(".")
        where = f"{self.path}:{line or self.line}: "
        return SettingsError(f"{where}{dotted}: {text}" if dotted else f"{where}{text}")

    def wrong(self, allowed: str) -> SettingsError:
        """Return the SettingsError that says what stands here and what may."""
        return self.error(f"got {_found(self.node)}; allowed {allowed}")

    def entries(self, kind: Any) -> "dict[str, _Spot]":
        """Return the values of a mapping; SettingsError for anything else, or a key given twice."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self.wrong(_describe(kind))
        spots: dict[str, _Spot] = {}
        for key, node in self.node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise self.error("got a key that is not plain text", line)
            if key.value in spots:
                before = spots[key.value].line
                raise self.error(f"given twice, first in line {before}; keep one", line, key.value)
            spots[key.value] = _Spot(self.path, (*self.keys, key.value), node, line)
        return spots

    def items(self, kind: Any) -> "Iterator[_Spot]":
        """Yield the values of a list; SettingsError for anything else."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self.wrong(_describe(kind))
        for index, node in enumerate(self.node.value):
            yield _Spot(self.path, (*self.keys, index), node, node.start_mark.line + 1)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise SettingsError(
            f"{path}:{line}: got byte 0x{raw[error.start]:02x}; allowed UTF-8 text",
            advice="save the file as UTF-8",
        ) from error


def _not_yaml(path: Path, text: str, error: yaml.YAMLError) -> SettingsError:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return SettingsError(f"{path}:{line}: not YAML: got the character U+{error.character:04X}")
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error).replace("\n", " ")
    began = getattr(error, "context_mark", None)
    context = f" ({getattr(error, 'context', '')} from line {began.line + 1})" if began else ""
    return SettingsError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {problem}{context}")


def _read(spot: _Spot, kind: Any, given: Mapping[str, object]) -> Any:
    """Return the value at `spot` as `kind`; SettingsError when it is not."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _read_union(spot, arguments, given)
    if _is_struct(kind):
        return _read_tagged(spot, (kind,), given) if _tag(kind) else _read_struct(spot, kind, given)
    if origin is dict:
        entries = spot.entries(kind).items()
        return {key: _read(child, arguments[1], {}) for key, child in entries}
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return origin(_read(child, arguments[0], {}) for child in spot.items(kind))
    return _read_leaf(spot, kind)


def _read_union(spot: _Spot, kinds: tuple[Any, ...], given: Mapping[str, object]) -> Any:
    if type(None) in kinds and _is_null(spot.node):
        return None
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if len(kinds) == 1:
        return _read(spot, kinds[0], given)
    if all(_is_struct(kind) and _tag(kind) for kind in kinds):
        return _read_tagged(spot, kinds, given)
    return _read_leaf(spot, Union[kinds])  # noqa: UP007


def _read_tagged(spot: _Spot, kinds: tuple[Any, ...], given: Mapping[str, object]) -> Any:
    """Choose the Struct by the key that tells them apart."""
    key = kinds[0].__struct_config__.tag_field
    by_tag = {_tag(kind): kind for kind in kinds}
    allowed = ", ".join(sorted(by_tag))
    if not isinstance(spot.node, yaml.MappingNode):
        raise spot.wrong(_describe_tagged(kinds))
    tag = spot.entries(kinds[0]).get(key)
    if tag is None:
        raise spot.error(f"missing; allowed {allowed}", key=key)
    if not isinstance(tag.node, yaml.ScalarNode) or tag.node.value not in by_tag:
        raise tag.wrong(allowed)
    return _read_struct(spot, by_tag[tag.node.value], given, key)


def _read_struct(
    spot: _Spot, kind: Any, given: Mapping[str, object], tag_field: str | None = None
) -> Any:
    entries = spot.entries(kind)
    fields = {f.encode_name: f for f in msgspec.structs.fields(kind) if f.encode_name not in given}
    for key, child in entries.items():
        if key not in fields and key != tag_field:
            known = [tag_field, *fields] if tag_field else [*fields]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise child.error(f"unknown key; {hint}allowed {', '.join(known)}")
    for key, field in fields.items():
        if field.required and key not in entries:
            raise spot.error(f"missing; allowed {_describe(field.type)}", key=key)
    values = {f.name: _read(entries[k], f.type, {}) for k, f in fields.items() if k in entries}
    try:
        return kind(**given, **values)
    except (ValueError, TypeError) as error:
        raise spot.error(str(error)) from error


def _read_leaf(spot: _Spot, kind: Any) -> Any:
    value = _construct(spot)
    base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if isinstance(value, str) and base is float and PLAIN_EXPONENT.fullmatch(value):
        value = float(value)
    try:
        if isinstance(base, type) and issubclass(base, ByteSize):
            return base.parse(value)
        return msgspec.convert(value, kind)
    except (ValueError, msgspec.ValidationError):
        quotes = " (put it in quotes)" if base is str and _is_other_scalar(spot.node) else ""
        raise spot.wrong(_describe(kind) + quotes) from None


def _construct(spot: _Spot) -> Any:
    """Return plain Python values; keys given twice are refused at any depth."""
    loader = yaml.SafeLoader("")
    try:
        _refuse_twice(spot, set())
        return loader.construct_object(spot.node, deep=True)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error)
        raise spot.error(f"got {_found(spot.node)}: {problem}") from error
    finally:
        loader.dispose()


def _refuse_twice(spot: _Spot, seen: set[int]) -> None:
    """YAML itself would silently keep the last. `seen` ends the walk where an alias repeats."""
    if id(spot.node) in seen:
        return
    seen.add(id(spot.node))
    if isinstance(spot.node, yaml.MappingNode):
        for child in spot.entries(dict).values():
            _refuse_twice(child, seen)
    elif isinstance(spot.node, yaml.SequenceNode):
        for child in spot.items(list):
            _refuse_twice(child, seen)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _tag(kind: Any) -> str:
    """The value that names this Struct in a union; empty when it has none."""
    return str(kind.__struct_config__.tag or "")


def _is_null(node: yaml.Node) -> bool:
    return bool(node.tag == "tag:yaml.org,2002:null")


def _is_other_scalar(node: yaml.Node) -> bool:
    """True for what YAML takes for a number, a date or yes and no."""
    is_text = node.tag == "tag:yaml.org,2002:str"
    return isinstance(node, yaml.ScalarNode) and not is_text and not _is_null(node)


def _found(node: yaml.Node) -> str:
    """Say what stands in the file: text in quotes, numbers as they are written."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if _is_null(node):
        return "nothing"
    return str(node.value) if _is_other_scalar(node) else repr(node.value)


def _describe(kind: Any) -> str:
    """Say what a type allows, for people."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin is Annotated:
        return _describe_limits(arguments)
    if origin in (Union, types.UnionType):
        if all(_is_struct(argument) and _tag(argument) for argument in arguments):
            return _describe_tagged(arguments)
        return " or ".join(_describe(argument) for argument in arguments)
    if _is_struct(kind):
        if _tag(kind):
            return _describe_tagged((kind,))
        fields = ", ".join(field.encode_name for field in msgspec.structs.fields(kind))
        return f"a mapping with the keys {fields}"
    if isinstance(kind, type) and issubclass(kind, ByteSize):
        return SIZE_TEXT
    if origin in (list, tuple):
        return f"a list of {_describe(arguments[0])}"
    return WORDS.get(origin or kind, "any value")


def _describe_tagged(kinds: tuple[Any, ...]) -> str:
    tags = " or ".join(sorted(map(_tag, kinds)))
    return f"a mapping with {kinds[0].__struct_config__.tag_field}: {tags}"


def _describe_limits(arguments: tuple[Any, ...]) -> str:
    """Say what Annotated[kind, Meta(...)] allows: the Meta's description when it has one."""
    base, limits = _describe(arguments[0]), []
    for meta in arguments[1:]:
        if description := getattr(meta, "description", None):
            return str(description)
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "pattern": "like"}
        values = {sign: getattr(meta, name, None) for name, sign in signs.items()}
        limits += [f"{sign} {value}" for sign, value in values.items() if value is not None]
    return " ".join([base, " and ".join(limits)]).rstrip()
