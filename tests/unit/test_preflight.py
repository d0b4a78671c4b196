"""Preflight: every verdict with its numbers, and advice that holds when it is followed."""

import importlib.metadata
import re
from typing import Any

import msgspec
import pytest

from tests.boards.board import load_facts
from tests.boards.manifests import MODEL, make_manifest, refusal
from tests.deploy.sealed import seal_noise
from toolkit import catalog
from toolkit.artifact import Manifest, read_manifest
from toolkit.checkpoint.config import Config
from toolkit.device import Accelerator, EngineFacts, Facts
from toolkit.errors import PreflightError
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.preflight import (
    DISK_RESERVE_BYTES,
    WAYS,
    Finding,
    check_disk,
    check_facts,
    describe_facts,
    inspect,
    rebuild_plan,
    suggest,
)
from toolkit.preflight.runtime import WHEELS


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return read_manifest(seal_noise(tmp_path_factory.mktemp("sealed") / "noise"))


def change(facts: Facts, **fields: Any) -> Facts:
    return msgspec.structs.replace(facts, **fields)


def find(facts: Facts, manifest: Manifest, name: str, **options: Any) -> Finding:
    """The finding of a name; there must be one."""
    options = {"now_s": facts.clock_s, **options}
    return next(one for one in inspect(facts, manifest, **options) if one.name == name)


def engine(**fields: Any) -> EngineFacts:
    there: dict[str, Any] = {
        "package": "xllamacpp", "module": "xllamacpp", "importable": False, "version": "",
        "signal": None, "error": "", "is_installed": True,
    }  # fmt: skip
    return EngineFacts(**{**there, **fields})


def test_swap_never_counts(noise: Manifest) -> None:
    facts = load_facts("jetson-orin-nano-jetpack-6")
    manifest = make_manifest(noise, f"{MODEL}-openvino-int4")
    assert facts.swap_free_bytes and facts.usable_memory_bytes
    assert facts.usable_memory_bytes + facts.swap_free_bytes > manifest.device_memory_bytes
    refusal(facts, manifest)
    check_facts("board", change(facts, memory_available_bytes=4_200_000_000), manifest)


def test_the_tighter_of_memory_and_limit_counts(noise: Manifest) -> None:
    manifest = make_manifest(noise, f"{MODEL}-gguf-q4_0")
    need = manifest.device_memory_bytes
    facts = change(load_facts("pi-5"), memory_available_bytes=need, memory_limit_bytes=need)
    assert find(facts, manifest, "memory").verdict == "ok"
    for field in ("memory_available_bytes", "memory_limit_bytes"):
        assert find(change(facts, **{field: need - 1}), manifest, "memory").verdict == "refused"
    unknown = change(facts, memory_available_bytes=None, memory_limit_bytes=None)
    assert find(unknown, manifest, "memory").verdict == "warning"
    assert find(change(unknown, memory_limit_bytes=5), manifest, "memory").verdict == "refused"


@pytest.mark.parametrize(
    ("found", "installs", "verdict", "text"),
    [
        (engine(importable=True, version="0.18.0"), False, "ok", "xllamacpp 0.18.0 can be"),
        (engine(importable=True, version="0.1"), False, "warning", "it was checked with 0.18.0"),
        (engine(signal="SIGILL"), False, "refused", "killed by SIGILL: its wheel uses instruct"),
        (engine(signal="SIGILL"), True, "warning", "killed by SIGILL"),
        (engine(error="ModuleNotFoundError: No module named 'x'", is_installed=False), False,
         "refused", "python3 cannot import xllamacpp: ModuleNotFoundError"),
        (engine(error="ImportError: libgomp.so.1: cannot open shared object file"), False,
         "refused", "libgomp.so.1"),
        (engine(error="ImportError: libgomp.so.1: cannot open shared object file"), True,
         "refused", "libgomp.so.1"),
        (engine(error="ValueError: old"), True, "warning", "ValueError: old"),
    ],
)  # fmt: skip
def test_import_of_the_engine(
    found: EngineFacts, installs: bool, verdict: str, text: str, noise: Manifest
) -> None:
    manifest = make_manifest(noise, f"{MODEL}-gguf-q4_0")
    facts = change(load_facts("pi-5"), engine=found)
    finding = find(facts, manifest, "engine", installs=installs)
    assert (finding.verdict, text in finding.text) == (verdict, True), finding


