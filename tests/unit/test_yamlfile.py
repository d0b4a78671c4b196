"""YAML files: what is wrong is named with file, line, key, what was found and what is allowed."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from toolkit import catalog, formats
from toolkit.errors import SettingsError
from toolkit.target import Target
from toolkit.yamlfile import ByteSize, load

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Name = Annotated[str, msgspec.Meta(pattern="^[a-z]+$", description="lower-case letters")]


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """A nested mapping."""

    size: Literal[16, 32, 64]
    symmetric: bool = True


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One field of every kind."""

    name: str = ""
    title: str
    block: Block
    count: int = 1
    share: float = 0.5
    memory: ByteSize = ByteSize(0)
    context: int | None = None
    spare: Block | None = None
    runs: tuple[str, ...] = ()
    blocks: list[Block] = msgspec.field(default_factory=list)
    port: Port = 22
    host: Name = "x"
    extra: dict[str, Any] = msgspec.field(default_factory=dict)
    limits: dict[str, int] = msgspec.field(default_factory=dict)


class Base(msgspec.Struct, frozen=True, kw_only=True, tag_field="format"):
    """Told apart by `format`."""

    name: str = ""
    model: str


class Left(Base, frozen=True, kw_only=True, tag="left"):
    depth: int = 1


class Right(Base, frozen=True, kw_only=True, tag="right"):
    width: int = 1


GOOD = """\
# a comment
title: A title

block:
  size: 32
"""


def read(folder: Path, text: str | bytes, kind: Any = Settings, **given: object) -> Any:
    path = folder / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path, kind, given)


def refusal(folder: Path, text: str | bytes, kind: Any = Settings, **given: object) -> str:
    """The message without the folder: x.yaml:line: key: ..."""
    with pytest.raises(SettingsError) as caught:
        read(folder, text, kind, **given)
    assert str(caught.value).startswith(f"{folder}/")
    return str(caught.value).removeprefix(f"{folder}/")


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD) == Settings(title="A title", block=Block(size=32))


def test_every_kind_of_value(tmp_path: Path) -> None:
    text = """
title: "3"
block: {size: 64, symmetric: no}
count: 7
share: 1e-3
memory: 1.5 GB
context: ~
spare: null
runs: [onnx/cpu, "2"]
blocks:
  - size: 16
  - {size: 32, symmetric: false}
port: 65535
host: pi
extra: {deep: [1, {x: 2.5}], none: null}
limits: {a: 1, b: 2}
"""
    assert read(tmp_path, text) == Settings(
        title="3",
        block=Block(size=64, symmetric=False),
        count=7,
        share=0.001,
        memory=ByteSize(1_500_000_000),
        context=None,
        spare=None,
        runs=("onnx/cpu", "2"),
        blocks=[Block(size=16), Block(size=32, symmetric=False)],
        port=65535,
        host="pi",
        extra={"deep": [1, {"x": 2.5}], "none": None},
        limits={"a": 1, "b": 2},
    )
    assert type(read(tmp_path, text).memory) is ByteSize


def test_optional_mapping_and_anchors(tmp_path: Path) -> None:
    text = "title: t\nblock: &b\n  size: 16\nspare: *b\nblocks: [*b, *b]\n"
    found = read(tmp_path, text)
    assert found.spare == found.blocks[1] == Block(size=16)


def test_whole_number_for_a_number(tmp_path: Path) -> None:
    assert type(read(tmp_path, GOOD + "share: 1\n").share) is float


FIELDS = (
    "title, block, count, share, memory, context, spare, runs, blocks, port, host, extra, limits"
)


