"""Push an artifact to a device, let it answer there, and switch to it when the answer is right."""

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from toolkit.artifact import MANIFEST, Manifest, Smoke, hash_file, read_manifest, verify_files
from toolkit.console import Console, format_bytes
from toolkit.device import Device, Facts
from toolkit.errors import ArtifactError, PreflightError, RunnerError, SmokeError
from toolkit.report import Report
from toolkit.ssh.agent import Agent, start_agent
from toolkit.ssh.bundle import pack_runner
from toolkit.ssh.connection import connect
from toolkit.ssh.embedded import running
from toolkit.ssh.transfer import Blob, Missing, find_missing, send_blobs

# What stays free on the device, for logs and for the system itself.
DISK_RESERVE_BYTES = 64_000_000
ANSWER_TIMEOUT_S = 900
CONNECTION_SLACK_S = 60
SHOWN_CHARACTERS = 300
# Every runtime there is needs a 64-bit userland of one of these.
MACHINES = ("x86_64", "amd64", "aarch64", "arm64")


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the runner says of one answer; rates and times are the device's own."""

    text: str
    prompt_tokens: int
    new_tokens: int
    tokens_per_second: float
    first_token_seconds: float
    load_seconds: float
    peak_memory_bytes: int
    provider: str
    engine: str
    stop_reason: str
    token_ids: tuple[int, ...]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What is on a device; `state` names the good release, which a rollback would return to."""

    root: str
    current: str | None
    previous: str | None
    state: dict[str, Any]
    releases: tuple[str, ...]
    blobs: int
    blob_bytes: int
    incoming: tuple[str, ...]
    free_bytes: int


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
    *,
    accept_unchecked: bool = False,
    smoke: Smoke | None = None,
    report: Report | None = None,
) -> Report:
    """Push, verify, stage, smoke-test, switch. A `report` passed in is filled even on failure.

    Raises ArtifactError, UnreachableError, HostKeyError, PreflightError, RunnerError or
    SmokeError; the release in use on the device is then the one that was in use before.
    """
    report = report or Report(f"deploy {artifact.name} to {device.name}")
    with report.step("check artifact") as step:
        release = prepare_release(artifact, smoke, accept_unchecked=accept_unchecked)
        size_bytes = release.manifest.size_bytes
        step.measured = f"{len(release.manifest.files)} files, {format_bytes(size_bytes)}"
    with ExitStack() as opened:
        with report.step("connect") as step:
            started = opened.enter_context(running(device))
            agent = start_agent(opened.enter_context(connect(started)))
            step.measured = started.address
        with report.step("preflight", limit=_describe_needs(release.manifest)) as step:
            facts = _read_facts(agent, release.manifest.runtime.engine)
            step.measured = _describe_facts(facts)
            check_facts(device.name, facts, release.manifest)
        opened.enter_context(agent.hold_lock())
        _transfer(agent, release, console, report)
        _stage(agent, release, report)
        _smoke(agent, release, report)
        _switch(agent, release, report)
    return report


def probe(device: Device, engine: str = "") -> Facts:
    """Return a device's facts; with an engine's name, also whether it can be imported there."""
    with running(device) as started, connect(started) as connection:
        return _read_facts(start_agent(connection), engine)


def read_status(device: Device) -> Status:
    """Return what is deployed on a device."""
    with running(device) as started, connect(started) as connection:
        return msgspec.convert(start_agent(connection).call("status"), Status)


def generate(device: Device, prompt: str, max_tokens: int = 256) -> Answer:
    """Ask the release in use a question; RunnerError when there is none or it fails."""
    with running(device) as started, connect(started) as connection:
        return _ask(start_agent(connection), "current", prompt, max_tokens)


def prepare_release(artifact: Path, smoke: Smoke | None, *, accept_unchecked: bool) -> Release:
    """Verify an artifact's files against its manifest and list what goes to the device."""
    manifest = read_manifest(artifact)
    if not manifest.quality.checked and not accept_unchecked:
        raise ArtifactError(
            f"{artifact}: sealed as unchecked: nobody has compared it with its source",
            advice="check it with: phiship check ARTIFACT, or deploy it with --accept-unchecked",
        )
    question = smoke or manifest.smoke
    if question is None:
        raise ArtifactError(
            f"{artifact}: its manifest has no smoke test, so the device's answer cannot be judged",
            advice="give a question and a part of its answer: --prompt TEXT --expect TEXT",
        )
    verify_files(artifact, manifest.files)
    return _list_blobs(artifact, manifest, question)


