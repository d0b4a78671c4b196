"""A device: where it is, how to log in, and the facts a probe finds there."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from toolkit import yamlfile
from toolkit.errors import SettingsError

DEVICES_FILE = "devices.yaml"
DEVICES_VARIABLE = "PHISHIP_DEVICES"
EMBEDDED = "embedded"
DEFAULT_ROOT = "~/.phiship"

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
# No white space, and no leading dash: it would be read as an option of ssh.
Host = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z0-9_:.%][A-Za-z0-9_:.%-]*$", description="a host name or address"
    ),
]
User = Annotated[
    str, msgspec.Meta(pattern=r"^([A-Za-z0-9_.][^\s:@/]*)?$", description="a user's name")
]
Fingerprint = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^SHA256:[A-Za-z0-9+/]{43}$", description="a fingerprint such as SHA256:0123..."
    ),
]


class Health(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a release has to keep to after the switch, beside the right answer; None is no limit."""

    min_tokens_per_second: float | None = None
    max_memory: yamlfile.ByteSize | None = None
    refuse_throttling: bool = False


class DeviceEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device in devices.yaml."""

    host: Host
    port: Port = 22
    user: User = ""
    identity_file: str | None = None
    host_key: Fingerprint | None = None
    target: str | None = None
    python: str = "python3"
    root: str = DEFAULT_ROOT
    runtime: Literal["auto", "device"] = "auto"
    cipher: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9@.-]+$")] | None = None
    health: Health = Health()
    llamaedge_server: str = "~/llama-api-server.wasm"


class Device(DeviceEntry, frozen=True, kw_only=True):
    """An address with what is needed to log in; an empty user means the one of ssh's settings."""

    name: str

    @property
    def is_embedded(self) -> bool:
        """True for the device inside this process, which has no address before it is started."""
        return self.name == EMBEDDED and not self.host

    @property
    def address(self) -> str:
        """user@host:port, for people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"{user}{host}" + (f":{self.port}" if self.port != 22 else "")


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of importing an engine in a child process; `signal` when that died of one.

    `is_installed` is True for an engine that is there, whether or not it can be imported.
    `companions` are those of the packages asked for beside it that are there.
    """

    package: str
    module: str
    importable: bool
    version: str
    signal: str | None
    error: str
    is_installed: bool = False
    companions: tuple[str, ...] = ()

    def list_missing(self, companions: Sequence[str]) -> list[str]:
        """Packages that have to be beside it, and are not known to be there."""
        return [name for name in companions if name not in self.companions]


class Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU or NPU; not accessible means that this user may not open its device file."""

    kind: Literal["intel_gpu", "intel_npu", "metal", "nvidia"]
    name: str
    is_accessible: bool


class Jetson(msgspec.Struct, frozen=True, kw_only=True):
    """What a Jetson runs: Jetson Linux such as 36.4.3, JetPack such as 6, and its power mode."""

    l4t: str
    jetpack: int | None
    power_mode: str | None


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe finds; None (or nothing, for texts and lists) where the device does not tell.

    `libc` is "glibc 2.36", "musl", "bionic", or "none" on macOS. `memory_limit_bytes` is what the
    control groups still allow. `throttled_before` is since boot. `clock_s` is the device's time in
    seconds since 1970, when it was asked.
    """

    system: str
    machine: str
    word_bits: int
    libc: str
    python: str
    python_path: str
    board: str
    cpu_count: int
    cpu_features: tuple[str, ...]
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    memory_limit_bytes: int | None
    disk_free_bytes: int
    root: str
    has_venv: bool | None = None
    is_termux: bool = False
    board_compatible: tuple[str, ...] | None = None
    system_version: str | None = None
    swap_free_bytes: int | None = None
    disk_file_system: str | None = None
    disk_is_writable: bool | None = None
    accelerators: tuple[Accelerator, ...] = ()
    jetson: Jetson | None = None
    cuda: str | None = None
    temperature_celsius: float | None = None
    throttled_now: tuple[str, ...] | None = None
    throttled_before: tuple[str, ...] | None = None
    systemd_user: bool | None = None
    linger: bool | None = None
    service_memory_bytes: int = 0
    clock_s: float | None = None
    engine: EngineFacts | None = None

    @property
    def usable_memory_bytes(self) -> int | None:
        """Available memory or the control group's rest, the smaller; None when neither is known.

        With what our own service holds, for a push can pause it. Swap never counts: weights read
        from it again for every token are no use. On a Jetson the GPU takes from the same memory.
        """
        known = (self.memory_available_bytes, self.memory_limit_bytes)
        free_bytes = min((count for count in known if count is not None), default=None)
        return None if free_bytes is None else free_bytes + self.service_memory_bytes

    @property
    def throttled(self) -> tuple[str, ...]:
        """What slows the device down now: under-voltage, throttled, and so on."""
        return self.throttled_now or ()

    @property
    def arch(self) -> str:
        """The machine as wheels name it: x86_64 or aarch64 (arm64 on macOS), else as it is."""
        names = {"amd64": "x86_64", "arm64": "arm64" if self.system == "Darwin" else "aarch64"}
        return names.get(self.machine.lower(), self.machine.lower())

    @property
    def python_version(self) -> tuple[int, ...]:
        """Python's version as numbers: (3, 11, 2)."""
        return read_version(self.python)

    @property
    def libc_version(self) -> tuple[int, ...]:
        """The C library's version as numbers; empty when unknown."""
        return read_version(self.libc.partition(" ")[2])


def read_version(text: str) -> tuple[int, ...]:
    """Read the numbers a version begins with: 3.13.0rc1 -> (3, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found.group().split("."))) if found else ()


def resolve_device(text: str, devices_file: Path | None = None) -> Device:
    """Return a device: a name in devices.yaml, `embedded`, or [user@]host[:port].

    Raises SettingsError for a file that says what cannot be, or a text that is no address.
    """
    path = find_devices_file(devices_file)
    entries = yamlfile.load(path, dict[str, DeviceEntry]) if path else {}
    if text in entries:
        return Device(name=text, **msgspec.structs.asdict(entries[text]))
    if text == EMBEDDED:
        return Device(name=EMBEDDED, host="")
    return parse_address(text, path, sorted(entries))


def find_devices_file(devices_file: Path | None = None) -> Path | None:
    """Return the devices file in use: as given, $PHISHIP_DEVICES, here, or in ~/.config/phiship."""
    named = devices_file or os.environ.get(DEVICES_VARIABLE)
    if named:
        return Path(named)
    places = (Path(DEVICES_FILE), config_folder() / DEVICES_FILE)
    return next((path for path in places if path.exists()), None)


def config_folder() -> Path:
    """Return phiship's own folder of settings."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "phiship"


def parse_address(text: str, devices_file: Path | None = None, names: Sequence[str] = ()) -> Device:
    """Read [user@]host[:port], IPv6 in brackets; the file and its names are for the error."""
    found = re.fullmatch(r"(?:([^@]+)@)?(\[[^\]]+\]|[^:\[\]]+)(?::(\d+))?", text)
    user, host, port = found.groups() if found else (None, "", None)
    fields = {"name": text, "host": host.strip("[]"), "user": user or "", "port": int(port or 22)}
    try:
        return msgspec.convert(fields, Device)
    except msgspec.ValidationError:
        where = f"{devices_file} has {', '.join(names) or 'none'}" if devices_file else "none here"
        raise SettingsError(
            f"device {text!r}: neither a name in {DEVICES_FILE} ({where}) nor an address; "
            "allowed: [user@]host[:port], an IPv6 address in brackets, or 'embedded'",
        ) from None
