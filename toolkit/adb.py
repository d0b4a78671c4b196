"""Push an artifact to an Android phone through adb: below /data/local/tmp, verified there.

Nothing runs there by itself: an app, or Qualcomm's Genie, takes the folder. The `adb` program does
the talking; what is asked of the phone are commands of Android's own toybox.
"""

import os
import posixpath
import re
import shlex
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from toolkit.artifact import Manifest, make_safe
from toolkit.console import Console, format_bytes
from toolkit.deploy import Push, prepare_release
from toolkit.errors import PreflightError, RunnerError, UnreachableError
from toolkit.report import Report
from toolkit.smoke import quote
from toolkit.ssh.transfer import Blob

ADB = "adb"
ROOT = "/data/local/tmp/phiship"
HOMES = ("ANDROID_HOME", "ANDROID_SDK_ROOT")
COMMAND_TIMEOUT_S = 60
HASH_TIMEOUT_S = 900
PUSH_TIMEOUT_S = 7200
RESERVE_BYTES = 64_000_000  # stays free, as on devices with SSH
MARK = "phiship-status="
STATES = {
    "unauthorized": "unlock the phone and allow USB debugging for this computer",
    "authorizing": "unlock the phone and allow USB debugging for this computer",
    "offline": "plug the phone in again, or: adb reconnect offline",
    "no permissions": "give this user access to the USB device (udev rules of the phone's maker)",
}
BROKEN = re.compile(r"device .*not found|device offline|closed|no devices|protocol fault|connect")
FULL_DISK = re.compile(r"No space left on device")


