"""Where everything lives below the device's root folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..failure import Failure
from .durable import make_folder, write_json

VERSION = "v1"
QUOTA_VARIABLE = "PHISHIP_QUOTA_BYTES"


@dataclass(frozen=True)
class Layout:
    """Paths below <root>/v1."""

    base: Path

    @property
    def blobs(self) -> Path:
        """Immutable files by sha256, each of every artifact once."""
        return self.base / "blobs" / "sha256"

    @property
    def incoming(self) -> Path:
        """Transfers under way, <sha256>.part."""
        return self.base / "incoming"

    @property
    def releases(self) -> Path:
        """One folder of links into blobs for each release."""
        return self.base / "releases"

    @property
    def runtimes(self) -> Path:
        """Virtual environments with an engine, which releases share."""
        return self.base / "runtimes"

    @property
    def logs(self) -> Path:
        """What runners said."""
        return self.base / "logs"

    @property
    def journal(self) -> Path:
        """What happened, a line of JSON each."""
        return self.base / "journal.jsonl"

    @property
    def current(self) -> Path:
        """Link to the release in use."""
        return self.base / "current"

    @property
    def previous(self) -> Path:
        """Link to the release that was in use before."""
        return self.base / "previous"

    @property
    def lock(self) -> Path:
        """File whose flock a push holds; its text says who."""
        return self.base / "lock"

    @property
    def service(self) -> Path:
        """What the service was installed with; without this file there is none."""
        return self.base / "service.json"

    def read_state(self) -> dict[str, Any]:
        """Return the recorded state: `good` release, `pending` one, tries left."""
        path = self.base / "state.json"
        if not path.exists():
            return {"good": None, "pending": None, "tries_left": 0}
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return state

    def write_state(self, **state: Any) -> None:
        """Record the state durably."""
        write_json(self.base / "state.json", {**state, "boot_id": read_boot_id()})

    def find_blob(self, sha256: str) -> Path:
        """Return where a blob belongs; Failure when the text is no sha256."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise Failure("request", f"{sha256!r} is no sha256")
        return self.blobs / sha256

    def find_part(self, sha256: str) -> Path:
        """Return where a blob grows while it arrives."""
        return self.incoming / f"{self.find_blob(sha256).name}.part"

    def count_free_bytes(self) -> int:
        """Return what may still be written: the file system's space, or a quota when one is set."""
        free_bytes = shutil.disk_usage(self.base).free
        quota = os.environ.get(QUOTA_VARIABLE)
        return min(free_bytes, int(quota) - self.count_used_bytes()) if quota else free_bytes

    def count_used_bytes(self) -> int:
        """Return the bytes of all blobs and unfinished transfers."""
        folders = (self.blobs, self.incoming)
        return sum(path.stat().st_size for folder in folders for path in folder.iterdir())


def open_layout(root: str) -> Layout:
    """Return the layout of a root folder, made when missing; Failure when it cannot be used."""
    base = Path(root).expanduser().absolute() / VERSION
    layout = Layout(base)
    try:
        for name in ("blobs", "incoming", "releases", "runtimes", "logs"):
            make_folder(getattr(layout, name))
        _check_links(base)
    except OSError as error:
        raise Failure(
            "root",
            f"{base}: cannot be used: {error.strerror}",
            "choose another folder: `root:` in devices.yaml",
        ) from error
    return layout


def read_boot_id() -> str:
    """Return what differs between two boots of Linux; empty elsewhere."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def _check_links(base: Path) -> None:
    """Fail where symbolic links cannot be made, such as /storage/emulated of Android."""
    probe = base / f".link-{os.getpid()}"
    probe.unlink(missing_ok=True)  # of a process that had our number before a power cut
    probe.symlink_to("nowhere")
    probe.unlink(missing_ok=True)
