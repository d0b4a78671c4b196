"""One module per model_type; the folder is the registry."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder
from toolkit.errors import UnsupportedError


@dataclass(frozen=True)
class Evidence:
    """What was compared with what, and the test that does it."""

    words: str
    test: str


class Family(Protocol):
    """What families/<name>.py offers; `VERIFIED` has every format that can hold the family."""

    ARCHITECTURE: str
    MODELS: str
    VERIFIED: Mapping[str, Evidence]

    def read(self, config: Config) -> Decoder:
        """Describe the decoder; CheckpointError when the config's numbers cannot be."""


def read_decoder(config: Config) -> Decoder:
    """Describe a checkpoint's decoder; UnsupportedError names the supported architectures."""
    return find_family(config).read(config)


def find_family(config: Config) -> Family:
    """The family of a checkpoint; UnsupportedError names the supported architectures."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    modules = [cast(Family, importlib.import_module(f"{__name__}.{name}")) for name in names]
    for module in modules:
        if config.architecture == module.ARCHITECTURE:
            return module
    supported = "; ".join(f"{m.ARCHITECTURE} ({m.MODELS})" for m in modules)
    raise UnsupportedError(
        f"{config.where}: architectures: got {config.architecture or 'nothing'!r} "
        f"(model_type {config.model_type!r}); supported: {supported}"
    )