@dataclass(frozen=True)
class Phone:
    """A phone that adb can speak to; `device` is what errors call it."""

    adb: str
    serial: str

    @property
    def device(self) -> str:
        """Its serial number, as adb shows it."""
        return self.serial

    def shell(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run a command there and return what it says; RunnerError when it fails."""
        output = self.run(["shell", f"{command}\necho {MARK}$?"], timeout_s)
        text, _, status = output.replace("\r\n", "\n").rpartition(MARK)
        if status.strip() != "0":
            words = quote(text.strip() or output.strip())
            if FULL_DISK.search(output):
                raise _explain_full_disk(self.serial)
            raise RunnerError(
                f"{self.serial}: {command.split()[0]} failed there: {words}",
                advice="phiship needs Android 7 or newer, with its own toybox",
            )
        return text

    def push(self, path: Path, remote: str) -> None:
        """Copy a file there; PreflightError when the phone is full."""
        self.run(["push", str(path), remote], PUSH_TIMEOUT_S)

    def run(self, arguments: Sequence[str], timeout_s: float) -> str:
        """Run adb for this phone; returns what it printed."""
        try:
            done = _run_adb(self.adb, ["-s", self.serial, *arguments], timeout_s)
        except subprocess.TimeoutExpired:
            raise UnreachableError(
                f"{self.serial}: no answer through adb within {timeout_s:.0f} s",
                advice="unlock the phone, plug it in again, and run the command again",
            ) from None
        words = f"{done.stdout}{done.stderr}"
        # A shell's own status comes through here too; it is read by its mark.
        if done.returncode and MARK not in words:
            raise self._explain(words)
        return done.stdout

    def _explain(self, words: str) -> PreflightError | UnreachableError | RunnerError:
        if FULL_DISK.search(words):
            return _explain_full_disk(self.serial)
        lines = words.strip().splitlines() or ["it says nothing"]
        text = quote(next((line for line in lines if "error" in line.lower()), lines[-1]))
        if BROKEN.search(words) or _list_states(self.adb).get(self.serial) != "device":
            return UnreachableError(
                f"{self.serial}: the connection through adb broke: {text}",
                advice="plug the phone in again and push again: whole files are not sent twice",
            )
        return RunnerError(f"{self.serial}: adb failed: {text}")


@dataclass(frozen=True)
class Folders:
    """Where an artifact lies there, and where it grows."""

    final: str
    growing: str

    @classmethod
    def of(cls, name: str) -> "Folders":
        """Those of an artifact; its name becomes one that every shell takes."""
        safe = make_safe(name)
        return cls(f"{ROOT}/{safe}", f"{ROOT}/.{safe}.partial")


def names_phone(device: str) -> bool:
    """Whether a device is given as `adb` or `adb:SERIAL`."""
    return device == ADB or device.startswith(f"{ADB}:")


def read_serial(device: str) -> str | None:
    """The serial number in `adb:SERIAL`, which may hold colons; None for `adb`."""
    return device.partition(":")[2] or None


def push_with_adb(
    artifact: Path,
    console: Console,
    push: Push | None = None,
    *,
    serial: str | None = None,
    report: Report | None = None,
) -> Report:
    """Push an artifact to the phone `serial`, or to the only one there.

    A push that was cut off goes on with the next file that is missing. Raises ArtifactError,
    UnreachableError, PreflightError, RunnerError; what was there is then still there, whole.
    """
    report = report or Report(f"deploy {artifact.name} with adb")
    push = push or Push()
    with report.step("check artifact") as step:
        release = prepare_release(artifact, push)
        step.measured = format_bytes(release.manifest.size_bytes)
        if asked := release.manifest.runtime.tell_properties():
            step.measured += f"; an app has to load it with {asked}"
    with report.step("connect") as step:
        phone = find_phone(find_adb(), serial)
        step.measured = describe_phone(phone)
    folders = Folders.of(release.manifest.name)
    blobs = {blob.name: blob for blob in release.blobs}
    with report.step("compare", limit="sha256 of every file") as step:
        grown = _find_right(phone, folders.growing, blobs)
        there = _find_right(phone, folders.final, blobs)
        missing = [blob for name, blob in blobs.items() if name not in {*grown, *there}]
        size_bytes = sum(blob.size_bytes for blob in missing)
        step.measured = f"{len(missing)} of {len(blobs)} files to send, {format_bytes(size_bytes)}"
    if not push.dry_run:
        _remove_leftovers(phone, folders.growing, blobs if len(there) < len(blobs) else ())
    with report.step("preflight") as step:
        step.measured = _preflight(phone, release.manifest, size_bytes)
    if not push.dry_run and len(there) < len(blobs):
        _send(phone, folders, missing, console, report)
        with report.step("switch") as step:
            phone.shell(_write_switch(folders, [name for name in there if name not in grown]))
            step.measured = folders.final
    return report


def find_adb() -> str:
    """The adb program: on the PATH, or of the Android SDK; PreflightError without one."""
    homes = [Path(os.environ[name]) for name in HOMES if os.environ.get(name)]
    for found in (
        shutil.which(ADB),
        *(shutil.which(home / "platform-tools/adb") for home in homes),
    ):
        if found:
            return str(found)
    raise PreflightError(
        "adb is not installed on this machine",
        advice="install Android's platform tools (Debian: apt install adb), or set ANDROID_HOME",
    )


def find_phone(adb: str, serial: str | None) -> Phone:
    """The phone of a serial number, or the only one; UnreachableError says what adb sees."""
    states = _list_states(adb)
    if serial is None and len(states) > 1:
        raise UnreachableError(
            f"adb sees several devices: {_show(states)}",
            advice="name one: phiship deploy ARTIFACT adb:SERIAL",
        )
    chosen = serial or next(iter(states), None)
    if chosen is None or chosen not in states:
        wanted = f"no device {serial}" if serial else "no device"
        raise UnreachableError(
            f"adb sees {wanted}; it sees {_show(states)}",
            advice="plug the phone in with USB debugging allowed, or: adb connect ADDRESS",
        )
    if states[chosen] != "device":
        raise UnreachableError(
            f"{chosen}: adb says it is {states[chosen]}",
            advice=STATES.get(states[chosen], "adb devices -l says more"),
        )
    return Phone(adb, chosen)


def describe_phone(phone: Phone) -> str:
    """Its maker's name, its Android, its processor; for the report."""
    names = ("ro.product.model", "ro.build.version.release", "ro.product.cpu.abi")
    output = phone.shell("; ".join(f"getprop {name}" for name in names))
    model, version, abi = [*map(str.strip, output.splitlines()), "", "", ""][:3]
    return f"{model or phone.serial}, Android {version or '?'}, {abi or '?'}"


def _run_adb(
    adb: str, arguments: Sequence[str], timeout_s: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [adb, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        errors="replace", timeout=timeout_s, check=False,
    )  # fmt: skip


def _list_states(adb: str) -> dict[str, str]:
    """State of each device by serial number."""
    try:
        done = _run_adb(adb, ["devices"], COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise UnreachableError(
            "adb does not answer", advice="restart it: adb kill-server"
        ) from None
    if done.returncode:
        raise UnreachableError(f"adb failed: {quote(done.stderr.strip() or done.stdout.strip())}")
    pairs = (line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line)
    return {name: state.split(" (")[0].strip() for name, state in pairs}


def _show(states: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({state})" for name, state in states.items()) or "none"


def _find_right(phone: Phone, folder: str, blobs: Mapping[str, Blob]) -> list[str]:
    """Names of the files in a folder there that have the right size and sha256."""
    sizes = phone.shell(
        f"cd {shlex.quote(folder)} 2>/dev/null && find . -type f -exec stat -c '%s %n' {{}} +; true"
    )
    found = _read_columns(sizes, " ")
    same = [n for n, blob in blobs.items() if found.get(f"./{n}") == str(blob.size_bytes)]
    return _compare(phone, folder, [blobs[name] for name in same])


def _compare(phone: Phone, folder: str, blobs: Sequence[Blob]) -> list[str]:
    """Names of those whose sha256 on the phone is right."""
    if not blobs:
        return []
    names = " ".join(shlex.quote(blob.name) for blob in blobs)
    output = phone.shell(f"cd {shlex.quote(folder)} && sha256sum {names}", HASH_TIMEOUT_S)
    sums = _read_columns(output, "  ")
    return [blob.name for blob in blobs if sums.get(blob.name) == blob.sha256]


def _read_columns(output: str, separator: str) -> dict[str, str]:
    """What stands in front of each name."""
    parts = (line.partition(separator) for line in output.splitlines())
    return {name: value for value, _, name in parts if name}


def _remove_leftovers(phone: Phone, folder: str, names: Collection[str]) -> None:
    """Remove what another version's push has left in a folder there; without names all of it."""
    quoted = shlex.quote(folder)
    if not names:
        phone.shell(f"rm -rf {quoted}")
        return
    parents = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    stale = []
    for kind, known in (("-type d", parents), ("! -type d", set(names))):
        found = phone.shell(f"cd {quoted} 2>/dev/null && find . {kind}; true").splitlines()
        stale += [name for name in map(posixpath.normpath, found) if name not in known]
    if stale:
        phone.shell(f"cd {quoted} && rm -rf -- {' '.join(map(shlex.quote, stale))}")


def _preflight(phone: Phone, manifest: Manifest, send_bytes: int) -> str:
    """Compare disk and memory with what is needed; PreflightError with both numbers."""
    fields = phone.shell(f"df -Pk {posixpath.dirname(ROOT)}").strip().splitlines()[-1].split()
    free_bytes = int(fields[3]) * 1024
    if send_bytes and free_bytes < send_bytes + RESERVE_BYTES:
        raise PreflightError(
            f"{phone.device}: {format_bytes(free_bytes)} of disk are free; "
            f"{format_bytes(send_bytes)} have to be sent and {format_bytes(RESERVE_BYTES)} must "
            "stay free",
            advice="free some space there, or take an artifact with fewer bits",
        )
    meminfo = phone.shell("cat /proc/meminfo")
    found = re.search(r"^MemTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    total_bytes = int(found[1]) * 1024 if found else None
    need_bytes = manifest.device_memory_bytes
    if total_bytes is not None and total_bytes < need_bytes:
        raise PreflightError(
            f"{phone.device}: it has {format_bytes(total_bytes)} of memory; {manifest.name} takes "
            f"{format_bytes(need_bytes)}",
            advice="take an artifact with fewer bits, or a shorter context",
        )
    memory = "unknown memory" if total_bytes is None else f"{format_bytes(total_bytes)} of memory"
    return f"{format_bytes(free_bytes)} of disk free, {memory}"


def _send(
    phone: Phone, folders: Folders, missing: Sequence[Blob], console: Console, report: Report
) -> None:
    """Push files to the growing folder and compare them there."""
    size_bytes = sum(blob.size_bytes for blob in missing)
    parents = {posixpath.dirname(f"{folders.growing}/{blob.name}") for blob in missing}
    parents.add(folders.growing)
    with (
        report.step("transfer", limit="sha256 of every file") as step,
        console.progress(f"sending to {phone.device}", size_bytes) as bar,
    ):
        phone.shell(f"mkdir -p {' '.join(map(shlex.quote, sorted(parents)))}")
        for blob in missing:
            bar.show(blob.name)
            phone.push(blob.path, f"{folders.growing}/{blob.name}")
            bar(blob.size_bytes)
        right = _compare(phone, folders.growing, missing)
        if wrong := [blob.name for blob in missing if blob.name not in right]:
            raise RunnerError(
                f"{phone.device}: {wrong[0]} arrived with another content ({len(wrong)} files)",
                advice="push again: what arrived whole is not sent twice",
            )
        step.measured = f"{format_bytes(size_bytes)} sent"


def _write_switch(folders: Folders, kept: Sequence[str]) -> str:
    """A script that moves unchanged files over, and the folder to its place.

    Cut off in the middle, its files are found by the next push, in either folder.
    """
    final, growing = shlex.quote(folders.final), shlex.quote(folders.growing)
    lines = ["set -e"]
    for name in kept:
        parent = shlex.quote(posixpath.dirname(f"{folders.growing}/{name}"))
        source = shlex.quote(f"{folders.final}/{name}")
        target = shlex.quote(f"{folders.growing}/{name}")
        lines.append(f"mkdir -p {parent}; mv {source} {target}")
    lines += [
        f"rm -rf {final}.old",
        f"if [ -e {final} ]; then mv {final} {final}.old; fi",
        f"mv {growing} {final}",
        f"rm -rf {final}.old",
    ]
    return f"(\n{chr(10).join(lines)}\n)"


def _explain_full_disk(device: str) -> PreflightError:
    return PreflightError(
        f"{device}: its disk is full", advice="free some space there and push again"
    )
