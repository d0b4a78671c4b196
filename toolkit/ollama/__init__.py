"""Install a GGUF artifact in a device's Ollama: upload by digest, ask, switch by tag, go back.

Tags of NAME: one for each artifact (the first digits of its manifest's sha256), `latest` in use,
`previous` to roll back to, and `good` while a new one is on trial.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from toolkit.artifact import MANIFEST, Manifest, Smoke, read_manifest
from toolkit.console import Console, format_bytes
from toolkit.deploy import Push, Release, prepare_release
from toolkit.device import Device, Health
from toolkit.errors import (
    ArtifactError,
    PhishipError,
    PreflightError,
    RolledBackError,
    SmokeError,
    StrandedError,
)
from toolkit.formats.gguf.ollama import (
    MODELFILE,
    OllamaModel,
    describe_chat,
    has_phi3_turns,
    read_modelfile,
)
from toolkit.ollama.client import Ollama
from toolkit.report import Report
from toolkit.smoke import Answer, check_answer, check_health, describe, describe_limits, quote
from toolkit.ssh.embedded import running
from toolkit.ssh.tunnel import LOOPBACK, tunneling

PORT = 11434
DIGITS = 12
LATEST, PREVIOUS, GOOD = "latest", "previous", "good"
LONGEST_NAME = 80
OWN_TAG = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Target:
    """Where a model is installed: an Ollama, its version, the model's name, its stop texts."""

    ollama: Ollama
    version: str
    name: str
    stop_texts: tuple[str, ...]

    def tag(self, tag: str) -> str:
        """NAME:TAG."""
        return f"{self.name}:{tag}"

    def ask(self, tag: str, smoke: Smoke) -> Answer:
        """Ask and judge; SmokeError for a wrong answer, and for one that does not stop."""
        answer = self.ollama.ask(self.tag(tag), smoke, self.version)
        device = self.ollama.device
        check_answer(device, answer, smoke)
        if leaked := [text for text in self.stop_texts if text in answer.text]:
            raise SmokeError(
                f"{device}: Ollama did not stop at {leaked[0]}: it answered {quote(answer.text)}",
                advice="the Modelfile's stops are not the model's: build the artifact again",
            )
        return answer


def install(
    artifact: Path,
    base_url: str,
    device: str,
    console: Console,
    push: Push | None = None,
    *,
    limits: Health | None = None,
    report: Report | None = None,
    address: str = "",
) -> Report:
    """Put a GGUF artifact into use in the Ollama at `base_url`; `device` is a name for errors.

    `address` is what errors call the base URL, when that is a tunnel's.

    Raises ArtifactError, UnreachableError, PreflightError, RunnerError, SmokeError: what was in use
    still is, and nothing half-installed is left; or RolledBackError, StrandedError.
    """
    report = report or Report(f"install {artifact.name} in Ollama on {device}")
    push = push or Push()
    with report.step("check artifact") as step:
        release = prepare_release(artifact, push)
        model = read_model(artifact, release.manifest)
        warning = release.manifest.runtime.warn_others()
        step.measured = format_bytes(release.manifest.size_bytes) + warning
    ollama = Ollama(device, base_url, address or base_url)
    target = _connect(ollama, release.manifest, report)
    if push.dry_run:
        with report.step("compare") as step:
            there = target.ollama.has_blob(_weights_sha256(release))
            step.measured = "the weights are there" if there else "the weights are to be sent"
        return report
    _recover(target, report)
    tag = release.files[MANIFEST][:DIGITS]
    with _created(target, tag, release, model, artifact, console, report):
        staged = _smoke_test(target, tag, release.smoke, report)
        _put_into_use(target, tag, staged, release.smoke, limits or Health(), report)
    _prune(target, report)
    return report


def install_on_device(
    artifact: Path,
    device: Device,
    console: Console,
    push: Push | None = None,
    *,
    report: Report | None = None,
    port: int = PORT,
) -> Report:
    """As `install`, in the Ollama at a port of the device's loopback, through SSH."""
    with running(device) as started, tunneling(started, port) as local_port:
        base_url = f"http://{LOOPBACK}:{local_port}"
        return install(
            artifact, base_url, started.name, console, push, limits=device.health, report=report,
            address=f"{LOOPBACK}:{port} there",
        )  # fmt: skip


