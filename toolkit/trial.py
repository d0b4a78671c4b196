"""Putting a release into use: asked before the switch and after it, and left when it fails.

The device's own service, where there is one, serves the new release before it counts as good.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from toolkit.artifact import Smoke
from toolkit.console import format_bytes
from toolkit.errors import (
    PhishipError,
    PreflightError,
    RolledBackError,
    RunnerError,
    SmokeError,
    StrandedError,
)
from toolkit.remote import Service, read_facts, read_service
from toolkit.report import Report
from toolkit.smoke import (
    CURRENT,
    Answer,
    ask,
    check_answer,
    check_health,
    describe,
    describe_limits,
    quote,
)
from toolkit.ssh.session import Session

# Lets a release answer a question: its own runner, or another program that serves it.
Ask = Callable[[Session, str, Smoke], Answer]


@dataclass(frozen=True)
class Trial:
    """A release to put into use, and the question it has to answer.

    `need_bytes` is the memory it takes; one that `is_new` is removed when it fails. A device's
    service serves what our own runner can, so `has_engine` and a service exclude each other.
    """

    release: str
    smoke: Smoke
    need_bytes: int
    is_new: bool
    has_engine: bool = False
    ask: Ask = ask


def put_into_use(session: Session, trial: Trial, report: Report) -> None:
    """Smoke test, switch, health gate, confirm; a failure after the switch goes back.

    Raises RunnerError, SmokeError: the release in use is then the one that was; or RolledBackError,
    StrandedError.
    """
    with _keeping_service(session, trial, report) as service:
        _try_release(session, trial, report, service)


def _try_release(session: Session, trial: Trial, report: Report, service: Service) -> None:
    device, release, smoke = session.device, trial.release, trial.smoke
    with report.step("smoke test", limit=describe(smoke)) as step:
        try:
            staged = trial.ask(session, release, smoke)
            step.measured = f"{quote(smoke.prompt)}: {staged.describe()}"
            check_answer(device.name, staged, smoke)
        except (RunnerError, SmokeError):
            if trial.is_new:
                session.call("discard", release=release)
            raise
    with report.step("switch") as step:
        answer = session.call("switch", release=release)
        before = answer["previous"] or "nothing"
        step.measured = f"from {before}" if answer["changed"] else "was in use already"
    try:
        with report.step("health", limit=describe_limits(smoke, device.health)) as step:
            answered = trial.ask(session, CURRENT, smoke)
            throttled = read_facts(session).throttled_now or ()
            step.measured = f"{answered.describe()}{', throttled' if throttled else ''}"
            check_answer(device.name, answered, smoke)
            check_health(device.name, answered, staged, device.health, throttled)
        if service.installed:
            _restart(session, report)
    except (RunnerError, SmokeError) as error:
        if not answer["changed"]:
            raise
        _return(session, release, error, report)
    with report.step("confirm") as step:
        step.measured = session.call("confirm", release=release)["good"]


@contextmanager
def _keeping_service(session: Session, trial: Trial, report: Report) -> Iterator[Service]:
    """Pause the device's service when memory holds one model only; in the end it serves again.

    Whatever happens, it serves the release that is in use then.
    """
    service = read_service(session)
    if service.installed and trial.has_engine:
        raise PreflightError(
            f"{session.device.name}: its service runs our runner, which this release does without",
            advice=f"remove the service: phiship serve {session.device.name} --remove",
        )
    free_bytes = read_facts(session).usable_memory_bytes
    is_paused = (
        service.active
        and free_bytes is not None
        and free_bytes - service.memory_bytes < trial.need_bytes
    )
    if is_paused:
        limit = f"{format_bytes(trial.need_bytes)} of memory"
        with report.step("pause service", limit=limit) as step:
            session.call("pause_service")
            step.measured = f"{service.name} held {format_bytes(service.memory_bytes)}"
    try:
        yield service
    except PhishipError as error:
        is_stale = isinstance(error, RolledBackError)
        if service.installed and (is_paused or is_stale):
            with suppress(PhishipError):  # the first error is the one to tell
                _restart(session, report)
        raise


def _restart(session: Session, report: Report) -> None:
    with report.step("service") as step:
        found = session.call("restart_service")
        step.measured = f"{found['name']} answers on port {found['port']}"


def _return(session: Session, release: str, reason: PhishipError, report: Report) -> None:
    """Go back to the recorded good release, and raise what tells so."""
    name = session.device.name
    try:
        with report.step("return") as step:
            back = session.call("return")["current"]
            step.measured = f"to {back or 'nothing'}"
            session.call("discard", release=release)
    except PhishipError as error:
        raise StrandedError(
            f"{reason}; and the way back failed: {error}",
            advice=f"look at the device: phiship status {name}, then phiship rollback {name}",
        ) from error
    raise RolledBackError(
        f"{reason}; the device is back on {back or 'nothing, as before'}", advice=reason.advice
    ) from reason
