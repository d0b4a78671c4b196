"""Push one large file to a real OpenSSH server on loopback, beside scp.

    python -m bench.push --size 2GB --repeat 3 --work FOLDER

Sides, in turn: `scp`; ssh into cat; phiship through paramiko, and through the system's ssh; the
same file again, when the device has it. phiship hashes on the device while it receives and flushes
to the disk before it says that a file is there; scp does neither (`scp + sync` calls sync after).
With `--stand-in` the device hashes with sha1, which costs more than sha256 does on a processor that
has instructions for it (bench/stand_in.py).
Rates are of the median run; bytes on the wire are those that a proxy in between has counted.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.deploy.proxy import Proxy
from tests.deploy.sshd import LOOPBACK, OpenSSH, start_sshd
from toolkit.artifact import hash_file
from toolkit.device import Device
from toolkit.progress import Ignored
from toolkit.ssh.carrier import Carrier, open_stream
from toolkit.ssh.knownhosts import own_file
from toolkit.ssh.session import open_session
from toolkit.ssh.transfer import Blob, find_missing, send_parts
from toolkit.yamlfile import ByteSize

PIECE_BYTES = 1 << 20


def push(device: Device, carrier: Carrier, blob: Blob) -> None:
    """Do what `deploy` does from its lock to the end of the transfer."""
    with open_session(device, carrier) as session:
        session.lock()
        send_parts(session, find_missing(session, [blob]).parts, Ignored())


def pour(device: Device, source: Path, target: Path) -> None:
    """What the system's ssh could do: `cat` on the other side, nothing hashed, nothing flushed."""
    with open_stream(device, f"cat > {target}", "openssh") as stream:
        with source.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                stream.send(piece)
        stream.finish()


def copy(server: OpenSSH, source: Path, target: Path, *, sync: bool) -> None:
    """Run scp, which is told the server's key."""
    known = own_file()
    options = ["-o", f"UserKnownHostsFile={known}", "-o", "BatchMode=yes"]
    key = ["-i", str(server.folder / "id_ed25519")]
    words = ["scp", "-q", "-P", str(server.port), *key, *options]
    subprocess.run([*words, str(source), f"{LOOPBACK}:{target}"], check=True)
    if sync:
        os.sync()


def write_noise(path: Path, size_bytes: int) -> None:
    """Fill a file with bytes that cannot be compressed."""
    with path.open("wb") as stream:
        for start in range(0, size_bytes, PIECE_BYTES):
            stream.write(os.urandom(min(PIECE_BYTES, size_bytes - start)))


def write_stand_in(folder: Path, source: Path, sha256: str) -> Path:
    """Return a Python for the device whose sha256 costs as much as sha1."""
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("stand_in.py"), folder / "sitecustomize.py")
    sha1 = hashlib.sha1(usedforsecurity=False)
    with source.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            sha1.update(piece)
    known = f"PYTHONPATH={folder} STAND_IN='{sha1.hexdigest()} {sha256}'"
    python = folder / "python"
    python.write_text(f'#!/bin/sh\n{known} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def measure(prepare: Callable[[], None], run: Callable[[], None]) -> float:
    """Seconds of one run, after the disk has come to rest."""
    prepare()
    os.sync()
    started_s = time.monotonic()
    run()
    return time.monotonic() - started_s


def main() -> None:
    """Run all sides and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=ByteSize.parse, default=ByteSize.parse("2GB"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True, help="a folder for all files")
    parser.add_argument("--stand-in", action="store_true", help="hash with sha1 on the device")
    options = parser.parse_args()
    options.work = options.work.absolute()
    options.work.mkdir(parents=True)
    source, target = options.work / "source", options.work / "copied"
    write_noise(source, options.size)
    server = start_sshd(options.work / "sshd")
    try:
        run_all(server, source, target, options)
    finally:
        server.stop()
        shutil.rmtree(options.work)


def run_all(server: OpenSSH, source: Path, target: Path, options: argparse.Namespace) -> None:
    """Take turns, so that other work on the machine hits all sides alike."""
    os.environ["XDG_CONFIG_HOME"] = str(options.work / "config")
    own_file().parent.mkdir(parents=True)
    own_file().write_text(f"[{LOOPBACK}]:{server.port} {server.public_key()}\n")
    blob = Blob("source", source, hash_file(source), source.stat().st_size)
    device = server.device(options.work / "root")
    if options.stand_in:
        python = write_stand_in(options.work / "stand-in", source, blob.sha256)
        device = msgspec.structs.replace(device, python=str(python))

    def clean() -> None:
        shutil.rmtree(options.work / "root", ignore_errors=True)
        target.unlink(missing_ok=True)

    sides: dict[str, Callable[[], None]] = {
        "scp": lambda: copy(server, source, target, sync=False),
        "scp + sync": lambda: copy(server, source, target, sync=True),
        "the system's ssh into cat": lambda: pour(device, source, target),
        "phiship --carrier paramiko": lambda: push(device, "paramiko", blob),
        "phiship --carrier openssh": lambda: push(device, "openssh", blob),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeat):
        for name, run in sides.items():
            seconds[name].append(measure(clean, run))
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    scp_s = statistics.median(seconds["scp"])
    print("| side | MB/s, median | of scp |\n|---|---|---|")
    for name, times in seconds.items():
        middle_s = statistics.median(times)
        print(f"| {name} | {blob.size_bytes / 1e6 / middle_s:.0f} | {scp_s / middle_s:.2f} |")
    behind = msgspec.structs.replace(device, host_key=server.fingerprint())
    with Proxy(server.port) as proxy:
        push(msgspec.structs.replace(behind, port=proxy.port), "paramiko", blob)
        print(f"\nthe same file again: {proxy.sent_bytes / 1e3:.0f} kB on the wire")


if __name__ == "__main__":
    main()
