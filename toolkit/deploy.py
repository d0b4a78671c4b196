"""Push an artifact to a device, let it answer there, switch to it, and go back when it fails."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from toolkit.artifact import (
    MANIFEST,
    Manifest,
    Smoke,
    hash_file,
    make_safe,
    read_manifest,
    verify_files,
)
from toolkit.console import Console, format_bytes
from toolkit.device import Device, Facts
from toolkit.errors import (
    ArtifactError,
    PreflightError,
)
from toolkit.preflight import check_disk, check_facts, describe_facts, describe_needs, suggest
from toolkit.remote import Status, read_facts, read_remote_manifest
from toolkit.report import Report
from toolkit.runner.engines import list_engines
from toolkit.runtime import Choice, choose_runtime, install_runtime
from toolkit.smoke import ask as ask_runner
from toolkit.ssh.bundle import pack_runner
from toolkit.ssh.carrier import Carrier, choose_carrier
from toolkit.ssh.embedded import running
from toolkit.ssh.session import Session, open_session
from toolkit.ssh.transfer import Blob, Missing, find_missing, send_parts
from toolkit.trial import Ask, Trial, put_into_use

OWN_PROGRAM = Choice(None, "a program of the device's own")


@dataclass(frozen=True)
class Push:
    """How to push; `bytes_per_s` limits the bandwidth, `dry_run` ends before anything is sent.

    `has_engine`: the release runs in another program of the device, which answers to `ask`.
    """

    accept_unchecked: bool = False
    smoke: Smoke | None = None
    carrier: Carrier = "auto"
    bytes_per_s: int | None = None
    dry_run: bool = False
    has_engine: bool = False
    ask: Ask = ask_runner


@dataclass(frozen=True)
class Release:
    """An artifact on its way: its id on the device, and every file as a blob."""

    id: str
    manifest: Manifest
    smoke: Smoke
    blobs: tuple[Blob, ...]
    files: dict[str, str]


def deploy(
    artifact: Path,
    device: Device,
    console: Console,
    push: Push = Push(),
    *,
    report: Report | None = None,
) -> Report:
    """Push, verify, stage, smoke-test, switch, confirm. A `report` is filled even on failure.

    Raises ArtifactError, UnreachableError, HostKeyError, PreflightError, RunnerError, SmokeError:
    the release in use is then the one that was; or RolledBackError, StrandedError.
    """
    report = report or Report(f"deploy {artifact.name} to {device.name}")
    with report.step("check artifact") as step:
        release = prepare_release(artifact, push)
        _check_engine(release.manifest)
        size_bytes = release.manifest.size_bytes
        step.measured = f"{len(release.manifest.files)} files, {format_bytes(size_bytes)}"
        if push.has_engine:
            step.measured += release.manifest.runtime.warn_others()
    with _connect(device, push.carrier, size_bytes, report) as session:
        facts = _preflight(session, release.manifest, report, has_engine=push.has_engine)
        runtime = OWN_PROGRAM
        if not push.has_engine:
            with report.step("runtime") as step:
                runtime = choose_runtime(session, facts, release.manifest, console)
                step.measured = runtime.text
        release = _add_runtime(release, runtime)
        if not push.dry_run:
            _lock(session, report)
        missing = _compare(session, release, console, report)
        _check_disk(session, facts, release.manifest, missing, runtime, report)
        if not push.dry_run:
            _transfer(session, missing, push, console, report)
            _stage(session, release, runtime, report)
            need_bytes = release.manifest.device_memory_bytes
            trial = Trial(
                release.id, release.smoke, need_bytes, is_new=True, has_engine=push.has_engine,
                ask=push.ask,
            )  # fmt: skip
            put_into_use(session, trial, report)
            _prune(session, report)
    return report


def roll_back(
    device: Device,
    report: Report,
    *,
    to: str | None = None,
    smoke: Smoke | None = None,
    ask: Ask = ask_runner,
) -> None:
    """Put the previous release, or the one named, into use again, with the same tests.

    Raises what `deploy` raises from the smoke test on; PreflightError when there is no such
    release.
    """
    with _connect(device, "paramiko", 0, report) as session:
        _lock(session, report)
        with report.step("choose release") as step:
            release = _choose(device.name, msgspec.convert(session.call("status"), Status), to)
            manifest = read_remote_manifest(session, release)
            question = smoke or _find_question(device.name, manifest)
            step.measured = release
        need_bytes = manifest.device_memory_bytes
        trial = Trial(release, question, need_bytes, is_new=False, ask=ask)
        put_into_use(session, trial, report)


def prepare_release(artifact: Path, push: Push) -> Release:
    """Verify an artifact's files against its manifest and list what goes to the device."""
    manifest = read_manifest(artifact)
    if not manifest.quality.checked and not push.accept_unchecked:
        raise ArtifactError(
            f"{artifact}: sealed as unchecked: nobody has compared it with its source",
            advice="check it with: phiship check ARTIFACT, or deploy it with --accept-unchecked",
        )
    question = push.smoke or manifest.smoke
    if question is None:
        raise ArtifactError(
            f"{artifact}: its manifest has no smoke test, so the device's answer cannot be judged",
            advice="give a question and a part of its answer: --prompt TEXT --expect TEXT",
        )
    verify_files(artifact, manifest.files)
    return _list_blobs(artifact, manifest, question)


def name_release(name: str, manifest_sha256: str, runner_sha256: str, runtime: str = "") -> str:
    """Return a release's id; it covers runner and runtime, for a release is never changed."""
    safe = make_safe(name)
    around = hashlib.sha256(f"{runner_sha256} {runtime}".encode()).hexdigest()
    return f"{safe}-{manifest_sha256[:12]}-{around[:6]}"


