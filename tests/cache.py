"""What takes minutes to make, kept between runs under a digest of how it is made."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

# Read once: tests give themselves another home.
FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phiship" / "tests"


def keep(kind: str, recipe: object, make: Callable[[Path], None]) -> Path:
    """Return the file or folder that `make` writes; it is made anew when `recipe` changes.

    `make` gets a temporary path, which is renamed when it is complete: an interrupted one is never
    taken for the whole. What other recipes of this kind left is removed.
    """
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]
    final = FOLDER / f"{kind}-{digest}"
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            fresh = FOLDER / f"{kind}.tmp"
            remove(fresh)
            make(fresh)
            fresh.rename(final)
        for other in FOLDER.glob(f"{kind}-*"):
            if other != final:
                remove(other)
    return final


def remove(path: Path) -> None:
    """Remove a file or a folder; nothing happens when there is none."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_quietly(command: Sequence[str | Path]) -> None:
    """Run a command at low priority; RuntimeError with its last words when it fails."""
    done = subprocess.run(["nice", "-n", "10", *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        words = " ".join(map(str, command))
        raise RuntimeError(f"{words}: exit code {done.returncode}\n{done.stderr[-2000:]}")
