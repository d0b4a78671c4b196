"""What each vendor is asked to do, as values: commands, estimates, and what it cannot do."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from tests.checkpoints import write_random_checkpoint
from toolkit import catalog, formats
from toolkit.checkpoint import Checkpoint
from toolkit.errors import PlanError
from toolkit.families import read_decoder
from toolkit.recipe import Recipe
from toolkit.vendor import Export, Places, python_of

PLACES = Places(Path("env"), Path("out"), Path("scratch"))
PYTHON = str(python_of(Path("env")))


def plan(checkpoint: Checkpoint, name: str, **quantization: object) -> Export:
    """The export of a bundled recipe with other settings of its quantization."""
    return plan_recipe(checkpoint, change(catalog.load_recipe(name), **quantization))


def plan_recipe(checkpoint: Checkpoint, recipe: Recipe) -> Export:
    """The vendor's export of this checkpoint."""
    decoder = read_decoder(checkpoint.config)
    return formats.get_vendor(recipe.format).plan_export(recipe, decoder, checkpoint, PLACES)


def change(recipe: Recipe, **quantization: object) -> Recipe:
    """The recipe with some settings of its quantization replaced, checked like a file's."""
    fields = msgspec.to_builtins(recipe)
    fields["quantization"] |= quantization
    changed: Recipe = msgspec.convert(fields, type(recipe))
    return changed


@pytest.fixture(scope="module")
def tiny(example: Path) -> Checkpoint:
    """The bundled example."""
    return Checkpoint.open(example)


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Random checkpoints by variant."""
    folder = tmp_path_factory.mktemp("variants")
    return lambda name: Checkpoint.open(write_random_checkpoint(folder / name, name))


def test_onnx(tiny: Checkpoint) -> None:
    export = plan(tiny, "tiny-phi3-onnx-cpu-int4")
    (command,) = export.commands
    assert command.argv == (
        PYTHON, "-m", "onnxruntime_genai.models.builder",
        "-i", str(tiny.folder), "-o", "out", "-c", "scratch/cache", "-p", "int4", "-e", "cpu",
        "--extra_options", "block_size=32", "accuracy_level=4", "hf_token=false", "hf_remote=false",
    )  # fmt: skip
    assert export.notes == (
        "the builder stores the embedding as fp32, the same values in more bytes",
    )


@pytest.mark.parametrize(
    ("settings", "option"),
    [
        ({"symmetric": False}, "is_symmetric=false"),
        ({"block_size": 128}, "block_size=128"),
        ({"head": "int8"}, "matmul_mixed_precision=last_matmul:int8"),
        ({"head": "fp32"}, "nodes_to_exclude=/lm_head/MatMul"),
    ],
)
def test_onnx_settings(tiny: Checkpoint, settings: dict[str, object], option: str) -> None:
    assert option in plan(tiny, "tiny-phi3-onnx-cpu-int4", **settings).commands[0].argv


def test_onnx_leaves_the_window_out(variant: Callable[[str], Checkpoint]) -> None:
    export = plan(variant("window"), "tiny-phi3-onnx-cpu-int4")
    assert export.last_context == 32
    assert "beyond 32 tokens" in export.notes[-1]


def test_onnx_quantizes_an_embedding_that_is_the_head(
    variant: Callable[[str], Checkpoint],
) -> None:
    tied = variant("partial_rotary_tied")
    export = plan(tied, "tiny-phi3-onnx-cpu-int4", embedding="int4", head="int4")
    assert "shared_embeddings=true" in export.commands[0].argv
    assert export.notes == ()
    # Left out, it would quantize the embedding as well.
    assert "shared_embeddings=false" in plan(tied, "tiny-phi3-onnx-cpu-int4").commands[0].argv


def test_openvino(tiny: Checkpoint) -> None:
    (command,) = plan(tiny, "tiny-phi3-openvino-int4", group_size=128).commands
    assert command.argv == (
        PYTHON, "-m", "optimum.commands.optimum_cli", "export", "openvino",
        "--model", str(tiny.folder), "--task", "text-generation-with-past",
        "--weight-format", "int4", "--ratio", "1.0", "--group-size", "128", "--sym", "out",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"symmetric": False}, ["--weight-format", "int4", "--ratio", "1.0", "--group-size", "32"]),
        ({"embedding": "int4", "head": "int4"}, ["--all-layers"]),
        ({"precision": "int8"}, ["--weight-format", "int8"]),
        ({"precision": "f16", "embedding": "f16", "head": "f16"}, ["--weight-format", "fp16"]),
    ],
)
def test_openvino_settings(tiny: Checkpoint, settings: dict[str, object], words: list[str]) -> None:
    argv = plan(tiny, "tiny-phi3-openvino-int4", group_size=32, **settings).commands[0].argv
    start = argv.index(words[0])
    assert list(argv[start : start + len(words)]) == words
    assert ("--sym" in argv) == (settings.get("symmetric", True) and "int4" in argv)


def test_mlx(tiny: Checkpoint) -> None:
    export = plan(tiny, "tiny-phi3-mlx-4bit")
    (command,) = export.commands
    assert command.argv == (
        PYTHON, "-m", "mlx_lm", "convert", "--hf-path", str(tiny.folder),
        "--mlx-path", "scratch/result", "--dtype", "bfloat16",
        "-q", "--q-bits", "4", "--q-group-size", "64",
    )  # fmt: skip
    assert export.result == Path("scratch/result")
    assert plan(tiny, "tiny-phi3-mlx-4bit", bits=16).commands[0].argv[-1] == "bfloat16"
    mixed = plan(tiny, "tiny-phi3-mlx-4bit", sensitive_bits=6).commands[0].argv
    assert mixed[-2:] == ("--quant-predicate", "mixed_4_6")


def test_gguf(tiny: Checkpoint) -> None:
    """Three of llama.cpp's tools; the last names the stop id that the converter leaves out."""
    convert, quantize, name = plan(tiny, "tiny-phi3-gguf-q4_k_m").commands
    source = "env/llama_cpp_python-0.3.36/vendor/llama.cpp"
    assert convert.argv == (
        PYTHON, f"{source}/convert_hf_to_gguf.py", str(tiny.folder), "--outtype", "bf16",
        "--outfile", "scratch/lossless.gguf", "--model-name", convert.argv[-1],
    )  # fmt: skip
    assert quantize.argv == (
        f"{source}/build/bin/llama-quantize",
        "scratch/lossless.gguf", "scratch/quantized.gguf", "Q4_K_M",
    )  # fmt: skip
    assert name.argv[:3] == (
        PYTHON,
        f"{source}/gguf-py/gguf/scripts/gguf_new_metadata.py",
        "--force",
    )
    assert name.argv[-2:] == ("scratch/quantized.gguf", "out/model.gguf")