def _check_engine(manifest: Manifest) -> None:
    if manifest.runtime.engine not in list_engines():
        raise ArtifactError(
            f"{manifest.name} runs in {manifest.runtime.engine}, for which there is no runner",
            advice="it is for apps: phiship bundle ARTIFACT, or phiship deploy ARTIFACT adb",
        )


def _add_runtime(release: Release, runtime: Choice) -> Release:
    """The release as it will be on the device, with the runtime in its id."""
    manifest_sha256 = release.files[MANIFEST]
    name = release.manifest.name
    return replace(
        release,
        id=name_release(name, manifest_sha256, release.files["runner.pyz"], runtime.id or ""),
        blobs=(*release.blobs, *runtime.blobs),
    )


def _list_blobs(artifact: Path, manifest: Manifest, smoke: Smoke) -> Release:
    manifest_path = artifact / MANIFEST
    manifest_sha256 = hash_file(manifest_path)
    blobs = [
        Blob(file.path, artifact / file.path, file.sha256, file.size_bytes)
        for file in manifest.files
    ]
    blobs.append(Blob(MANIFEST, manifest_path, manifest_sha256, manifest_path.stat().st_size))
    runner = pack_runner()
    return Release(
        id=name_release(manifest.name, manifest_sha256, runner.sha256),
        manifest=manifest,
        smoke=smoke,
        blobs=tuple(blobs),
        files={**{blob.name: blob.sha256 for blob in blobs}, "runner.pyz": runner.sha256},
    )


@contextmanager
def _connect(device: Device, asked: Carrier, size_bytes: int, report: Report) -> Iterator[Session]:
    with ExitStack() as opened:
        with report.step("connect") as step:
            started = opened.enter_context(running(device))
            carrier = choose_carrier(started, asked, size_bytes)
            session = opened.enter_context(open_session(started, carrier))
            step.measured = f"{started.address} through {carrier}"
        yield session


def _preflight(session: Session, manifest: Manifest, report: Report, *, has_engine: bool) -> Facts:
    with report.step("preflight", limit=describe_needs(manifest)) as step:
        runtime = manifest.runtime
        facts = read_facts(session, "" if has_engine else runtime.engine, runtime.companions)
        step.measured = describe_facts(facts)
        brings = session.device.runtime == "auto"
        findings = check_facts(
            session.device.name, facts, manifest, installs=brings, has_engine=has_engine
        )
        step.measured = describe_facts(facts, findings)
    return facts


def _lock(session: Session, report: Report) -> None:
    """Be the only push; say so when an earlier one had left a release on trial."""
    with report.step("lock") as step:
        returned = session.lock()["returned"]
        step.measured = "taken"
        if returned:
            step.measured += (
                f"; an earlier push ended before {returned['failed']} was confirmed: back to "
                f"{returned['current']}"
            )


def _compare(session: Session, release: Release, console: Console, report: Report) -> Missing:
    total_bytes = sum(blob.size_bytes for blob in release.blobs)
    with (
        report.step("compare", limit="sha256 of every file") as step,
        console.progress("comparing", total_bytes) as bar,
    ):
        missing = find_missing(session, release.blobs, bar)
        damaged = f", {missing.corrupt} damaged there" if missing.corrupt else ""
        resumed = missing.resumed_bytes
        begun = f", {format_bytes(resumed)} have arrived before" if resumed else ""
        step.measured = (
            f"{len(missing.parts)} of {len(release.blobs)} files to send, "
            f"{format_bytes(missing.size_bytes)}{begun}{damaged}"
        )
    return missing


def _check_disk(
    session: Session, facts: Facts, manifest: Manifest, missing: Missing, runtime: Choice,
    report: Report,
) -> None:  # fmt: skip
    with report.step("disk") as step:
        step.measured = f"{format_bytes(missing.free_bytes)} free"
        check_disk(
            session.device.name,
            missing.size_bytes,
            missing.free_bytes,
            wheel_bytes=runtime.unpacked_bytes,
            list_fits=partial(suggest, facts, manifest),
        )


def _transfer(
    session: Session, missing: Missing, push: Push, console: Console, report: Report
) -> None:
    with (
        report.step("transfer", limit="sha256 of every file") as step,
        console.progress(f"sending to {session.device.name}", missing.size_bytes) as bar,
    ):
        send_parts(session, missing.parts, bar, push.bytes_per_s)
        step.measured = f"{format_bytes(missing.size_bytes)} sent"


def _stage(session: Session, release: Release, runtime: Choice, report: Report) -> None:
    if runtime.wheels:
        with report.step("install") as step:
            step.measured = install_runtime(session, runtime, release.manifest)
    with report.step("stage") as step:
        answer = session.call("stage", release=release.id, files=release.files, runtime=runtime.id)
        step.measured = release.id + ("" if answer["created"] else " (was there)")


def _prune(session: Session, report: Report) -> None:
    with report.step("prune") as step:
        pruned = session.call("prune")
        count, freed = len(pruned["releases"]), format_bytes(pruned["freed_bytes"])
        step.measured = f"{count} releases, {freed} freed"


def _choose(device: str, status: Status, to: str | None) -> str:
    others = [name for name in status.releases if name != status.current]
    release = to or status.previous
    if release is None or release not in status.releases:
        wanted = f"no release {to}" if to else "no release before the one in use"
        raise PreflightError(
            f"{device}: there is {wanted}; besides it are there: {', '.join(others) or 'none'}",
            advice="deploy the artifact again",
        )
    return release


def _find_question(device: str, manifest: Manifest) -> Smoke:
    if manifest.smoke is None:
        raise ArtifactError(
            f"{device}: {manifest.name} has no smoke test of its own",
            advice="give a question and a part of its answer: --prompt TEXT --expect TEXT",
        )
    return manifest.smoke
