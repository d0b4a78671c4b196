"""Which wheels a device takes, from its facts: platform tags and markers (PEP 508, 600, 656)."""

from collections.abc import Iterator

from packaging.tags import mac_platforms

from toolkit.device import Facts, read_version
from toolkit.errors import PreflightError

ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
# PEP 600: the oldest glibc of each architecture, and the names that some versions had before.
OLDEST_GLIBC_MINOR = {"x86_64": 5, "aarch64": 17}
LEGACY_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
# The first macOS that runs on the architecture, for a device that does not tell its version.
OLDEST_MACOS = {"x86_64": (10, 12), "aarch64": (11, 0)}


def list_tags(facts: Facts) -> tuple[str, ...]:
    """Return the platform tags a device takes, best first; PreflightError when there are none.

    Wheels named linux_* are somebody's own builds, such as NVIDIA's for a Jetson: they come first.
    `facts.libc` is `glibc 2.36` or `musl 1.2.4`; on a Mac `facts.system_version` is `macOS 14.5`.
    """
    architecture = ARCHITECTURES.get(facts.machine.lower())
    if facts.word_bits != 64 or architecture is None:
        raise PreflightError(
            f"{facts.machine} with a {facts.word_bits}-bit userland: runtimes have wheels for "
            f"64 bits and {', '.join(ARCHITECTURES)} only",
            advice="install a 64-bit system on the device",
        )
    name = facts.libc.partition(" ")[0]
    if facts.system == "Darwin":
        return tuple(_list_macos(facts, architecture))
    if facts.system == "Linux" and name == "glibc":
        return (f"linux_{architecture}", *_list_glibc(_read_minor(facts, 2), architecture))
    if facts.system == "Linux" and name == "musl":
        minors = range(_read_minor(facts, 1), -1, -1)
        musl = (f"musllinux_1_{minor}_{architecture}" for minor in minors)
        return (f"linux_{architecture}", *musl)
    raise PreflightError(
        f"{facts.system or 'unknown system'} with C library {facts.libc or 'unknown'}: there are "
        "no wheels for it; allowed: Linux with glibc or musl, macOS",
        advice="install the runtime there by other means, and name the Python that has it with "
        "`python:` in devices.yaml",
    )


def make_environment(facts: Facts) -> dict[str, str]:
    """Return the values that requirements' markers are about (PEP 508), as on the device."""
    return {
        "implementation_name": "cpython",
        "implementation_version": facts.python,
        "os_name": "posix",
        "platform_machine": facts.machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": facts.system,
        "platform_version": "",
        "python_full_version": facts.python,
        "python_version": ".".join(str(number) for number in facts.python_version[:2]),
        "sys_platform": facts.system.lower(),
    }


def describe_system(facts: Facts) -> str:
    """Name what decides about wheels: Linux aarch64, glibc 2.36, Python 3.11.2."""
    system = (facts.system_version or "macOS") if facts.system == "Darwin" else facts.libc
    words = (f"{facts.system} {facts.machine}", system, f"Python {facts.python}")
    return ", ".join(word for word in words if word)


def _list_glibc(newest_minor: int, architecture: str) -> Iterator[str]:
    for minor in range(newest_minor, OLDEST_GLIBC_MINOR[architecture] - 1, -1):
        yield f"manylinux_2_{minor}_{architecture}"
        if minor in LEGACY_NAMES:
            yield f"{LEGACY_NAMES[minor]}_{architecture}"


def _list_macos(facts: Facts, architecture: str) -> Iterator[str]:
    found = read_version((facts.system_version or "").rpartition(" ")[2])
    major, minor = (*(found or OLDEST_MACOS[architecture]), 0)[:2]
    return mac_platforms((major, minor), "arm64" if architecture == "aarch64" else architecture)


def _read_minor(facts: Facts, major: int) -> int:
    """Return the minor number of a C library whose major number never changes."""
    if len(facts.libc_version) < 2 or facts.libc_version[0] != major:
        raise PreflightError(
            f"C library {facts.libc!r}: its version cannot be read; allowed: {major}.x",
            advice="see what the probe finds: phiship probe DEVICE",
        )
    return facts.libc_version[1]