def check_facts(device: str, facts: Facts, manifest: Manifest) -> None:
    """Raise PreflightError when the device can never run this artifact."""
    if facts.word_bits != 64 or facts.machine.lower() not in MACHINES:
        raise PreflightError(
            f"{device}: {facts.machine} with a {facts.word_bits}-bit userland; the runtimes need "
            f"64 bits and one of {', '.join(MACHINES)}",
            advice="install a 64-bit system on the device",
        )
    _check_engine(device, facts, manifest)
    free_bytes, need_bytes = facts.usable_memory_bytes, manifest.device_memory_bytes
    if free_bytes is not None and free_bytes < need_bytes:
        raise PreflightError(
            f"{device}: {format_bytes(free_bytes)} of memory are available; {manifest.name} needs "
            f"{format_bytes(need_bytes)}",
            advice="stop other programs there, or build with a shorter context or fewer bits",
        )


def check_disk(device: str, missing: Missing) -> None:
    """Raise PreflightError when what has to be sent does not fit on the device."""
    need_bytes = missing.size_bytes + DISK_RESERVE_BYTES
    if missing.blobs and missing.free_bytes < need_bytes:
        raise PreflightError(
            f"{device}: {format_bytes(missing.free_bytes)} of disk are free; "
            f"{format_bytes(missing.size_bytes)} have to be sent and "
            f"{format_bytes(DISK_RESERVE_BYTES)} must stay free",
            advice="free some space there, or choose a folder on another disk: `root:` in "
            "devices.yaml",
        )


def check_answer(device: str, answer: Answer, smoke: Smoke) -> None:
    """Raise SmokeError unless the answer contains what is expected; case, spaces do not count."""
    if _normalize(smoke.expect) not in _normalize(answer.text):
        raise SmokeError(
            f"{device}: asked {_quote(smoke.prompt)}, it answered {_quote(answer.text)}; "
            f"expected was {_quote(smoke.expect)}",
            advice="the device keeps the release it had; check the artifact on this machine first",
        )


def _list_blobs(artifact: Path, manifest: Manifest, smoke: Smoke) -> Release:
    path = artifact / MANIFEST
    manifest_sha256 = hash_file(path)
    blobs = [
        Blob(file.path, artifact / file.path, file.sha256, file.size_bytes)
        for file in manifest.files
    ]
    blobs.append(Blob(MANIFEST, path, manifest_sha256, path.stat().st_size))
    runner = pack_runner()
    return Release(
        id=name_release(manifest.name, manifest_sha256, runner.sha256),
        manifest=manifest,
        smoke=smoke,
        blobs=tuple(blobs),
        files={**{blob.name: blob.sha256 for blob in blobs}, "runner.pyz": runner.sha256},
    )


def name_release(name: str, manifest_sha256: str, runner_sha256: str) -> str:
    """Return a release's id; it covers the runner, for a release is never changed in place."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-") or "artifact"
    return f"{safe}-{manifest_sha256[:12]}-{runner_sha256[:6]}"


def _read_facts(agent: Agent, engine: str) -> Facts:
    return msgspec.convert(agent.call("facts", engine=engine), Facts)


def _describe_needs(manifest: Manifest) -> str:
    memory = format_bytes(manifest.device_memory_bytes)
    return f"{manifest.runtime.package}, {memory} of memory"


def _describe_facts(facts: Facts) -> str:
    memory_bytes = facts.usable_memory_bytes
    memory = "unknown memory" if memory_bytes is None else f"{format_bytes(memory_bytes)} free"
    engine = f"{facts.engine.package} {facts.engine.version}" if facts.engine else ""
    names = (facts.board or facts.system, facts.machine, f"Python {facts.python}", engine, memory)
    return ", ".join(name for name in names if name)


def _check_engine(device: str, facts: Facts, manifest: Manifest) -> None:
    """Raise PreflightError unless the device's Python can import the engine."""
    engine, runtime = facts.engine, manifest.runtime
    if engine is None or engine.importable:
        return
    if engine.signal:
        raise PreflightError(
            f"{device}: importing {engine.module} is killed by {engine.signal}: its wheel uses "
            "instructions that this processor lacks, or is damaged",
            advice=f"install another version of {engine.package} there",
        )
    raise PreflightError(
        f"{device}: {facts.python_path} cannot import {engine.module}: {engine.error}",
        advice=f"install it on the device: {facts.python_path} -m pip install "
        f"{engine.package}=={runtime.version} (phiship does not install runtimes yet), or name "
        "the Python that has it with `python:` in devices.yaml",
    )


