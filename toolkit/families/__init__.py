"""One module per model_type; the folder is the registry."""

import importlib
import pkgutil

from toolkit.checkpoint.config import Config
from toolkit.decoder import Decoder
from toolkit.errors import UnsupportedError


def read_decoder(config: Config) -> Decoder:
    """Describe a checkpoint's decoder; UnsupportedError names the supported architectures."""
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    for module in modules:
        if config.architecture == module.ARCHITECTURE:
            return module.read(config)  # type: ignore[no-any-return]
    supported = "; ".join(f"{m.ARCHITECTURE} ({m.MODELS})" for m in modules)
    raise UnsupportedError(
        f"{config.where}: architectures: got {config.architecture or 'nothing'!r} "
        f"(model_type {config.model_type!r}); supported: {supported}"
    )