@pytest.mark.parametrize(
    ("added", "says"),
    [
        # GOOD has 5 lines, so what is added begins on line 6.
        ("colour: red\n", f"6: colour: unknown key; allowed name, {FIELDS}"),
        ("\n\nshares: 1\n", f"8: shares: unknown key; did you mean share? allowed name, {FIELDS}"),
        ("  sise: 3\n", "6: block.sise: unknown key; did you mean size? allowed size, symmetric"),
        ("count: many\n", "6: count: got 'many'; allowed a whole number"),
        ("count: 1.5\n", "6: count: got 1.5; allowed a whole number"),
        ("count: true\n", "6: count: got true; allowed a whole number"),
        ("count:\n", "6: count: got nothing; allowed a whole number"),
        ("count: [1]\n", "6: count: got a list; allowed a whole number"),
        ("share: half\n", "6: share: got 'half'; allowed a number"),
        ("share: {a: 1}\n", "6: share: got a mapping; allowed a number"),
        ("memory: 8 gib\n", "6: memory: got '8 gib'; allowed a size such as 8GiB, 500MB, 1.5 GB"),
        ("memory: 1.5\n", "6: memory: got 1.5; allowed a size such as 8GiB, 500MB, 1.5 GB"),
        ("memory: -1\n", "6: memory: got -1; allowed a size such as 8GiB, 500MB, 1.5 GB"),
        ("context: 4k\n", "6: context: got '4k'; allowed a whole number"),
        ("spare: 3\n", "6: spare: got 3; allowed a mapping with the keys size, symmetric"),
        ("spare:\n  symmetric: true\n", "6: spare.size: missing; allowed 16, 32, 64"),
        ("runs: onnx\n", "6: runs: got 'onnx'; allowed a list of text"),
        ("runs:\n  - a\n  - 3\n", "8: runs[1]: got 3; allowed text (put it in quotes)"),
        ("blocks:\n  - size: 16\n  - size: 17\n", "8: blocks[1].size: got 17; allowed 16, 32, 64"),
        ("blocks:\n  - size: 16\n  -\n    symmetric: yep\n", "9: blocks[1].size: missing; allowed"),
        ("port: 0\n", "6: port: got 0; allowed a whole number >= 1 and <= 65535"),
        ("host: Pi\n", "6: host: got 'Pi'; allowed lower-case letters"),
        ("host: on\n", "6: host: got on; allowed lower-case letters"),
        ("extra: 3\n", "6: extra: got 3; allowed a mapping"),
        ("limits:\n  a: 1\n  b: x\n", "8: limits.b: got 'x'; allowed a whole number"),
        ("title: again\n", "6: title: given twice, first in line 2; keep one"),
        ("  size: 16\n", "6: block.size: given twice, first in line 5; keep one"),
        ("extra:\n  a:\n    - b: 1\n      b: 2\n", "9: extra.a[0].b: given twice, first in line 8"),
        ("extra:\n  a: {b: {c: 1, c: 2}}\n", "7: extra.a.b.c: given twice, first in line 7"),
        ("? [a]\n: 1\n", "6: got a key that is not plain text"),
        ("extra: &e\n  a: *e\n", "7: extra.a: got a mapping: found unconstructable recursive node"),
        ("extra: {a: !!python/name:os.system x}\n", "6: extra.a: got x: could not determine a con"),
        ("extra: {a: 2026-13-45}\n", "6: extra.a: got 2026-13-45: month must be in 1..12"),
    ],
)
def test_what_is_wrong_is_named(added: str, says: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, GOOD + added).startswith(f"x.yaml:{says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("title: t\n", "1: block: missing; allowed a mapping with the keys size, symmetric"),
        ("# c\n\nblock: {size: 16}\n", "3: title: missing; allowed text"),
        ("title: t\nblock:\n  symmetric: no\n", "2: block.size: missing; allowed 16, 32, 64"),
        ("title: t\nblock: {size: 48}\n", "2: block.size: got 48; allowed 16, 32, 64"),
        ("title: t\nblock: {size: '16'}\n", "2: block.size: got '16'; allowed 16, 32, 64"),
        ("title: t\nblock: [16]\n", "2: block: got a list; allowed a mapping with the keys size"),
        ("title: 1.10\nblock: {size: 16}\n", "1: title: got 1.10; allowed text (put it in quotes)"),
        ("title: no\nblock: {size: 16}\n", "1: title: got no; allowed text (put it in quotes)"),
        ("title: 2026-11-21\n", "1: block: missing"),
        ("title: [a]\nblock: {size: 16}\n", "1: title: got a list; allowed text"),
        ("", "1: the file is empty; allowed a mapping with the keys name, title"),
        ("# only a comment\n", "1: the file is empty"),
        ("\n\nnull\n", "3: got nothing; allowed a mapping with the keys"),
        ("- title: t\n", "1: got a list; allowed a mapping with the keys"),
        ("just text\n", "1: got 'just text'; allowed a mapping with the keys"),
        (
            "a: [1,\nb\n",
            "3: not YAML: expected ',' or ']', but got '<stream end>' (while parsing a ",
        ),
        ("a: 1\n\tb: 2\n", "2: not YAML: "),
        ("title: t\n  block: 3\n", "2: not YAML: mapping values are not allowed here"),
        ('a: "open\n', "2: not YAML: found unexpected end of stream"),
        ("a: 1\n---\nb: 2\n", "2: not YAML: but found another document"),
        ("a: 1\nb: *nowhere\n", "2: not YAML: found undefined alias 'nowhere'"),
        ("a: 1\nb: \x07\n", "2: not YAML: got the character U+0007"),
        (b"a: 1\nb: caf\xe9\n", "2: got byte 0xe9; allowed UTF-8 text"),
        ("title: t".encode("utf-16"), "1: got byte 0xff; allowed UTF-8 text"),
        ("[" * 5000, "1: not readable: nested too deeply"),
    ],
)
def test_what_is_wrong_with_the_file_is_named(text: str | bytes, says: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text).startswith(f"x.yaml:{says}")


