"""Which runtime a release will run in: the device's own, one that is there, or one we bring."""

from dataclasses import dataclass

import msgspec

from toolkit.artifact import Manifest
from toolkit.console import Console, format_bytes
from toolkit.device import Facts
from toolkit.preflight.runtime import check_wheels
from toolkit.ssh.session import Session
from toolkit.ssh.transfer import Blob
from toolkit.wheels import Installed, WheelSet, find_fitting, fits
from toolkit.wheels.collect import cache_folder, collect_wheels


@dataclass(frozen=True)
class Choice:
    """A runtime on the device by its id, None for the device's own Python.

    `wheels` when it is still to be installed.
    """

    id: str | None
    text: str
    wheels: WheelSet | None = None

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """What has to be on the device before it can be installed."""
        if self.wheels is None:
            return ()
        return tuple(
            Blob(wheel.file_name, wheel.path, wheel.sha256, wheel.size_bytes)
            for wheel in (*self.wheels.wheels, self.wheels.pip)
        )

    @property
    def unpacked_bytes(self) -> int:
        """What installing takes on the device, beside the wheels themselves."""
        return self.wheels.installed_bytes if self.wheels else 0


def choose_runtime(session: Session, facts: Facts, manifest: Manifest, console: Console) -> Choice:
    """Take the first that has the version the artifact was checked with.

    Where no wheel can be had, or the device's settings ask for it, an engine of another version
    serves; the preflight has warned of it. PreflightError when wheels cannot be fetched.
    """
    device, engine, runtime = session.device, facts.engine, manifest.runtime
    own = f"the device's own {engine.package} {engine.version}" if engine else "the device's own"
    if fits(engine, runtime) or device.runtime == "device":
        return Choice(None, own)
    answer = session.call("runtimes")["runtimes"]
    installed = msgspec.convert(answer, dict[str, Installed])
    if found := find_fitting(installed, runtime, facts):
        return Choice(found, f"{found}, which is there")
    if engine and engine.importable and check_wheels(facts, runtime.package).verdict == "refused":
        return Choice(None, own)
    label = f"fetching {runtime.package} {runtime.version} for {device.name}"
    with console.waiting(label) as tell:
        wheels = collect_wheels(
            runtime.package, runtime.version, facts, cache_folder(), tell, runtime.companions
        )
    count = len(wheels.wheels)
    size = format_bytes(wheels.size_bytes)
    text = f"{wheels.id}: {count} wheel{'s' * (count > 1)} and pip, {size}"
    return Choice(wheels.id, text, wheels)


def install_runtime(session: Session, choice: Choice, manifest: Manifest) -> str:
    """Have the device install what was chosen and has arrived; returns what became of it."""
    if choice.wheels is None:
        return choice.text
    answer = session.call(
        "install",
        runtime=choice.id,
        wheels=choice.wheels.files,
        engine=manifest.runtime.engine,
    )
    return f"{choice.id}, {'installed' if answer['created'] else 'was there'}"
