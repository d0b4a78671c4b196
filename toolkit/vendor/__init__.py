"""The vendors' exporters as data: what each needs, and the commands that an export takes.

formats/<name>/vendor.py says what is true of its vendor; environment.py makes and finds the pinned
environments, running.py runs commands in them. Nothing here knows a format.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.checkpoint import Checkpoint

LOCKS = Path(__file__).with_name("locks")


@dataclass(frozen=True)
class Command:
    """One process to run: a name for people, its arguments, and variables that differ from ours."""

    name: str
    argv: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)


def no_steps(folder: Path) -> tuple[Command, ...]:
    """For a vendor whose packages are all it takes."""
    del folder
    return ()


@dataclass(frozen=True)
class Vendor:
    """A vendor's exporter: its lock, what must be there after setup, what manifests record.

    `name` is that of the format, of the lock file and of the environment's folder. `packages` are
    distributions whose versions an artifact's manifest names, `versions` those of what is no
    distribution. `modules` must import and `files` (relative to the environment) must exist once it
    is set up. `steps` are what setup runs after the packages are installed, given the environment's
    folder; `variables` are set for the vendor's programs. `locks` is the folder of NAME.txt, and of
    other files whose names begin like it.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    files: tuple[str, ...] = ()
    steps: Callable[[Path], tuple[Command, ...]] = no_steps
    versions: Mapping[str, str] = field(default_factory=dict)
    locks: Path = LOCKS
    variables: Mapping[str, str] = field(default_factory=dict)
    uses_torch: bool = False

    @property
    def requirements(self) -> tuple[Path, ...]:
        """The pip requirements files to install, in order; torch's is the same for all."""
        files = ("torch.txt", f"{self.name}.txt") if self.uses_torch else (f"{self.name}.txt",)
        return tuple(self.locks / file for file in files)


@dataclass(frozen=True)
class Places:
    """Where an export finds and puts things: environment, result, scratch files."""

    environment: Path
    out: Path
    scratch: Path

    @property
    def python(self) -> str:
        """The environment's interpreter."""
        return str(python_of(self.environment))


@dataclass(frozen=True)
class Export:
    """How a vendor makes an artifact, and what that takes.

    `memory_bytes` is the predicted peak of resident memory, `scratch_bytes` disk beside the
    artifact. `result` is the folder that the vendor makes, where it does not write into `out`.
    `last_context` is where the vendor's artifact stops agreeing with its source, when that is
    before the native one does; `notes` say why.
    """

    commands: tuple[Command, ...]
    memory_bytes: int
    scratch_bytes: int = 0
    result: Path | None = None
    last_context: int | None = None
    notes: tuple[str, ...] = ()


def measure_bf16(checkpoint: Checkpoint) -> int:
    """Bytes of all weights in bf16, by which the vendors' memory was measured."""
    return 2 * sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    return binary_of(environment, "python")


def binary_of(environment: Path, name: str) -> Path:
    """A program that a virtual environment installs."""
    if sys.platform == "win32":
        return environment / "Scripts" / f"{name}.exe"
    return environment / "bin" / name
