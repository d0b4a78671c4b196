"""Releases: staged beside the one in use, switched to by one link, never overwritten.

The state says which release is good and which is on trial (`pending`); it is written before every
switch, so that whoever comes next, after whatever cut, knows what to go back to.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..failure import Failure
from . import journal
from .durable import replace_link, sync_folder
from .layout import Layout

RUNNER = "runner.pyz"
RUNTIME = "runtime"
MANIFEST = "manifest.json"
TRIES = 1


def stage_release(
    layout: Layout, release: str, files: dict[str, str], runtime: str | None = None
) -> dict[str, Any]:
    """Make releases/<release> of links; `files` maps path to sha256. Returns its path.

    `runtime` names the virtual environment that it runs in; without, the device's own Python. A
    release that is there already stays as it is: its id covers all of its content.
    """
    final = find_release(layout, release)
    if final.is_dir():
        return {"path": str(final), "created": False}
    fresh = _temporary(final)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(mode=0o700)
    for name, sha256 in sorted(files.items()):
        _link_blob(layout, fresh, name, sha256)
    if runtime:
        (fresh / RUNTIME).symlink_to(_relative(find_runtime(layout, runtime), fresh))
    for folder in {path.parent for path in fresh.rglob("*")} | {fresh}:
        sync_folder(folder)
    fresh.replace(final)
    sync_folder(layout.releases)
    journal.log(layout, "staged", release=release)
    return {"path": str(final), "created": True}


def discard_release(layout: Layout, release: str) -> dict[str, Any]:
    """Remove a staged release, unless it is in use, the previous or the good one."""
    final = find_release(layout, release)
    if release in list_roots(layout):
        return {"discarded": False}
    _remove_folder(final)
    journal.log(layout, "discarded", release=release)
    return {"discarded": True}


def switch_release(layout: Layout, release: str) -> dict[str, Any]:
    """Put a staged release on trial; the state says first what to go back to."""
    if not find_release(layout, release).is_dir():
        raise Failure("request", f"{release} is not staged")
    before = read_link(layout.current)
    if before != release:
        good = layout.read_state()["good"]
        layout.write_state(good=good, pending=release, tries_left=TRIES)
        journal.log(layout, "switching", release=release, before=before)
        replace_link(layout.current, f"releases/{release}")
        if before:
            replace_link(layout.previous, f"releases/{before}")
    previous = read_link(layout.previous)
    return {"current": release, "previous": previous, "changed": before != release}


def confirm_release(layout: Layout, release: str) -> dict[str, Any]:
    """Record the release in use as the good one, which a failure returns to."""
    if read_link(layout.current) != release:
        raise Failure("request", f"{release} is not the current release")
    state = layout.read_state()
    if state["good"] != release or state["pending"]:
        layout.write_state(good=release, pending=None, tries_left=0)
        journal.log(layout, "confirmed", release=release)
    return {"good": release}


def return_to_good(layout: Layout) -> dict[str, Any]:
    """End a trial: back to the recorded good release; without one, nothing is in use any more."""
    state = layout.read_state()
    good, failed = state["good"], state["pending"] or read_link(layout.current)
    if good:
        replace_link(layout.current, f"releases/{good}")
    elif layout.current.is_symlink():
        layout.current.unlink()
        sync_folder(layout.base)
    layout.write_state(good=good, pending=None, tries_left=0)
    journal.log(layout, "returned", release=good, failed=failed)
    return {"current": good, "failed": failed}


def recover(layout: Layout) -> dict[str, Any]:
    """Make whole what a cut left; a trial that nobody watches any more ends.

    Without a good release to go back to, the one on trial stays: it has passed its smoke test.
    """
    for path in [*layout.releases.glob(".*.tmp"), *layout.runtimes.glob(".*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)  # a pip that was left alone may still write there
    for path in [*layout.base.glob("*.new"), *layout.base.glob(".link-*")]:
        path.unlink(missing_ok=True)
    state = layout.read_state()
    if state["pending"] and state["good"]:
        return {"returned": return_to_good(layout)}
    return {"returned": None}


def start_trial(layout: Layout) -> dict[str, Any]:
    """What a service does before it serves: a release on trial may start so many times, no more."""
    state = layout.read_state()
    if not state["pending"] or not state["good"]:
        return {"returned": None}
    if state["tries_left"] > 0:
        layout.write_state(**{**state, "tries_left": state["tries_left"] - 1})
        journal.log(layout, "tried", release=state["pending"])
        return {"returned": None}
    return {"returned": return_to_good(layout)}


def prune(layout: Layout) -> dict[str, Any]:
    """Remove what no kept release needs: releases, runtimes, blobs, unfinished transfers."""
    roots, free_bytes = list_roots(layout), layout.count_free_bytes()
    releases = [path for path in layout.releases.iterdir() if path.name not in roots]
    for path in releases:
        _remove_folder(path)
    kept = {os.path.realpath(path) for path in _list_links(layout)} | {
        os.path.realpath(sys.argv[0])
    }
    for path in layout.runtimes.iterdir():
        if os.path.realpath(path) not in kept:
            _remove_folder(path)
    for path in [*layout.blobs.iterdir(), *layout.incoming.iterdir()]:
        if os.path.realpath(path) not in kept:
            path.unlink()
    journal.trim(layout)
    names = sorted(path.name for path in releases)
    if names:
        journal.log(layout, "pruned", releases=names)
    return {"releases": names, "freed_bytes": max(0, layout.count_free_bytes() - free_bytes)}


def uninstall(layout: Layout) -> dict[str, Any]:
    """Remove everything below the root, and the root when nothing else is in it."""
    shutil.rmtree(layout.base)
    root = layout.base.parent
    if not any(root.iterdir()):
        root.rmdir()
    return {"removed": str(layout.base)}


def read_status(layout: Layout) -> dict[str, Any]:
    """Return what is on the device: releases, links, state, bytes used and free."""
    blobs = list(layout.blobs.iterdir())
    return {
        "root": str(layout.base),
        "current": read_link(layout.current),
        "previous": read_link(layout.previous),
        "state": layout.read_state(),
        "releases": _list_names(layout.releases),
        "runtimes": _list_names(layout.runtimes),
        "blobs": len(blobs),
        "blob_bytes": sum(path.stat().st_size for path in blobs),
        "incoming": sorted(path.name for path in layout.incoming.iterdir()),
        "free_bytes": layout.count_free_bytes(),
    }


def read_manifest(release: Path) -> dict[str, Any]:
    """Return the manifest of a release; Failure when there is none."""
    path = release / MANIFEST
    if not path.is_file():
        raise Failure("request", f"{release}: no release is deployed there")
    return {"manifest": json.loads(path.read_text(encoding="utf-8"))}


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


def find_release(layout: Layout, release: str) -> Path:
    """Return a release's folder, which need not be there; Failure when the text is no name."""
    return layout.releases / _check_name(release, "release")