def test_an_engine_that_imports_needs_no_wheels(noise: Manifest) -> None:
    """Built in Termux by hand, or an old Python that somebody has made it work with."""
    manifest = make_manifest(noise, f"{MODEL}-gguf-q4_0")
    works = engine(importable=True, version="0.18.0")
    facts = change(load_facts("termux"), engine=works, memory_available_bytes=8_000_000_000)
    check_facts("phone", facts, manifest, now_s=facts.clock_s)
    old = change(facts, python="3.9.2")
    check_facts("phone", old, manifest, now_s=facts.clock_s)
    assert "phiship needs 3.9" in str(refusal(change(facts, python="3.8.10"), manifest))


@pytest.mark.parametrize(
    ("companions", "installs", "verdict", "text"),
    [
        (("pillow",), False, "ok", "can be imported"),
        ((), False, "refused", "pillow, which this artifact needs beside it, is missing in"),
        ((), True, "ok", "pillow beside it comes with this push"),
    ],
)
def test_what_an_artifact_needs_beside_its_engine(
    companions: tuple[str, ...], installs: bool, verdict: str, text: str, noise: Manifest
) -> None:
    manifest = make_manifest(noise, "phi-3.5-vision-onnx-cpu-int4")
    own = engine(
        package="onnxruntime-genai", importable=True, version="0.18.0", companions=companions
    )
    facts = change(load_facts("pi-5-16gb"), engine=own)
    finding = find(facts, manifest, "engine", installs=installs)
    assert (finding.verdict, text in finding.text) == (verdict, True), finding
    assert ("pip install pillow" in finding.advice) == (verdict == "refused")


def test_jinja2_is_asked_for_in_words_that_a_shell_takes(noise: Manifest) -> None:
    manifest = make_manifest(noise, f"{MODEL}-gguf-q4_0")
    runtime = msgspec.structs.replace(manifest.runtime, companions=("jinja2>=3.1.6",))
    manifest = msgspec.structs.replace(manifest, runtime=runtime)
    facts = change(load_facts("pi-5"), engine=engine(importable=True, version="0.18.0"))
    finding = find(facts, manifest, "engine", installs=False)
    assert "jinja2>=3.1.6, which this artifact needs beside it, is missing" in finding.text
    assert "-m pip install 'jinja2>=3.1.6'" in finding.advice


def test_a_missing_engine_that_is_installed_with_this_push_is_no_obstacle(noise: Manifest) -> None:
    manifest = make_manifest(noise, f"{MODEL}-gguf-q4_0")
    missing = engine(is_installed=False, error="No module named 'xllamacpp'")
    facts = change(load_facts("pi-5"), engine=missing)
    error = refusal(facts, manifest)
    assert "pip install xllamacpp==0.18.0" in error.advice
    check_facts("board", facts, manifest, now_s=facts.clock_s, installs=True)
    without = refusal(change(facts, has_venv=False), manifest, installs=True)
    assert "no module venv" in str(without)
    # ... but where there are no wheels, nothing can be installed, nor replaced.
    on_musl = change(facts, libc="musl")
    assert "has no wheels" in str(refusal(on_musl, manifest, installs=True))
    crashing = change(on_musl, engine=engine(signal="SIGSEGV"))
    assert "killed by SIGSEGV" in str(refusal(crashing, manifest, installs=True))


@pytest.mark.parametrize(
    ("fields", "verdict", "text"),
    [
        ({"libc": "glibc 2.28"}, "ok", "glibc 2.28; onnxruntime-genai needs 2.28 or newer"),
        ({"libc": "glibc 2.27"}, "refused", "glibc 2.27; onnxruntime-genai needs 2.28"),
        ({"libc": "glibc 2.100"}, "ok", "glibc 2.100"),
        ({"libc": ""}, "warning", "glibc of unknown version"),
        ({"libc": "musl 1.2.5"}, "refused", "the C library is musl 1.2.5"),
        ({"system": "Darwin", "machine": "x86_64", "libc": "none"}, "refused", "no wheels of"),
        ({"system": "Darwin", "machine": "arm64", "libc": "none", "system_version": "macOS 13.6"},
         "refused", "macOS 13.6; onnxruntime-genai needs 14.0"),
        ({"system": "Darwin", "machine": "arm64", "libc": "none", "system_version": "macOS 14.0"},
         "ok", "macOS 14.0"),
    ],
)  # fmt: skip
def test_c_library_against_wheels(
    fields: dict[str, Any], verdict: str, text: str, noise: Manifest
) -> None:
    manifest = make_manifest(noise, f"{MODEL}-onnx-cpu-int4")
    finding = find(change(load_facts("pi-5"), **fields), manifest, "wheels")
    assert (finding.verdict, text in finding.text) == (verdict, True), finding


