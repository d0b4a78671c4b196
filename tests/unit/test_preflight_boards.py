"""Preflight on recorded boards: the verdict on each format, and targets that match their boards."""

import re
from pathlib import Path

import msgspec
import pytest

from tests.boards.board import NAMES, load_facts
from tests.boards.manifests import MODEL, make_manifest, refusal
from tests.deploy.sealed import seal_noise
from toolkit import catalog
from toolkit.artifact import Manifest, read_manifest
from toolkit.preflight import check_facts, list_ways, suggest

NO_CUDA = ["provider cuda needs an NVIDIA GPU with its driver, and none was found"]
NO_METAL = ["provider metal needs Apple silicon, and none was found"]
PYTHON_FOR_GENAI = r"Python 3\.10\.12; onnxruntime-genai{} needs 3\.11 or newer"
EXFAT = ["/media/my disk/phiship/v1 is on exfat, which has no symbolic links"]
LIMIT = (
    r"2\.92 GB of memory are available within its control group's limit; {} at context 4096 needs"
)
READ_ONLY = r"/srv/app/v1 cannot be written \(ext4\)"
BITS_32 = [
    "aarch64 with a 32-bit userland; the runtimes need 64 bits and one of x86_64, amd64, aarch64"
]
# What each board says to Phi-3.5-mini with 4 bits at 4096 tokens, in the order of ARTIFACTS:
# nothing when it can run it, else all that has to be in the refusal.
ARTIFACTS = ("onnx-cpu-int4", "onnx-cuda-int4", "gguf-q4_0", "openvino-int4", "mlx-4bit")
VERDICTS: dict[str, tuple[list[str], ...]] = {
    "pi-4": ([], NO_CUDA, [], [], NO_METAL),
    "pi-5": ([], NO_CUDA, [], [], NO_METAL),
    "pi-5-16gb": ([], NO_CUDA, [], [], NO_METAL),
    "pi-4-32bit": (BITS_32,) * 5,
    "nuc-12": ([], NO_CUDA, [], [], NO_METAL),
    "core-ultra": (EXFAT, NO_CUDA + EXFAT, EXFAT, EXFAT, NO_METAL + EXFAT),
    "mac-mini-m2": (
        [r"4\.79 GB of memory are available; .* at context 4096 needs 5\.96 GB"],
        ["there are no wheels of onnxruntime-genai-cuda for macOS on arm64", *NO_CUDA],
        [], [], [],
    ),
    "jetson-agx-orin-jetpack-6": ([], [], [], [], NO_METAL),
    "jetson-orin-nano-jetpack-6": (
        [PYTHON_FOR_GENAI.format(""), r"4 GB of memory are available; .* needs 5\.96 GB"],
        [PYTHON_FOR_GENAI.format("-cuda"), r"4 GB of memory are available; .* needs 4\.8 GB"],
        [],
        [r"4 GB of memory are available; phi-3.5-mini-openvino-int4 .* needs 4\.08 GB"],
        [*NO_METAL, r"needs 4\.36 GB"],
    ),
    "jetson-orin-nano-jetpack-5": (
        [r"Python 3\.9\.5; onnxruntime-genai needs 3\.11 or newer", r"5\.74 GB .* needs 5\.96 GB"],
        [r"glibc 2\.31; onnxruntime-genai-cuda needs 2\.34 or newer", r"Python 3\.9\.5"],
        [r"Python 3\.9\.5; xllamacpp needs 3\.10 or newer"],
        [r"glibc 2\.31; openvino-genai needs 2\.35 or newer", r"Python 3\.9\.5"],
        [r"glibc 2\.31; mlx-lm needs 2\.35 or newer", *NO_METAL],
    ),
    "termux": (
        ["the C library is bionic; onnxruntime-genai has no wheels for it", r"2\.16 GB of memory"],
        ["the C library is bionic; onnxruntime-genai-cuda has no wheels for it", *NO_CUDA],
        ["the C library is bionic; xllamacpp has no wheels for it", r"2\.16 GB of memory"],
        ["the C library is bionic; openvino-genai has no wheels for it"],
        ["the C library is bionic; mlx-lm has no wheels for it", *NO_METAL],
    ),
    "alpine": (
        ["the C library is musl; onnxruntime-genai has no wheels", r"1\.2 GB", READ_ONLY],
        ["the C library is musl; onnxruntime-genai-cuda has no wheels", *NO_CUDA, READ_ONLY],
        ["the C library is musl; xllamacpp has no wheels", r"1\.2 GB", READ_ONLY],
        ["the C library is musl; openvino-genai has no wheels", r"1\.2 GB", READ_ONLY],
        ["the C library is musl; mlx-lm has no wheels", *NO_METAL, r"1\.2 GB", READ_ONLY],
    ),
    "container": (
        [LIMIT.format("phi-3.5-mini-onnx-cpu-int4")],
        NO_CUDA,
        [LIMIT.format("phi-3.5-mini-gguf-q4_0")],
        [LIMIT.format("phi-3.5-mini-openvino-int4")],
        [LIMIT.format("phi-3.5-mini-mlx-4bit"), *NO_METAL],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return read_manifest(seal_noise(tmp_path_factory.mktemp("sealed") / "noise"))


def test_every_board_has_its_verdicts() -> None:
    assert set(VERDICTS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", range(len(ARTIFACTS)), ids=ARTIFACTS)
def test_verdict_of_a_board(name: str, number: int, noise: Manifest) -> None:
    facts = load_facts(name)
    manifest = make_manifest(noise, f"{MODEL}-{ARTIFACTS[number]}")
    expected = VERDICTS[name][number]
    if expected:
        error = refusal(facts, manifest)
        assert all(re.search(text, str(error)) for text in expected), str(error)
        assert error.advice
    else:
        check_facts("board", facts, manifest, now_s=facts.clock_s)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_what_would_fit_does_fit(name: str, artifact: str, noise: Manifest) -> None:
    """Whatever is suggested passes the whole preflight but for a folder that is wrong anyway."""
    facts = msgspec.structs.replace(
        load_facts(name), disk_is_writable=True, disk_file_system="ext4"
    )
    manifest = make_manifest(noise, f"{MODEL}-{artifact}")
    if facts.word_bits != 64:
        return
    advice = "; ".join(suggest(facts, manifest))
    fits = re.findall(rf"({MODEL}-[\w.-]+)(?: with --context (\d+))?", advice)
    for recipe, context in fits:
        own = int(context) if context else None
        check_facts("board", facts, make_manifest(noise, recipe, own), now_s=facts.clock_s)
    shorter = re.search(r"^--context (\d+) would fit", advice)
    if shorter:
        context_length = int(shorter.group(1))
        check_facts("board", facts, make_manifest(noise, manifest.name, context_length))
        refusal(facts, make_manifest(noise, manifest.name, context_length + 256))


@pytest.mark.parametrize(
    ("name", "artifact", "advice"),
    [
        ("container", "gguf-q4_0", r"--context 1280 would fit"),
        ("container", "onnx-cuda-int4", r"phi-3\.5-mini-gguf-q4_0 with --context 1280"),
        ("pi-5", "onnx-cuda-int4", r"take an artifact for the CPU; .* phi-3\.5-mini-gguf-q4_0"),
        ("jetson-orin-nano-jetpack-5", "onnx-cuda-int4", "JetPack 6 has glibc 2.35"),
        ("jetson-orin-nano-jetpack-6", "onnx-cuda-int4", r"python3\.11 .* `python:`"),
        ("jetson-orin-nano-jetpack-6", "onnx-cuda-int4", r"would fit: phi-3\.5-mini-gguf-iq4_xs"),
        ("mac-mini-m2", "onnx-cpu-int4", r"--context 2560 would fit; .* phi-3\.5-mini-mlx-4bit"),
        ("termux", "gguf-q4_0", "proot-distro"),
        ("alpine", "gguf-q4_0", "container image with glibc"),
        ("core-ultra", "gguf-q4_0", "^choose a folder on another disk: `root:` in devices.yaml$"),
    ],
)
def test_advice(name: str, artifact: str, advice: str, noise: Manifest) -> None:
    error = refusal(load_facts(name), make_manifest(noise, f"{MODEL}-{artifact}"))
    assert re.search(advice, error.advice), error.advice


@pytest.mark.parametrize("name", catalog.names("targets"))
def test_targets_name_boards_that_are_there(name: str) -> None:
    target = catalog.load_target(name)
    boards = re.findall(r"([\w-]+)\.json", target.verified)
    assert set(boards) <= set(NAMES)
    assert boards or "tests/boards" not in target.verified
    if target.push == "ssh" and name not in ("embedded", "nvidia-gpu"):
        assert boards


@pytest.mark.parametrize(
    ("target", "board", "without"),
    [
        ("raspberry-pi-4", "pi-4", ()),
        ("raspberry-pi-5", "pi-5", ()),
        ("raspberry-pi-5-16gb", "pi-5-16gb", ()),
        ("jetson-agx-orin", "jetson-agx-orin-jetpack-6", ()),
        ("jetson-orin-nano", "jetson-orin-nano-jetpack-6", ("onnx/cuda", "onnx/cpu")),  # its Python
        ("intel-nuc", "nuc-12", ()),
        ("intel-core-ultra", "core-ultra", ()),
        ("intel-cpu", "container", ()),
        ("mac-apple-silicon", "mac-mini-m2", ()),
        ("android-termux", "termux", ("gguf/cpu",)),  # no wheels: somebody has to build it
    ],
)
def test_a_board_runs_what_its_target_says(
    target: str, board: str, without: tuple[str, ...]
) -> None:
    runs = set(catalog.load_target(target).runs)
    assert runs - set(without) <= set(list_ways(load_facts(board)))
    assert not set(without) & set(list_ways(load_facts(board)))


@pytest.mark.parametrize(
    ("target", "board"),
    [
        ("raspberry-pi-4", "pi-4"),
        ("raspberry-pi-5", "pi-5"),
        ("raspberry-pi-5-16gb", "pi-5-16gb"),
    ],
)
def test_boards_fit_their_targets_memory(target: str, board: str) -> None:
    """A target's memory left for a model is about what such a board has available."""
    usable = catalog.load_target(target).usable_memory_bytes
    assert load_facts(board).usable_memory_bytes == pytest.approx(usable, rel=0.05)


def test_boards_folder_has_nothing_else() -> None:
    folder = Path(__file__).parents[1] / "boards"
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".py", ""}