def _transfer(agent: Agent, release: Release, console: Console, report: Report) -> None:
    with report.step("compare", limit="sha256 of every file") as step:
        missing = find_missing(agent, release.blobs)
        damaged = f", {missing.corrupt} damaged there" if missing.corrupt else ""
        step.measured = (
            f"{len(missing.blobs)} of {len(release.blobs)} files to send, "
            f"{format_bytes(missing.size_bytes)}{damaged}"
        )
    with report.step("disk", limit=f"{format_bytes(DISK_RESERVE_BYTES)} stay free") as step:
        step.measured = f"{format_bytes(missing.free_bytes)} free"
        check_disk(agent.device.name, missing)
    with (
        report.step("transfer", limit="sha256 of every file") as step,
        console.progress(f"sending to {agent.device.name}", missing.size_bytes) as advance,
    ):
        send_blobs(agent, missing.blobs, advance)
        step.measured = f"{format_bytes(missing.size_bytes)} sent"


def _stage(agent: Agent, release: Release, report: Report) -> None:
    with report.step("stage") as step:
        request = {"release": release.id, "files": release.files}
        answer = agent.change("stage", json.dumps(request).encode())
        step.measured = release.id + ("" if answer["created"] else " (was there)")


def _smoke(agent: Agent, release: Release, report: Report) -> None:
    """Let the staged release answer; it is removed again when it fails."""
    smoke = release.smoke
    with report.step("smoke test", limit=f"contains {_quote(smoke.expect)}") as step:
        try:
            answer = _ask(agent, release.id, smoke.prompt, smoke.max_tokens)
            step.measured = f"{_quote(smoke.prompt)}: {_describe_answer(answer)}"
            check_answer(agent.device.name, answer, smoke)
        except (RunnerError, SmokeError):
            agent.change("discard", release=release.id)
            raise


def _switch(agent: Agent, release: Release, report: Report) -> None:
    with report.step("switch") as step:
        answer = agent.change("switch", release=release.id)
        agent.change("confirm", release=release.id)
        before = answer["previous"] or "nothing"
        step.measured = f"from {before}" if answer["changed"] else "was in use already"


def _ask(agent: Agent, release: str, prompt: str, max_tokens: int) -> Answer:
    """Run a release's own runner on the device; RunnerError says how it ended otherwise."""
    done = agent.call(
        "ask",
        prompt.encode(),
        timeout_s=ANSWER_TIMEOUT_S + CONNECTION_SLACK_S,
        release=release,
        max_tokens=max_tokens,
        answer_timeout_s=ANSWER_TIMEOUT_S,
    )
    answer = done["answer"]
    if answer is None or "error" in answer or done["code"] != 0:
        raise _explain_crash(agent.device.name, done)
    return msgspec.convert(answer, Answer)


def _explain_crash(device: str, done: dict[str, Any]) -> RunnerError:
    error = (done["answer"] or {}).get("error")
    if error:
        return RunnerError(f"{device}: {error['message']}", advice=error["advice"])
    if done["timeout_s"]:
        ended = f"gave no answer within {done['timeout_s']:.0f} s"
    else:
        ended = f"was killed by {done['signal']}" if done["signal"] else f"ended: {done['code']}"
    tail = _quote(done["stderr"].strip()[-SHOWN_CHARACTERS:].replace("\n", " | "))
    advice = {
        "SIGKILL": "the device probably ran out of memory: shorten the context, or use fewer bits",
        "SIGILL": "the runtime's wheel uses instructions this processor lacks: try another version",
    }
    return RunnerError(
        f"{device}: the runner {ended}; its last words: {tail}",
        advice=advice.get(done["signal"], "try the same artifact on this machine"),
    )


def _describe_answer(answer: Answer) -> str:
    return (
        f"{_quote(answer.text)}, {answer.tokens_per_second:.1f} tokens/s, "
        f"loaded in {answer.load_seconds:.1f} s, peak {format_bytes(answer.peak_memory_bytes)}, "
        f"{answer.engine} on {answer.provider}"
    )


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())


def _quote(text: str) -> str:
    """Quote a model's or a device's words; nothing in them can steer a terminal."""
    shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    return repr(shown)
