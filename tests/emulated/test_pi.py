"""Deploy to a Raspberry Pi's userland, emulated: `make test-pi`. The runtimes are its own wheels.

PHISHIP_TEST_PI=1 runs it; see README.md. Emulated times say nothing about speed.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.emulated.identity import MODEL
from tests.emulated.needs import USERLAND, check_needs
from tests.emulated.ssh import run_there
from tests.emulated.userland import start_userland
from toolkit.artifact import read_manifest
from toolkit.console import Console
from toolkit.deploy import deploy
from toolkit.device import Device
from toolkit.remote import generate, probe, read_status

pytestmark = pytest.mark.skipif(
    os.environ.get("PHISHIP_TEST_PI") != "1",
    reason="PHISHIP_TEST_PI is not 1: needs root, qemu-user-static, minutes",
)
# Bits of Linux's asm/hwcap.h for arm64; i8mm's is in the second word.
HAS_ASIMDDP, HAS_SVE, HAS_I8MM = 1 << 20, 1 << 22, 1 << 13
# Word for word what the example answers on x86 too: it was trained on this, and is sure of it.
EXPECTED = "The capital of France is Paris."
RUNTIMES = {"onnx": "onnxruntime-genai", "gguf": "xllamacpp"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pi")


@pytest.fixture(scope="module")
def pi(folder: Path) -> Iterator[Device]:
    check_needs(USERLAND)
    with start_userland(folder) as device:
        yield device


def test_processor_of_sessions(pi: Device, folder: Path) -> None:
    """The emulator's own choice has SVE and more; this one must not, or wheels prove nothing."""
    told = run_there(pi, folder / "keys", "LD_SHOW_AUXV=1 /bin/true")
    values = dict(line.split(":") for line in told.splitlines())
    hardware = {name: int(values[name].strip(), 16) for name in ("AT_HWCAP", "AT_HWCAP2")}
    assert hardware["AT_HWCAP"] & HAS_ASIMDDP
    assert not hardware["AT_HWCAP"] & HAS_SVE
    assert not hardware["AT_HWCAP2"] & HAS_I8MM


def test_facts(pi: Device) -> None:
    facts = probe(pi)
    assert (facts.system, facts.machine, facts.word_bits) == ("Linux", "aarch64", 64)
    assert facts.board == MODEL
    assert {"asimd", "asimddp"} <= set(facts.cpu_features)
    assert not {"i8mm", "sve", "avx2"} & set(facts.cpu_features)
    assert facts.libc == "glibc 2.36"
    assert facts.python.startswith("3.11.")
    assert facts.memory_total_bytes == 8_245_360 * 1024
    assert facts.root == "/home/pi/.phiship/v1"


@pytest.mark.parametrize("kind", RUNTIMES)
def test_deploy_and_generate(
    kind: str, pi: Device, artifacts: dict[str, Path], console: Console
) -> None:
    """The board gets the runtime as wheels, and answers; the second push sends nothing."""
    manifest = read_manifest(artifacts[kind])
    smoke = manifest.smoke
    assert smoke
    first = {step.name: step for step in deploy(artifacts[kind], pi, console).steps}
    assert all(step.ok for step in first.values())
    assert first["install"].measured.endswith(", installed")
    assert smoke.expect in first["smoke test"].measured
    status = read_status(pi)
    assert status.current
    assert status.current == status.state.good
    assert status.current.startswith(manifest.name)
    assert any(name.startswith(f"{RUNTIMES[kind]}-") for name in status.runtimes)

    second = {step.name: step for step in deploy(artifacts[kind], pi, console).steps}
    assert "install" not in second
    assert second["transfer"].measured.startswith("0 B")
    assert read_status(pi).current == status.current

    answer = generate(pi, smoke.prompt, smoke.max_tokens)
    assert answer.text.strip() == EXPECTED
    assert answer.engine == f"{RUNTIMES[kind]} {manifest.runtime.version}"
