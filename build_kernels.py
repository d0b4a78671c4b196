"""Compiles toolkit/quantize/*.c when the package is built; NumPy does it otherwise."""

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("toolkit/quantize")
LIBRARY = FOLDER / "_kernels.so"
# No fused multiply-add: the formats round twice, and every byte is compared with theirs.
FLAGS = "-std=c99 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fPIC -shared"


class KernelBuildHook(BuildHookInterface[Any]):
    """Puts the library beside its source, and into the wheel with the tag of this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile, or say why not and go on."""
        library = Path(self.root) / LIBRARY
        sources = [str(path) for path in sorted((Path(self.root) / FOLDER).glob("*.c"))]
        compiler = shlex.split(os.environ.get("CC") or "cc")
        command = [*compiler, *FLAGS.split(), "-o", str(library), *sources, "-lm"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            library.unlink(missing_ok=True)
            reason = getattr(error, "stderr", None) or error
            self.app.display_warning(f"quantizing will use NumPy, which is slower: {reason}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"py3-none-{platform}"}
        build_data["artifacts"].append(str(LIBRARY))