def find_runtime(layout: Layout, runtime: str) -> Path:
    """Return a runtime's folder; Failure when it is not there."""
    path = place_runtime(layout, runtime)
    if not path.is_dir():
        raise Failure("request", f"runtime {runtime} is not on the device")
    return path


def place_runtime(layout: Layout, runtime: str) -> Path:
    """Return a runtime's folder, which need not be there; Failure when the text is no name."""
    return layout.runtimes / _check_name(runtime, "runtime")


def _check_name(name: str, kind: str) -> str:
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_")
    if not name or name[0] in ".-" or not set(name) <= allowed:
        raise Failure("request", f"{name!r} is no name of a {kind}")
    return name


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _remove_folder(final: Path) -> None:
    """Take the name away first, so that half a folder never has it."""
    fresh = final if final.name[0] == "." else _temporary(final)
    if final.is_dir() and fresh != final:
        shutil.rmtree(fresh, ignore_errors=True)
        final.replace(fresh)
        sync_folder(final.parent)
    shutil.rmtree(fresh, ignore_errors=True)


def _list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name[0] != ".")


def _list_links(layout: Layout) -> Iterable[Path]:
    """Every link in every release, to blobs and runtimes."""
    for release in layout.releases.iterdir():
        for folder, folders, files in os.walk(str(release)):
            yield from (Path(folder) / name for name in folders + files)


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
    link.symlink_to(_relative(blob, link.parent))


def _relative(path: Path, folder: Path) -> str:
    return os.path.relpath(str(path), str(folder))
