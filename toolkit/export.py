"""Export: the vendor's own converter makes the artifact; memory and disk are looked at first."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from toolkit import formats
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.split import FusedCheckpoint
from toolkit.console import Console, format_bytes
from toolkit.errors import BuildError, PlanError
from toolkit.plan import Plan
from toolkit.vendor import Export, Places, Vendor
from toolkit.vendor.environment import Environment, digest_lock, locate
from toolkit.vendor.running import Cost, run

DIGEST_DIGITS = 12
LOCK_KEY = "vendor lock"
NATIVE = "use `engine: native` (--engine native), which takes 0.3 GB"


def digest_vendor(format_name: str) -> str:
    """The start of the lock's digest, as manifests record it."""
    return digest_lock(formats.get_vendor(format_name).VENDOR)[:DIGEST_DIGITS]


@dataclass(frozen=True)
class Exporter:
    """A vendor whose environment is there, and how it will make one artifact."""

    vendor: Vendor
    environment: Environment
    export: Export
    places: Places

    @property
    def tools(self) -> dict[str, str]:
        """What the manifest says of the tools: the engine, the lock, the vendor's versions."""
        found = {**self.environment.versions, **self.vendor.versions}
        names = (*self.vendor.packages, *self.vendor.versions)
        return {
            "engine": f"vendor: {self.vendor.title}",
            LOCK_KEY: self.environment.digest[:DIGEST_DIGITS],
            **{f"vendor {name}": found[name] for name in names if name in found},
        }


@contextmanager
def open_exporter(plan: Plan, checkpoint: Checkpoint, folder: Path) -> Iterator[Exporter]:
    """Plan the vendor's commands for `folder`; scratch files are beside it and go at the end.

    MissingExtraError without the environment, PlanError when the vendor cannot do the recipe.
    """
    module = formats.get_vendor(plan.recipe.format)
    if isinstance(checkpoint, FusedCheckpoint):
        raise PlanError(
            f"{plan.recipe.name}: engine: vendor would make a model with split projections, as "
            f"{checkpoint.folder} stores them; artifacts here have fused ones",
            advice=NATIVE,
        )
    environment = locate(module.VENDOR)
    # A name that the next build of this recipe clears away, should this one be killed.
    scratch = folder.with_name(f".{plan.recipe.name}.scratch.{os.getpid()}.partial")
    scratch.mkdir()
    try:
        places = Places(environment.folder, folder, scratch)
        export = module.plan_export(plan.recipe, plan.decoder, checkpoint, places)
        yield Exporter(module.VENDOR, environment, export, places)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_memory(exporter: Exporter, budget_bytes: int | None, force: bool) -> None:
    """PlanError when the vendor is predicted to take more memory than there is, or than allowed."""
    need_bytes = exporter.export.memory_bytes
    free_bytes = psutil.virtual_memory().available
    if budget_bytes is not None and need_bytes > budget_bytes:
        limit = f"--memory allows {format_bytes(budget_bytes)}"
    elif need_bytes > free_bytes:
        limit = f"{format_bytes(free_bytes)} are free here"
    else:
        return
    if not force:
        raise PlanError(
            f"{exporter.vendor.title} is predicted to take {format_bytes(need_bytes)} of memory "
            f"for this checkpoint; {limit}",
            advice=f"{NATIVE}; --force-memory tries all the same",
        )


def check_disk(exporter: Exporter, plan: Plan) -> None:
    """BuildError when scratch files and artifact do not fit together."""
    need_bytes = plan.artifact_bytes + exporter.export.scratch_bytes
    free_bytes = shutil.disk_usage(exporter.places.scratch).free
    if need_bytes > free_bytes:
        raise BuildError(
            f"{exporter.places.scratch.parent}: {format_bytes(free_bytes)} free; "
            f"{exporter.vendor.title} takes {format_bytes(need_bytes)}, scratch files included",
            advice=f"free space, choose another --out, or {NATIVE}",
        )


def run_export(exporter: Exporter, log: Path, console: Console) -> Cost:
    """Run the vendor's commands; BuildError, with the log's last lines, when one fails."""
    log.write_bytes(b"")
    scratch = exporter.places.scratch
    ours = {
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "HF_HOME": str(scratch / "hf"),
        "TMPDIR": str(scratch),
    }
    total = Cost()
    for command in exporter.export.commands:
        variables = {**ours, **exporter.vendor.variables, **command.variables}
        total += run(
            replace(command, variables=variables),
            log,
            console,
            memory_bytes=exporter.export.memory_bytes,
            advice=NATIVE,
        )
    if exporter.export.result is not None:
        for path in exporter.export.result.iterdir():
            path.rename(exporter.places.out / path.name)
    for path in exporter.places.out.rglob("*.py"):
        path.unlink()  # a checkpoint's own code, which mlx-lm copies, has no place on a device
    return total
