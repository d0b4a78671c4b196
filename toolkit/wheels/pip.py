"""Fetching wheels with the user's own pip: its index, proxies, certificates and cache count."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from toolkit.device import Facts
from toolkit.errors import BuildError, MissingExtraError, PreflightError
from toolkit.wheels.tags import ARCHITECTURES, describe_system, list_tags

Tell = Callable[[str], None]

SHOWN_TAGS = 8
SHOWN_VERSIONS = 4
TOLD = ("Collecting", "Downloading", "Using cached")
# What pip says of files that it leaves aside, when it is asked to be verbose.
PASSED_OVER = re.compile(r"(?:Skipping link|Link requires a different Python).*/([^/#\s]+\.whl)")
UNREACHED = re.compile(r"Could not fetch URL (\S+): ((?:connection|timed|There was).*)")
UNMATCHED = re.compile(r"satisfies the requirement (\S+).*\(from versions: ([^)]*)\)")
NO_VERSIONS = "none"
DISK_FULL = "No space left on device"


@dataclass(frozen=True)
class Output:
    """How a run of pip ended, and every line it wrote."""

    code: int
    lines: tuple[str, ...]

    @property
    def error(self) -> str:
        """The last line that says what is wrong."""
        errors = [line for line in self.lines if line.startswith("ERROR: ")]
        return (errors or [*self.lines, "no message"])[-1].removeprefix("ERROR: ")


def download(requirements: Sequence[str], facts: Facts, folder: Path, tell: Tell) -> list[Path]:
    """Fetch the best wheel of each requirement, without what they depend on; returns the files.

    PreflightError when none fits the device or no index answers, MissingExtraError without pip.
    """
    command = _build_command(facts, folder)
    done = _run([*command, *requirements], tell)
    if done.code == 0:
        return sorted(folder.glob("*.whl"))
    if any(DISK_FULL in line for line in done.lines):
        raise BuildError(f"{folder}: the disk is full", advice="free some space on this machine")
    # Only a verbose run says what was left aside, and which index did not answer.
    again = _run([*command, "-vv", "--retries", "0", *requirements], lambda _: None)
    raise _explain(done, again, requirements, facts)


def _build_command(facts: Facts, folder: Path) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise MissingExtraError(
            f"{sys.executable} has no pip, which fetches the device's wheels",
            advice=f"install it with: {sys.executable} -m ensurepip, or uv pip install pip",
        )
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--progress-bar=off", "--dest", str(folder)]
    python = [str(number) for number in facts.python_version[:3]]
    command += ["--implementation=cp", f"--python-version={'.'.join(python)}"]
    command += [f"--abi=cp{''.join(python[:2])}"]
    return [*command, *(f"--platform={tag}" for tag in list_tags(facts))]


def _run(command: Sequence[str], tell: Tell) -> Output:
    """Run pip to its end; `tell` gets what it fetches at once. An interrupt ends pip too."""
    lines = []
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        try:
            for line in process.stdout or ():
                lines.append(line.strip())
                if lines[-1].startswith(TOLD):
                    tell(lines[-1])
        except BaseException:
            process.kill()
            raise
    return Output(process.returncode, tuple(line for line in lines if line))


def _explain(
    done: Output, again: Output, requirements: Sequence[str], facts: Facts
) -> PreflightError:
    """Say why pip fetched nothing: no index answered, or what there is does not fit."""
    text = "\n".join((*done.lines, *again.lines))
    wanted = ", ".join(requirements)
    unmatched, unreached = UNMATCHED.search(text), UNREACHED.search(text)
    if unreached and (unmatched is None or unmatched[2] == NO_VERSIONS):
        return PreflightError(
            f"the wheels of {wanted} are not on this machine, and {unreached[1]} does not answer: "
            f"{unreached[2]}",
            advice="connect this machine to the index, or name another with PIP_INDEX_URL; the "
            "device needs no internet",
        )
    if unmatched is None:
        return PreflightError(
            f"pip could not fetch {wanted}: {done.error}", advice="try it by hand"
        )
    requirement, versions = unmatched[1], _list_versions(unmatched[2])
    tags = list_tags(facts)
    others = _describe_others(again.lines, requirement, facts)
    return PreflightError(
        f"no wheel of {requirement} fits {describe_system(facts)} (tried {tags[0]}, {tags[1]} "
        f"to {tags[-1]}); "
        f"{others}; versions with a wheel that fits: {versions}",
        advice="install a newer system or Python on the device, or build the artifact with a "
        "version of the runtime that fits",
    )


def _list_versions(text: str) -> str:
    versions = [] if text == NO_VERSIONS else text.split(", ")
    dots = "..., " if len(versions) > SHOWN_VERSIONS else ""
    return dots + ", ".join(versions[-SHOWN_VERSIONS:]) if versions else text


def _describe_others(lines: Iterable[str], requirement: str, facts: Facts) -> str:
    """Name the tags of the wheels that pip passed over; those of the device's machine first."""
    package, _, version = requirement.partition("==")
    tags: set[str] = set()
    for name in filter(None, (_read_passed(line) for line in lines)):
        try:
            _, found, _, wheel_tags = parse_wheel_filename(name)
        except InvalidWheelFilename:
            continue
        if not version or str(found) == version:
            tags |= {f"{tag.interpreter}-{tag.platform}" for tag in wheel_tags}
    machine = ARCHITECTURES[facts.machine.lower()]
    system = "macosx" if facts.system == "Darwin" else "linux"
    same = {tag for tag in tags if system in tag and tag.endswith((machine, facts.machine))}
    shown = sorted(same or tags)
    if not shown:
        return f"the index has no wheel of it at all (package {package})"
    more = f" and {len(shown) - SHOWN_TAGS} more" if len(shown) > SHOWN_TAGS else ""
    return f"its wheels are {', '.join(shown[:SHOWN_TAGS])}{more}"


def _read_passed(line: str) -> str:
    found = PASSED_OVER.search(line)
    return found[1] if found else ""
