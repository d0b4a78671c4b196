"""A vendor for tests: a real environment from a real lock, without a network.

Its one package is a wheel written here, which pip finds in the lock's own --find-links.
"""

import zipfile
from pathlib import Path

from toolkit.vendor import Vendor

NAME, VERSION = "tinyvendor", "1.2"
MODULE = '''\
"""Stands for a vendor's exporter: does what its first argument says."""
import os, signal, subprocess, sys, time
from pathlib import Path

def main() -> None:
    what = sys.argv[1]
    print("about to", what, flush=True)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "fail":
        sys.exit("no such architecture")
    if what == "hold":  # memory, and time on the CPU
        held = bytearray(int(sys.argv[2]))
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(0.7)  # it is looked at five times a second
        while time.process_time() < 0.3:
            pass
    if what == "hang":  # as a process that has started another one
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(sys.argv[2]).write_text(str(other.pid))
        time.sleep(600)

if __name__ == "__main__":
    main()
'''


def write_wheel(folder: Path) -> Path:
    """A wheel of one module, as small as pip takes it."""
    info = f"{NAME}-{VERSION}.dist-info"
    path = folder / f"{NAME}-{VERSION}-py3-none-any.whl"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{NAME}.py", MODULE)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\n"
        )
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    return path


def write_lock(locks: Path, *lines: str, version: str = VERSION) -> None:
    """tiny.txt: the one package, from the folder of the lock itself."""
    head = ("# python: 3.10 to 3.99", *lines, "--no-index", f"--find-links {locks}")
    (locks / "tiny.txt").write_text("\n".join([*head, f"{NAME}=={version}"]) + "\n")


def make_vendor(locks: Path) -> Vendor:
    """The vendor of that lock."""
    return Vendor("tiny", "the tiny vendor", (NAME,), (NAME,), locks=locks)
