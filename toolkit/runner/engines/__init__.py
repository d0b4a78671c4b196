"""Engines, one module each; the module is the interface, and its name is the manifest's `engine`.

A module offers:
    PACKAGE, MODULE             what to install, and the module that must be importable
    PROVIDERS                   the providers it can be asked for
    load(artifact_folder, main_file, provider, context_tokens) -> Model
                                context_tokens bounds prompt and answer together
A Model offers:
    version, provider           of the runtime in use
    encode(text) -> list[int]                     special tokens parsed, nothing added
    generate(prompt_ids, new_tokens) -> iterator of (token id, text)      greedy
    close()
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from ..failure import Failure


def list_engines() -> list[str]:
    """Return the names of all engines in this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_engine(name: str) -> ModuleType:
    """Return the engine's module; Failure `engine` when this runner has none of that name."""
    allowed = list_engines()
    if name not in allowed:
        raise Failure("engine", f"engine {name!r} is unknown; allowed: {', '.join(allowed)}")
    return importlib.import_module(f".{name}", __package__)