def test_gguf_settings(tiny: Checkpoint) -> None:
    plain = plan(tiny, "tiny-phi3-gguf-q4_k_m", precision="f16").commands
    assert [command.name for command in plain] == ["convert_hf_to_gguf.py", "gguf_new_metadata.py"]
    assert "f16" in plain[0].argv
    head = plan(tiny, "tiny-phi3-gguf-q4_0", embedding="q8_0", head="q6_k").commands[1].argv
    assert head[1:5] == ("--token-embedding-type", "q8_0", "--output-tensor-type", "q6_k")


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        (
            "tiny-phi3-onnx-cpu-int4",
            {"embedding": "int4"},
            "embedding: int4; an embedding that is also the head",
        ),
        ("tiny-phi3-onnx-cpu-int4", {"precision": "fp16"}, "for cuda only"),
        ("tiny-phi3-openvino-int4", {"embedding": "f16"}, "both int8 or both int4"),
        ("tiny-phi3-mlx-4bit", {"head_bits": 6}, "head_bits"),
        ("tiny-phi3-mlx-4bit", {"sensitive_bits": 8}, "4 bits mixed with 8"),
    ],
)
def test_what_a_vendor_cannot_do(
    tiny: Checkpoint, name: str, settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(PlanError, match=sentence) as caught:
        plan(tiny, name, **settings)
    assert "engine: native" in caught.value.advice


def test_llama_cpp_needs_the_sentencepiece_model(
    tmp_path: Path, variant: Callable[[str], Checkpoint]
) -> None:
    folder = write_random_checkpoint(tmp_path / "mha", "mha")
    (folder / "tokenizer.model").unlink()
    with pytest.raises(PlanError, match=r"needs tokenizer\.model"):
        plan(Checkpoint.open(folder), "tiny-phi3-gguf-q4_0")


# What was measured with the shape of Phi-3-mini (7.64 GB of bf16), in GB. An estimate must not be
# below, and should not refuse a machine that has a quarter more than it takes.
MINI_BYTES = 7_640_000_000
MEASURED_GB = {
    "tiny-phi3-onnx-cpu-int4": 21.7,
    "tiny-phi3-openvino-int4": 10.2,
    "tiny-phi3-mlx-4bit": 3.1,
    "tiny-phi3-gguf-q4_0": 1.0,
}


@pytest.mark.parametrize("recipe", MEASURED_GB)
def test_estimates_cover_what_was_measured(recipe: str, tmp_path: Path, example: Path) -> None:
    """The example with an embedding whose header says it is as large as all of Phi-3-mini."""
    shutil.copytree(example, tmp_path / "large")
    checkpoint = Checkpoint.open(tmp_path / "large")
    decoder = read_decoder(checkpoint.config)
    name = decoder.names.embedding
    rest = sum(tensor.nbytes for other, tensor in checkpoint.tensors.items() if other != name)
    rows = (MINI_BYTES - rest) // 2 // decoder.hidden
    checkpoint.tensors[name] = replace(checkpoint.tensors[name], shape=(rows, decoder.hidden))
    predicted_gb = plan_recipe(checkpoint, catalog.load_recipe(recipe)).memory_bytes / 1e9
    assert MEASURED_GB[recipe] <= predicted_gb <= 1.25 * MEASURED_GB[recipe]