def test_byte_order_mark_is_fine(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()).title == "A title"


def test_windows_line_ends_count_once(tmp_path: Path) -> None:
    text = GOOD.replace("\n", "\r\n") + "count: x\r\n"
    assert refusal(tmp_path, text).startswith("x.yaml:6: count: ")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"missing.yaml: cannot be read: No such file"):
        load(tmp_path / "missing.yaml", Settings)
    with pytest.raises(SettingsError, match="cannot be read: Is a directory"):
        load(tmp_path, Settings)


def test_what_the_caller_gives_the_file_may_not(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD, name="x").name == "x"
    message = refusal(tmp_path, GOOD + "name: other\n", name="x")
    assert message == f"x.yaml:6: name: unknown key; allowed {FIELDS}"


@pytest.mark.parametrize("union", [Left | Right, Left])
def test_tag_chooses_the_kind(union: Any, tmp_path: Path) -> None:
    found = read(tmp_path, "format: left\nmodel: m\ndepth: 3\n", union, name="x")
    assert found == Left(name="x", model="m", depth=3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: m\n", "1: format: missing; allowed left, right"),
        ("model: m\nformat: up\n", "2: format: got 'up'; allowed left, right"),
        ("model: m\nformat: [left]\n", "2: format: got a list; allowed left, right"),
        ("model: m\nformat:\n", "2: format: got nothing; allowed left, right"),
        ("format: left\nmodel: m\nwidth: 1\n", "3: width: unknown key; "),
        ("format: right\n", "1: model: missing; allowed text"),
        ("format: left\nformat: right\n", "2: format: given twice, first in line 1"),
        ("- format: left\n", "1: got a list; allowed a mapping with format: left or right"),
        ("", "1: the file is empty; allowed a mapping with format: left or right"),
    ],
)
def test_wrong_tag_is_named(text: str, says: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text, Left | Right).startswith(f"x.yaml:{says}")


def test_mapping_of_names(tmp_path: Path) -> None:
    found = read(tmp_path, "pi:\n  size: 16\n10: {size: 32}\n", dict[str, Block])
    assert found == {"pi": Block(size=16), "10": Block(size=32)}
    message = refusal(tmp_path, "pi:\n  size: 16\nnas:\n  size: 1\n", dict[str, Block])
    assert message == "x.yaml:4: nas.size: got 1; allowed 16, 32, 64"


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that have to agree."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"got low {self.low}, high {self.high}; allowed low <= high")


def test_fields_that_contradict_each_other(tmp_path: Path) -> None:
    message = refusal(
        tmp_path, "a:\n  low: 1\n  high: 2\nb:\n  low: 3\n  high: 2\n", dict[str, Range]
    )
    assert message == "x.yaml:4: b: got low 3, high 2; allowed low <= high"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GiB", 8 << 30),
        ("8 GiB", 8 << 30),
        ("500MB", 500_000_000),
        ("1.5 GB", 1_500_000_000),
        ("64kB", 64_000),
        ("2 TiB", 2 << 40),
        ("0", 0),
        ("4096", 4096),
        (4096, 4096),
        ("12B", 12),
    ],
)
def test_sizes(text: object, expected: int) -> None:
    assert ByteSize.parse(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "8gb", "8 G", "8Gi", "-1GB", "1,5 GB", "1e9", True])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match="allowed a size such as 8GiB"):
        ByteSize.parse(text)


def test_real_recipes_say_which_formats_there_are(tmp_path: Path) -> None:
    kinds: Any = None
    for name in formats.names():
        recipe = formats.get(name).RECIPE
        kinds = recipe if kinds is None else kinds | recipe
    allowed = ", ".join(formats.names())
    message = refusal(tmp_path, "model: m\nformat: tflite\n", kinds)
    assert message == f"x.yaml:2: format: got 'tflite'; allowed {allowed}"


@pytest.mark.parametrize("kind", ["recipes", "targets", "models"])
def test_bundled_files_are_good(kind: str) -> None:
    loaders: dict[str, Callable[[str], Any]] = {
        "recipes": catalog.load_recipe,
        "targets": catalog.load_target,
        "models": catalog.load_model,
    }
    for name in catalog.names(kind):
        assert loaders[kind](name).name == name


def test_mistyped_target(tmp_path: Path) -> None:
    text = "title: t\nsystem: beos\n"
    assert refusal(tmp_path, text, Target).startswith(
        "x.yaml:1: arch: missing; allowed aarch64, x86_64"
    )
    bundled = catalog.folder("targets") / f"{catalog.names('targets')[0]}.yaml"
    text = bundled.read_text("utf-8") + "colour: red\n"
    line = len(text.splitlines())
    assert refusal(tmp_path, text, Target).startswith(
        f"x.yaml:{line}: colour: unknown key; allowed"
    )
