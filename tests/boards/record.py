"""Record this machine as a board: `python -m tests.boards.record > tests/boards/NAME.json`.

Run it on the device, from a checkout, with Python 3.9 or newer and nothing else. Look at what it
wrote before you commit it: serial numbers are blanked, and the root folder is called /home/user;
names of mount points and of control groups are as they are.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import tempfile
from pathlib import Path

from tests.boards.board import Board, to_json
from toolkit.runner.agent.facts import SYSCTL_NAMES, read_facts
from toolkit.runner.agent.layout import Layout
from toolkit.runner.agent.probes.interpreter import ask_interpreter
from toolkit.runner.agent.probes.reading import read_text, run_command

FILES = (
    *("proc/cpuinfo", "proc/meminfo", "proc/self/mounts", "proc/self/cgroup"),
    *("proc/device-tree/model", "proc/device-tree/compatible", "proc/driver/nvidia/version"),
    *("etc/os-release", "etc/nv_tegra_release", "usr/local/cuda/version.json"),
    *("sys/class/dmi/id/sys_vendor", "sys/class/dmi/id/product_name"),
    "sys/devices/platform/soc/soc:firmware/get_throttled",
)
PATTERNS = (
    *("sys/class/thermal/thermal_zone*/temp", "sys/class/drm/renderD*/device/vendor"),
    *("sys/class/accel/accel*/device/vendor", "sys/fs/cgroup/memory.*"),
    *("sys/fs/cgroup/memory/memory.*_in_bytes", "sys/fs/cgroup/memory/memory.stat"),
)
PRESENT = (
    *("dev/dri/renderD*", "dev/accel/accel*", "lib/ld-musl-*.so.1", "system/bin/linker64"),
    *("usr/local/cuda*/lib64/libcudart.so.*", "usr/lib/*-linux-gnu/libcudart.so.*"),
)
COMMANDS = (
    *(["vcgencmd", "get_throttled"], ["nvpmodel", "-q"], ["sw_vers", "-productVersion"]),
    *(["vm_stat"], ["mount"], ["getprop", "ro.product.model"]),
    *(["getprop", "ro.build.version.release"], ["sysctl", *SYSCTL_NAMES]),
)
MAC_ONLY = ("vm_stat", "mount", "sysctl")


def record(what: str, source: str) -> Board:
    """Read all that the probes could ask for, and the facts they make of it."""
    root = Path("/")
    with tempfile.TemporaryDirectory() as folder:
        python = ask_interpreter(Layout(Path(folder)))
    python = dataclasses.replace(python, user="user", root="/home/user/.phiship/v1")
    names = [*FILES, *(str(p)[1:] for pattern in PATTERNS for p in sorted(root.glob(pattern)))]
    files = {name: text for name in names if (text := read_text(root / name)) is not None}
    files |= {str(path)[1:]: "" for pattern in PRESENT for path in sorted(root.glob(pattern))}
    if Path("/run/systemd/system").exists():
        files["run/systemd/system/"] = ""
        if Path(f"/run/user/{python.user_id}/systemd").exists():
            files[f"run/user/{python.user_id}/systemd/"] = ""
    files["proc/cpuinfo"] = re.sub(
        r"(?m)^(Serial\s*: ).*", r"\g<1>0", files.get("proc/cpuinfo", "")
    )
    is_mac = python.system == "Darwin"
    wanted = [words for words in COMMANDS if is_mac or words[0] not in MAC_ONLY]
    outputs = {" ".join(words): run_command(words) for words in wanted}
    commands = {words: text for words, text in outputs.items() if text is not None}
    board = Board(what, source, files, commands, dataclasses.asdict(python), {})
    with tempfile.TemporaryDirectory() as folder:
        board.lay_out(Path(folder))
        facts = read_facts(Layout(Path(python.root)), Path(folder), board.run, python)
    return dataclasses.replace(board, facts=facts)


if __name__ == "__main__":
    words = sys.argv[1] if len(sys.argv) > 1 else "what is it?"
    sys.stdout.write(to_json(record(words, "recorded by tests.boards.record")) + "\n")
