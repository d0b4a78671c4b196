"""Who may import whom, what may be imported at all, and who prints: the rules of the design."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import toolkit

PACKAGE = Path(toolkit.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a part imports only from the groups above its own line. A new module of
# toolkit/ has to be given its place here.
GROUPS = (
    {"errors", "progress"},
    {"fileio", "pages", "vision", "yamlfile"},
    {"artifact", "decoder", "device", "endpoint", "model", "report", "target"},
    {"console", "recipe"},
    {"checkpoint", "overrides", "staging"},
    {"families", "quantize", "runner", "stream", "vendor"},
    {"formats"},
    {"catalog", "quality", "ssh"},
    {"plan", "scales", "source", "wheels"},
    {"coding"},
    {"calibrate", "check", "export", "job", "mixing", "preflight", "smoke"},
    {"budget", "convert", "remote", "runtime", "weights"},
    {"adapt", "place", "support", "trial"},
    {"adopt", "build", "deploy", "howto"},
    {"adb", "bundle", "listing", "llamaedge", "measuring", "ollama", "parity", "serve", "ship"},
    {"reporting"},
    {"cli"},
    {"__main__"},
)
RANK = {part: rank for rank, group in enumerate(GROUPS) for part in group}

# Slow to import, or of an extra that may not be installed.
HEAVY = (
    *("asyncssh", "gguf", "huggingface_hub", "mlx", "onnx", "onnxruntime", "onnxruntime_genai"),
    *("openvino", "openvino_genai", "openvino_tokenizers", "paramiko", "sentencepiece", "torch"),
    *("matplotlib", "mlx_lm", "transformers", "xllamacpp"),
)


def module_name(path: Path) -> str:
    """toolkit/formats/onnx/__init__.py -> toolkit.formats.onnx"""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, top_level: bool = False) -> Iterator[tuple[str, int]]:
    """Full names of what a module imports, with the line; `from a import b` counts as a.b."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = _top_level(tree.body) if top_level else ast.walk(tree)
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{source}.{alias.name}", node.lineno) for alias in node.names)


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run on import; not those for type checkers only."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _top_level(getattr(node, inner, []))


def in_toolkit(name: str) -> list[str]:
    """Parts of a name below toolkit; none for what is not in it."""
    parts = name.split(".")
    return parts[1:] if parts[0] == "toolkit" else []


def test_every_part_has_its_place() -> None:
    parts = {in_toolkit(module_name(path))[0] for path in MODULES if path.parent != PACKAGE}
    parts |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert parts == set(RANK)


def test_imports_run_downwards_only() -> None:
    wrong = []
    for path in MODULES:
        own = in_toolkit(module_name(path))[:1]
        for name, line in imports(path):
            other = in_toolkit(name)[:1]
            if not own or not other or own == other or other[0] not in RANK:
                continue
            if RANK[other[0]] >= RANK[own[0]]:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line}: {own[0]} <- {other[0]}")
    assert not wrong


@pytest.mark.parametrize("folder", ["formats", "families"])
def test_siblings_do_not_know_each_other(folder: str) -> None:
    siblings = {path.stem for path in (PACKAGE / folder).iterdir() if path.stem != "__init__"}
    wrong = []
    for path in (PACKAGE / folder).rglob("*.py"):
        own = in_toolkit(module_name(path))[1:2]
        for name, line in imports(path):
            other = in_toolkit(name)
            if other[:1] == [folder] and other[1:2] != own and set(other[1:2]) & siblings:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line}: imports {name}")
    assert siblings - {"__pycache__"}
    assert not wrong


def test_runner_is_alone() -> None:
    """It is pushed to devices without the rest: standard library, and one engine when it runs."""
    wrong = []
    for path in (PACKAGE / "runner").rglob("*.py"):
        for name, line in imports(path):
            if in_toolkit(name) and in_toolkit(name)[0] != "runner":
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line}: imports {name}")
        for name, line in imports(path, top_level=True):
            if name.split(".")[0] not in {*sys.stdlib_module_names, "toolkit"}:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line}: imports {name}")
        text = path.read_text("utf-8")
        if "import toolkit" in text or "from toolkit" in text:
            wrong.append(
                f"{path.relative_to(PACKAGE.parent)}: names toolkit, not a relative import"
            )
    assert not wrong


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: imports {name}"
        for path in MODULES
        for name, line in imports(path, top_level=True)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong


@pytest.mark.parametrize("what", ["toolkit.cli", "everything"])
def test_nothing_heavy_is_loaded(what: str) -> None:
    names = [module_name(path) for path in MODULES if path.stem != "__main__"]
    script = (
        "import importlib, sys\n"
        f"for name in {names if what == 'everything' else [what]}: importlib.import_module(name)\n"
        f"print(*sorted(set({HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], text=True, capture_output=True, check=True
    )
    assert done.stdout.split() == []


def test_only_the_console_and_the_runner_print() -> None:
    wrong = []
    for path in MODULES:
        parts = in_toolkit(module_name(path))
        if parts[:1] in (["console"], ["runner"]):
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if text.startswith(("print(", "click.echo(", "sys.stdout.", "sys.stderr.")):
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: {text}")
    assert not wrong