@pytest.mark.parametrize(
    ("package", "wheels"),
    [
        ("onnxruntime-genai", ["onnxruntime-genai", "onnxruntime"]),
        ("openvino-genai", ["openvino-genai", "openvino", "openvino-tokenizers"]),
        ("xllamacpp", ["xllamacpp"]),
        ("mlx-lm", ["mlx", "mlx-cpu"]),
    ],
)
def test_the_table_says_what_the_wheels_installed_here_say(package: str, wheels: list[str]) -> None:
    found = [importlib.metadata.distribution(name).read_text("WHEEL") or "" for name in wheels]
    lowest = [
        min(map(int, re.findall(r"^Tag: .*manylinux_2_(\d+)_x86_64", text, re.MULTILINE)))
        for text in found
        if "x86_64" in text
    ]
    if not lowest:
        pytest.skip("these are no wheels for x86-64")
    assert WHEELS[package]["x86_64"].system == (2, max(lowest))


@pytest.mark.parametrize("model", ["tiny-phi3", MODEL])
def test_every_way_takes_the_package_its_recipes_say(model: str) -> None:
    decoder = read_decoder(Config(model, catalog.load_model(model).config))
    for recipe in catalog.load_recipes(model):
        needs = make_plan(recipe, decoder).needs
        assert WAYS[f"{recipe.format}/{needs.provider}"] == needs.package
    assert set(WAYS.values()) == set(WHEELS)


def test_accelerators(noise: Manifest) -> None:
    agx = load_facts("jetson-agx-orin-jetpack-6")
    cuda = make_manifest(noise, f"{MODEL}-onnx-cuda-int4")
    assert "no CUDA in /usr/local/cuda" in str(refusal(change(agx, cuda=None), cuda))
    assert "CUDA 12.6.2" in find(agx, cuda, "accelerator").text
    npu = make_manifest(noise, f"{MODEL}-openvino-npu-int4")
    box = change(load_facts("core-ultra"), disk_file_system="ext4")
    check_facts("box", box, npu, now_s=box.clock_s)
    assert "needs an Intel NPU" in str(refusal(load_facts("nuc-12"), npu))
    locked = Accelerator(kind="intel_npu", name="accel0", is_accessible=False)
    error = refusal(change(box, accelerators=(locked,)), npu)
    assert "accel0 is there, and this user may not open it" in str(error)
    assert "usermod -a -G render" in error.advice


def test_a_graphics_card_has_memory_that_nobody_knows(noise: Manifest) -> None:
    card = Accelerator(kind="nvidia", name="driver 580.95", is_accessible=True)
    facts = change(load_facts("nuc-12"), accelerators=(card,), cuda="12.6")
    manifest = make_manifest(noise, f"{MODEL}-onnx-cuda-int4")
    assert find(facts, manifest, "memory").verdict == "warning"


def test_instruction_sets(noise: Manifest) -> None:
    facts = load_facts("nuc-12")
    openvino = make_manifest(noise, f"{MODEL}-openvino-int4")
    onnx = make_manifest(noise, f"{MODEL}-onnx-cpu-int4")
    assert "no SSE4.2" in str(refusal(change(facts, cpu_features=("aes",)), openvino))
    old = change(facts, cpu_features=("sse4_2",))
    assert find(old, openvino, "processor").verdict == "warning"
    assert find(change(facts, cpu_features=("aes",)), onnx, "processor").verdict == "warning"
    assert find(load_facts("pi-4"), onnx, "processor").verdict == "ok"
    unknown = inspect(change(facts, cpu_features=()), openvino, now_s=facts.clock_s)
    assert "processor" not in {finding.name for finding in unknown}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"disk_is_writable": False}, "cannot be written"),
        ({"disk_file_system": "vfat"}, "is on vfat, which has no symbolic links"),
        ({"root": "/storage/emulated/0/phiship/v1", "disk_file_system": "fuse"}, "is on fuse"),
        ({"root": "/sdcard/v1", "disk_file_system": None}, "is on shared storage"),
    ],
)
def test_root_folder(fields: dict[str, Any], text: str, noise: Manifest) -> None:
    manifest = make_manifest(noise, f"{MODEL}-gguf-q4_0")
    error = refusal(change(load_facts("pi-5"), **fields), manifest)
    assert text in str(error)
    assert "`root:` in devices.yaml" in error.advice