def roll_back_on_device(
    artifact: Path,
    device: Device,
    report: Report,
    *,
    smoke: Smoke | None = None,
    port: int = PORT,
) -> None:
    """As `roll_back`, for the model that an artifact was installed as, through SSH."""
    manifest = read_manifest(artifact)
    with running(device) as started, tunneling(started, port) as local_port:
        base_url = f"http://{LOOPBACK}:{local_port}"
        roll_back(
            base_url, started.name, manifest, report, smoke=smoke, limits=device.health,
            address=f"{LOOPBACK}:{port} there",
        )  # fmt: skip


def roll_back(
    base_url: str,
    device: str,
    manifest: Manifest,
    report: Report,
    *,
    smoke: Smoke | None = None,
    limits: Health | None = None,
    address: str = "",
) -> None:
    """Put NAME:previous into use again, after the same tests; `manifest` gives NAME and question.

    PreflightError when there is no previous one; otherwise as `install`.
    """
    question = smoke or manifest.smoke
    if question is None:
        raise ArtifactError(
            f"{manifest.name}: its manifest has no smoke test",
            advice="give a question and a part of its answer: --prompt TEXT --expect TEXT",
        )
    target = _connect(Ollama(device, base_url, address or base_url), manifest, report)
    _recover(target, report)
    if target.tag(PREVIOUS) not in target.ollama.list_tags():
        raise PreflightError(
            f"{device}: Ollama has no {target.tag(PREVIOUS)}: nothing to return to",
            advice="install an artifact again",
        )
    staged = _smoke_test(target, PREVIOUS, question, report)
    _put_into_use(target, PREVIOUS, staged, question, limits or Health(), report)


