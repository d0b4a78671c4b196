"""Every error a user can meet: one sentence, one next step, one exit code per class."""

import importlib
from types import ModuleType
from typing import ClassVar


class PhishipError(Exception):
    """Base of all expected errors; `str(error)` says what, where, found and allowed."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


class SettingsError(PhishipError):
    """A recipe, target, model or devices file says something that cannot be."""

    exit_code = 3


class CheckpointError(PhishipError):
    """The source checkpoint is missing, damaged or contradicts itself."""

    exit_code = 4


class UnsupportedError(PhishipError):
    """An architecture, or a combination of format and architecture, that cannot be built."""

    exit_code = 5


class PlanError(PhishipError):
    """The plan does not fit the target or the checkpoint."""

    exit_code = 6


class MissingExtraError(PhishipError):
    """An optional package is not installed."""

    exit_code = 7


class BuildError(PhishipError):
    """Writing the artifact failed: disk full, a worker died."""

    exit_code = 8


class GateError(PhishipError):
    """The artifact is not the model it was made from; nothing was published."""

    exit_code = 9


class ArtifactError(PhishipError):
    """An artifact folder is not sealed, damaged, or not what the command needs."""

    exit_code = 10


class UnreachableError(PhishipError):
    """The device or endpoint did not answer, or refused the login."""

    exit_code = 11


class HostKeyError(PhishipError):
    """The device's host key is unknown, changed or revoked."""

    exit_code = 12


class PreflightError(PhishipError):
    """The device cannot take or run the artifact: disk, memory, Python, runtime."""

    exit_code = 13


class RunnerError(PhishipError):
    """The runner on the device failed or crashed."""

    exit_code = 14


class SmokeError(PhishipError):
    """The device answered, and the answer was wrong."""

    exit_code = 15


class RolledBackError(PhishipError):
    """The new release failed its health check; the device is back on the one before."""

    exit_code = 16


class StrandedError(PhishipError):
    """The new release failed its health check, and the way back failed as well."""

    exit_code = 17


EXTRAS = {
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime_genai": "onnx",
    "gguf": "gguf",
    "sentencepiece": "gguf",
    "xllamacpp": "gguf",
    "mlx": "mlx",
    "mlx_lm": "mlx",
    "openvino": "openvino",
    "openvino_genai": "openvino",
    "openvino_tokenizers": "openvino",
    "transformers": "openvino",
    "asyncssh": "embedded",
    "matplotlib": "plot",
}


def require(module: str) -> ModuleType:
    """Import an optional module; raise MissingExtraError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = EXTRAS[module.partition(".")[0]]
        raise MissingExtraError(
            f"{module} cannot be imported ({error})",
            advice=f"install it with: pip install 'phiship[{extra}]'",
        ) from error
