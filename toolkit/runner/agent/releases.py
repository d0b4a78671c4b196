"""Releases: staged beside the one in use, switched to by one link, never overwritten."""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from ..failure import Failure
from .durable import replace_link, sync_folder
from .layout import Layout

RUNNER = "runner.pyz"


def stage_release(layout: Layout, release: str, files: dict[str, str]) -> dict[str, Any]:
    """Make releases/<release> of links; `files` maps path to sha256. Returns its path.

    A release that is there already stays as it is: its id covers all of its content.
    """
    final = _find_release(layout, release)
    if final.is_dir():
        return {"path": str(final), "created": False}
    fresh = layout.releases / f".{release}.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    for name, sha256 in sorted(files.items()):
        _link_blob(layout, fresh, name, sha256)
    for folder in {path.parent for path in fresh.rglob("*")} | {fresh}:
        sync_folder(folder)
    fresh.replace(final)
    sync_folder(layout.releases)
    layout.log("staged", release=release)
    return {"path": str(final), "created": True}


def discard_release(layout: Layout, release: str) -> dict[str, Any]:
    """Remove a staged release, unless it is in use, the previous or the good one."""
    final = _find_release(layout, release)
    if release in list_roots(layout):
        return {"discarded": False}
    fresh = layout.releases / f".{release}.tmp"
    if final.is_dir():
        final.replace(fresh)
        sync_folder(layout.releases)
    shutil.rmtree(fresh, ignore_errors=True)
    layout.log("discarded", release=release)
    return {"discarded": True}


def switch_release(layout: Layout, release: str) -> dict[str, Any]:
    """Point `current` at a staged release; the state says first what to go back to."""
    if not _find_release(layout, release).is_dir():
        raise Failure("request", f"{release} is not staged")
    before = read_link(layout.current)
    if before != release:
        good = layout.read_state()["good"]
        layout.write_state(good=good, pending=release, tries_left=1)
        layout.log("switching", release=release, before=before)
        replace_link(layout.current, f"releases/{release}")
        if before:
            replace_link(layout.previous, f"releases/{before}")
    previous = read_link(layout.previous)
    return {"current": release, "previous": previous, "changed": before != release}


def confirm_release(layout: Layout, release: str) -> dict[str, Any]:
    """Record the release in use as the good one, which a rollback returns to."""
    if read_link(layout.current) != release:
        raise Failure("request", f"{release} is not the current release")
    state = layout.read_state()
    if state["good"] != release or state["pending"]:
        layout.write_state(good=release, pending=None, tries_left=0)
        layout.log("confirmed", release=release)
    return {"good": release}


def read_status(layout: Layout) -> dict[str, Any]:
    """Return what is on the device: releases, links, state, bytes used and free."""
    blobs = list(layout.blobs.iterdir())
    return {
        "root": str(layout.base),
        "current": read_link(layout.current),
        "previous": read_link(layout.previous),
        "state": layout.read_state(),
        "releases": sorted(p.name for p in layout.releases.iterdir() if p.name[0] != "."),
        "blobs": len(blobs),
        "blob_bytes": sum(path.stat().st_size for path in blobs),
        "incoming": sorted(path.name for path in layout.incoming.iterdir()),
        "free_bytes": layout.count_free_bytes(),
    }


def list_roots(layout: Layout) -> set[str]:
    """Return the releases that must never be removed."""
    state = layout.read_state()
    names = (
        read_link(layout.current),
        read_link(layout.previous),
        state["good"],
        state["pending"],
    )
    return {name for name in names if name}


def read_link(link: Path) -> str | None:
    """Return the release a link names; None when there is no link."""
    return link.readlink().name if link.is_symlink() else None


def _find_release(layout: Layout, release: str) -> Path:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_")
    if not release or release[0] == "." or not set(release) <= allowed:
        raise Failure("request", f"{release!r} is no name of a release")
    return layout.releases / release


def _link_blob(layout: Layout, release: Path, name: str, sha256: str) -> None:
    """Link release/<name> to a blob, by a relative path so that the root can be moved."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise Failure("request", f"{name!r} leads out of the release")
    blob = layout.find_blob(sha256)
    if not blob.is_file():
        raise Failure("request", f"{name}: blob {sha256} is not on the device")
    link = release / path
    link.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    link.symlink_to(os.path.relpath(blob, link.parent))
