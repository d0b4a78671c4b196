"""Engines, one module each; the module is the interface, and its name is the manifest's `engine`.

A module offers:
    PACKAGE, MODULE             what to install, and the module that must be importable
    PROVIDERS                   the providers it can be asked for
    OFFERED                     settings it takes: name -> allowed values, () for any
    load(artifact_folder, main_file, provider, settings, **properties) -> Model
                                properties are the manifest's; most engines take none. With
                                has_tokenizer=False texts are not its business: its own tokenizer
                                need not load, encode is not called, and the text of pairs not read
and, where there is another way to the runtime than MODULE:
    import_runtime()            ImportError when the runtime cannot be reached in any way
A Model offers:
    version, provider           of the runtime in use
    reused_tokens               of the last prompt, how many were still in the cache; None: unknown
    encode(text) -> list[int]                     special tokens parsed, nothing added
    generate(prompt_ids, new_tokens, sampling) -> generator of (token id, text); closing it ends it
        one whose artifacts see also takes pixels=images.Pixels, for which ids below 0 stand
    close()
One generation at a time; a Model may be used from any thread, and a generation be closed from
another than the one that began it.
Modules that begin with an underscore are what engines share.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ..failure import Failure


def list_engines() -> list[str]:
    """Return the names of all engines in this package."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if not name.startswith("_"))


def find_engine(name: str) -> ModuleType:
    """Return the engine's module; Failure `engine` when this runner has none of that name."""
    allowed = list_engines()
    if name not in allowed:
        raise Failure("engine", f"engine {name!r} is unknown; allowed: {', '.join(allowed)}")
    return importlib.import_module(f".{name}", __package__)


def import_package(engine: ModuleType) -> None:
    """Import what an engine wraps; ImportError when it is missing or broken."""
    if hasattr(engine, "import_runtime"):
        engine.import_runtime()
    else:
        importlib.import_module(engine.MODULE)