def test_fat_has_no_large_files(noise: Manifest) -> None:
    large = msgspec.structs.replace(noise.files[0], size_bytes=5_000_000_000)
    facts = change(load_facts("pi-5"), disk_file_system="vfat")
    manifest = make_manifest(noise, f"{MODEL}-gguf-q4_0")
    assert "4 GiB" not in str(refusal(facts, manifest))
    with_large = msgspec.structs.replace(manifest, files=(large,))
    assert "no files beyond 4 GiB; the largest here has 5 GB" in str(refusal(facts, with_large))


@pytest.mark.parametrize(
    ("skew_s", "text"),
    [(0, ""), (299, ""), (-299, ""), (301, "5 minutes ahead"), (-86400, "1440 minutes behind")],
)
def test_clock_skew_is_a_warning(skew_s: int, text: str, noise: Manifest) -> None:
    facts = load_facts("pi-4")
    assert facts.clock_s
    manifest = make_manifest(noise, f"{MODEL}-gguf-q4_0")
    findings = check_facts("board", facts, manifest, now_s=facts.clock_s - skew_s)
    said = [one.text for one in findings if one.name == "clock"]
    assert said == ([f"its clock is {text}"] if text else [])


def test_warnings_go_into_the_report(noise: Manifest) -> None:
    facts = load_facts("pi-5")
    manifest = make_manifest(noise, f"{MODEL}-gguf-q4_0")
    findings = check_facts("board", facts, manifest, now_s=facts.clock_s)
    text = describe_facts(facts, findings)
    assert "Raspberry Pi 5 Model B Rev 1.0, aarch64, glibc 2.36, Python 3.11.2, 7.58 GB" in text
    assert "; warning: it is slowed down now: soft temperature limit" in text
    assert "; warning: it has 83 degrees" in text
    assert "warning" not in describe_facts(facts)


@pytest.mark.parametrize("file", [0, 1_000_000])
def test_disk(file: int) -> None:
    check_disk("board", 0, 0)  # everything has arrived before
    need = 1000 + file + DISK_RESERVE_BYTES
    check_disk("board", 1000, need, wheel_bytes=file)
    with pytest.raises(
        PreflightError, match="65 MB of disk are free" if file else "64 MB"
    ) as caught:
        check_disk(
            "board", 1000, need - 1, wheel_bytes=file, list_fits=lambda: ["a smaller one would fit"]
        )
    assert ("more for the runtime" in str(caught.value)) == bool(file)
    assert "a smaller one would fit" in caught.value.advice


def test_only_recipes_that_fit_the_disk_are_named(noise: Manifest) -> None:
    facts = load_facts("pi-5")
    manifest = make_manifest(noise, f"{MODEL}-onnx-cpu-int4")
    assert "more" in suggest(facts, manifest)[0]
    free_bytes = 2_200_000_000
    (fits,) = suggest(change(facts, disk_free_bytes=free_bytes), manifest)
    names = re.findall(rf"{MODEL}-[\w.-]+", fits)
    assert names and "more" not in fits
    for name in names:
        plan = rebuild_plan(make_manifest(noise, name))
        assert plan and plan.device_disk_bytes + DISK_RESERVE_BYTES <= free_bytes


def test_plans_are_rebuilt_or_not_at_all(noise: Manifest) -> None:
    manifest = make_manifest(noise, f"{MODEL}-gguf-q4_0")
    plan = rebuild_plan(manifest)
    assert plan and plan.device_memory_bytes == manifest.device_memory_bytes
    for other in (
        noise,
        msgspec.structs.replace(manifest, format="tflite"),
        msgspec.structs.replace(manifest, plan={}),
        msgspec.structs.replace(manifest, plan={**manifest.plan, "model": "somebody-elses"}),
        msgspec.structs.replace(manifest, device_memory_bytes=manifest.device_memory_bytes + 1),
    ):
        assert rebuild_plan(other) is None
        assert suggest(load_facts("pi-5"), other) == []
