"""Convert: the data files of all jobs, their tensors side by side.

Codes that are chosen on a text come first, layer by layer (calibrate.py); everything else then goes
through in one pass over the checkpoint (stream.py).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from toolkit import fileio, formats
from toolkit.calibrate import bytes_to_do, calibrate
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.merged import without_adapter
from toolkit.coding import Calibrated
from toolkit.console import format_bytes
from toolkit.errors import PhishipError
from toolkit.job import Building, Job
from toolkit.quality.texts import Text
from toolkit.staging import Staging
from toolkit.stream import Output, list_tasks, open_output, stream


def convert(jobs: Sequence[Job], staged: Mapping[str, Staging], building: Building) -> None:
    """Write the data files of all jobs; an artifact's error becomes its result.

    Those of which an adapter stays apart are made of the checkpoint without it.
    """
    base = replace(building, checkpoint=without_adapter(building.checkpoint))
    _convert([job for job in jobs if not job.plan.recipe.adapter_apart], staged, building)
    _convert([job for job in jobs if job.plan.recipe.adapter_apart], staged, base)


def _convert(jobs: Sequence[Job], staged: Mapping[str, Staging], building: Building) -> None:
    outputs = {}
    for job in jobs:
        with building.attempt(job.name):
            outputs[job.name] = _open_output(job, staged[job.name], building.checkpoint)
    texts = {job.text.digest: job.text for job in jobs if job.text}
    for text in texts.values():
        same = [job for job in jobs if job.text == text and job.name in outputs]
        for name in _calibrate(same, text, outputs, staged, building) if same else ():
            del outputs[name]
    if outputs:
        _stream([job for job in jobs if job.name in outputs], outputs, staged, building)


def _calibrate(
    jobs: Sequence[Job], text: Text, outputs: dict[str, Output], staged: Mapping[str, Staging],
    building: Building,
) -> list[str]:  # fmt: skip
    """Write the codes that are chosen on one text; returns the names of those that failed."""
    checkpoint, decoder = building.checkpoint, building.decoder
    done = {job.name: set(staged[job.name].done) for job in jobs}
    artifacts = [
        Calibrated(outputs[job.name], job.plan.recipe.quantization, done[job.name]) for job in jobs
    ]
    folders = [staged[job.name].folder for job in jobs]
    try:
        with building.report.step("calibrate") as step, _Clock() as clock:
            total_bytes = bytes_to_do(checkpoint, decoder, artifacts)
            label = f"calibrate {_title(jobs, building)}"
            with building.console.progress(label, total_bytes) as advance:
                calibrate(checkpoint, decoder, text, artifacts, folders, advance)
            step.measured = f"{text.count} tokens of {text.name}, {clock.spent_s:.1f} s of CPU"
    except (PhishipError, OSError) as error:  # what concerns them all
        for artifact in artifacts:
            artifact.error = artifact.error or _explain(error)
    for job, artifact in zip(jobs, artifacts, strict=True):
        outputs[job.name] = replace(outputs[job.name], done=artifact.done)
        _note(job.name, artifact.error, building)
    return [job.name for job, artifact in zip(jobs, artifacts, strict=True) if artifact.error]


def _stream(
    jobs: Sequence[Job], outputs: Mapping[str, Output], staged: Mapping[str, Staging],
    building: Building,
) -> None:  # fmt: skip
    """Write all that is not written yet in one pass over the checkpoint."""
    checkpoint = building.checkpoint
    read_bytes = sum(
        piece.weights * checkpoint.tensors[piece.tensor].item_bytes
        for job in jobs
        for number, piece in list_tasks(outputs[job.name])
        if job.text is None or number not in outputs[job.name].done
    )
    with building.report.step("convert") as step, _Clock() as clock:
        label = f"convert {_title(jobs, building)}"
        with building.console.progress(label, read_bytes) as advance:
            errors = stream(checkpoint, [*outputs.values()], jobs[0].plan.workers, advance)
        step.measured = f"{format_bytes(read_bytes)} read, {clock.spent_s:.1f} s of CPU"
        if any(staged[name].is_resumed for name in outputs):
            step.measured += ", less what a killed build had finished"
    for index, error in errors.items():
        _note(list(outputs)[index], error, building)


def _explain(error: PhishipError | OSError) -> PhishipError:
    return error if isinstance(error, PhishipError) else fileio.explain_write_error(error)


def _title(jobs: Sequence[Job], building: Building) -> str:
    return jobs[0].name if building.is_alone else f"{len(jobs)} artifacts"


def _note(name: str, error: PhishipError | None, building: Building) -> None:
    """Make an error the artifact's result and a step of the report."""
    if error:
        with building.attempt(name), building.report.step(f"convert: {name}"):
            raise error


def _open_output(job: Job, staging: Staging, checkpoint: Checkpoint) -> Output:
    """The data file with its header written, at its full size."""
    plan = job.plan
    module = formats.get(plan.recipe.format)
    header = module.header_bytes(plan.recipe, plan.decoder, checkpoint)
    return open_output(
        plan.data, staging.folder, header, staging.done, staging.record,
        is_resumed=staging.is_resumed,
    )  # fmt: skip


class _Clock:
    """CPU time of this process and its children since the block began."""

    def __enter__(self) -> "_Clock":
        self._before_s = _cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        return

    @property
    def spent_s(self) -> float:
        """Seconds until now."""
        return _cpu_seconds() - self._before_s


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
