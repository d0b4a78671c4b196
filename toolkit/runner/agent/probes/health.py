"""How the device fares now: temperature, throttling, services."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .interpreter import Interpreter
from .reading import Run, is_there, list_paths, read_number, read_text

# The bits of `vcgencmd get_throttled`: now from 0 on, the same since boot from 16 on.
# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
THROTTLES = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
SINCE_BOOT_SHIFT = 16
FIRMWARE_FILE = "sys/devices/platform/soc/soc:firmware/get_throttled"
# What a sensor can mean; those of parts that are switched off say -256.
SANE_MILLIDEGREES = range(-40_000, 150_000)


def read_health(root: Path, run: Run, python: Interpreter) -> dict[str, Any]:
    """Return temperature_celsius, throttled_now and _before, systemd_user, linger, clock_s."""
    return {
        "temperature_celsius": read_temperature(root),
        **read_throttling(root, run),
        **_read_systemd(root, python),
        "clock_s": python.clock_s,
    }


def read_temperature(root: Path) -> float | None:
    """Return the hottest zone."""
    zones = list_paths(root / "sys/class/thermal", "thermal_zone*")
    values = [read_number(zone / "temp") for zone in zones]
    sane = [value / 1000 for value in values if value is not None and value in SANE_MILLIDEGREES]
    return max(sane, default=None)


def read_throttling(root: Path, run: Run) -> dict[str, Any]:
    """Ask the firmware; the kernel's file warns in its log that it is deprecated, so it is second.

    "throttled=0x50000" of vcgencmd, "50000" in the file.
    """
    text = ""
    # Where there is no Raspberry Pi firmware, nobody has to look for its tool.
    if "Raspberry Pi" in (read_text(root / "proc/device-tree/model") or ""):
        text = run(["vcgencmd", "get_throttled"]) or read_text(root / FIRMWARE_FILE) or ""
    found = re.fullmatch(r"(?:throttled=0x)?([0-9a-fA-F]{1,8})", text.strip())
    if found is None:
        return {"throttled_now": None, "throttled_before": None}
    bits = int(found.group(1), 16)
    return {
        "throttled_now": _name_bits(bits),
        "throttled_before": _name_bits(bits >> SINCE_BOOT_SHIFT),
    }


def _name_bits(bits: int) -> list[str]:
    return [name for number, name in enumerate(THROTTLES) if bits >> number & 1]


def _read_systemd(root: Path, python: Interpreter) -> dict[str, Any]:
    """Return whether this user has a service manager, and keeps it when nobody is logged in."""
    if not is_there(root / "run/systemd/system"):
        return {"systemd_user": False, "linger": None}
    own = root / "run/user" / str(python.user_id)
    return {
        "systemd_user": is_there(own / "systemd"),
        "linger": bool(python.user) and is_there(root / "var/lib/systemd/linger" / python.user),
    }