def name_model(name: str) -> str:
    """An artifact's name as Ollama takes it: letters, digits, dashes, dots, underscores."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[:LONGEST_NAME]
    return safe or "model"


def read_model(artifact: Path, manifest: Manifest) -> OllamaModel:
    """Template, stops and context: of the artifact's Modelfile, or else of its manifest.

    The manifest's also for a fine-tune with turns of its own, which no Modelfile knows.
    ArtifactError when the artifact is no GGUF.
    """
    if manifest.format != "gguf":
        raise ArtifactError(
            f"{artifact}: Ollama runs GGUF; this artifact is {manifest.format}",
            advice="build one with a recipe of the format gguf: phiship list",
        )
    path = artifact / MODELFILE
    if not path.is_file() or not has_phi3_turns(manifest.chat):
        return describe_chat(manifest.chat, manifest.context_length)
    return read_modelfile(path.read_text(encoding="utf-8"), str(path))


def _connect(ollama: Ollama, manifest: Manifest, report: Report) -> Target:
    with report.step("connect") as step:
        version = ollama.read_version()
        step.measured = f"Ollama {version} at {ollama.address}"
    return Target(ollama, version, name_model(manifest.name), manifest.chat.stop_texts)


def _weights_sha256(release: Release) -> str:
    return release.files[release.manifest.runtime.main_file]


def _recover(target: Target, report: Report) -> None:
    """Return to the good model when an earlier installation ended while one was on trial."""
    tags = target.ollama.list_tags()
    if target.tag(GOOD) not in tags:
        return
    with report.step("recover") as step:
        _return_to_good(target)
        step.measured = f"an earlier installation was cut off: {target.tag(LATEST)} is as before it"


@contextmanager
def _created(
    target: Target, tag: str, release: Release, model: OllamaModel, artifact: Path,
    console: Console, report: Report,
) -> Iterator[None]:  # fmt: skip
    """Create NAME:tag unless it is there; when the block fails, a new one is deleted again."""
    ollama, full = target.ollama, target.tag(tag)
    if full in ollama.list_tags():
        with report.step("create") as step:
            step.measured = f"{full} was there"
        yield
        return
    main_file = release.manifest.runtime.main_file
    sha256 = _weights_sha256(release)
    _transfer(ollama, artifact / main_file, sha256, console, report)
    try:
        with report.step("create") as step:
            ollama.create(full, {main_file: sha256}, model.template, model.parameters)
            step.measured = full
        yield
    except BaseException:
        _delete_quietly(ollama, full)
        raise


def _transfer(ollama: Ollama, path: Path, sha256: str, console: Console, report: Report) -> None:
    size_bytes = path.stat().st_size
    with report.step("transfer", limit="sha256") as step:
        if ollama.has_blob(sha256):
            step.measured = "the weights were there"
            return
        with console.progress(f"sending to {ollama.device}", size_bytes) as bar:
            ollama.send_blob(path, sha256, bar)
        step.measured = f"{format_bytes(size_bytes)} sent"


def _delete_quietly(ollama: Ollama, tag: str) -> None:
    """What has failed already is the error to tell."""
    with suppress(PhishipError):
        ollama.delete(tag)


def _smoke_test(target: Target, tag: str, smoke: Smoke, report: Report) -> Answer:
    with report.step("smoke test", limit=describe(smoke)) as step:
        answer = target.ask(tag, smoke)
        step.measured = f"{quote(smoke.prompt)}: {answer.describe()}"
    return answer


def _put_into_use(
    target: Target, tag: str, staged: Answer, smoke: Smoke, limits: Health, report: Report
) -> None:
    """Copy NAME:tag to NAME:latest, ask again, keep the one before.

    Whatever ends that, Ctrl-C too, gives NAME:latest back to what had it.
    """
    ollama = target.ollama
    before, new = (ollama.list_tags().get(target.tag(name)) for name in (LATEST, tag))
    is_change = before != new
    is_switched = False
    try:
        with report.step("switch") as step:
            step.measured = f"to {target.tag(tag)}" if is_change else "was in use already"
            if is_change and before:
                ollama.copy(target.tag(LATEST), target.tag(GOOD))
            if is_change:
                ollama.copy(target.tag(tag), target.tag(LATEST))
        is_switched = is_change
        with report.step("health", limit=describe_limits(smoke, limits)) as step:
            answer = target.ask(LATEST, smoke)
            step.measured = answer.describe()
            _check_same(ollama.device, answer, staged)
            check_health(ollama.device, answer, staged, limits, ())
    except BaseException as error:
        if is_switched and isinstance(error, PhishipError):
            _return(target, bool(before), error, report)
        if is_change:
            with suppress(PhishipError):  # what has failed already is the error to tell
                _give_back(target, bool(before))
        raise
    if is_change and before:
        with report.step("confirm") as step:
            ollama.copy(target.tag(GOOD), target.tag(PREVIOUS))
            ollama.delete(target.tag(GOOD))
            step.measured = f"the one before is {target.tag(PREVIOUS)}"


def _check_same(device: str, answer: Answer, staged: Answer) -> None:
    if answer.text != staged.text:
        raise SmokeError(
            f"{device}: in use it answers {quote(answer.text)}; staged it had answered "
            f"{quote(staged.text)}"
        )


def _return(target: Target, had_before: bool, reason: PhishipError, report: Report) -> NoReturn:
    """Give NAME:latest back to what had it, and raise what tells so."""
    device = target.ollama.device
    try:
        with report.step("return") as step:
            _give_back(target, had_before)
            step.measured = "to the one before" if had_before else "to nothing"
    except PhishipError as error:
        raise StrandedError(
            f"{reason}; and the way back failed: {error}",
            advice=f"on the device: ollama cp {target.tag(GOOD)} {target.tag(LATEST)}",
        ) from error
    back = "the one before" if had_before else "nothing, as before"
    raise RolledBackError(
        f"{reason}; {target.tag(LATEST)} on {device} is back on {back}", advice=reason.advice
    ) from reason


def _give_back(target: Target, had_before: bool) -> None:
    """NAME:latest to the good one, or to nothing when nothing had it."""
    if had_before:
        _return_to_good(target)
    else:
        target.ollama.delete(target.tag(LATEST))


def _return_to_good(target: Target) -> None:
    target.ollama.copy(target.tag(GOOD), target.tag(LATEST))
    target.ollama.delete(target.tag(GOOD))


def _prune(target: Target, report: Report) -> None:
    """Delete artifacts' tags that are neither in use nor the ones to return to."""
    with report.step("prune") as step:
        tags = target.ollama.list_tags()
        kept = {tags.get(target.tag(name)) for name in (LATEST, PREVIOUS)}
        stale = [
            full
            for full, digest in tags.items()
            if full.startswith(f"{target.name}:")
            and OWN_TAG.fullmatch(full.partition(":")[2])
            and digest not in kept
        ]
        for full in stale:
            target.ollama.delete(full)
        step.measured = f"{len(stale)} tags"
