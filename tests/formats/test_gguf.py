"""GGUF artifacts: llama-quantize's bytes, read back within bounds, whatever the workers."""

import json
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.checkpoints import encode, write_random_checkpoint, write_safetensors
from tests.formats.gguf_cases import PRECISIONS, Artifacts, make_recipe, share_artifacts
from tests.formats.writing import write_artifact
from tests.golden.make_gguf import GOLDEN, digest_tensors, read_metadata
from toolkit import stream
from toolkit.checkpoint import Checkpoint
from toolkit.errors import ArtifactError, CheckpointError, PlanError
from toolkit.families import read_decoder
from toolkit.formats import gguf
from toolkit.formats.gguf import q4_0
from toolkit.formats.gguf.encoder import LARGEST_HALF, GgmlEncoder
from toolkit.formats.gguf.ggml import load_library
from toolkit.formats.gguf.mix import BLOCKS, GgmlType, choose_types
from toolkit.formats.gguf.tensors import read_tensors

EXPECTED = json.loads(GOLDEN.read_text("utf-8"))


@pytest.fixture
def cases(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Checkpoints and artifacts of all cases."""
    return share_artifacts(tmp_path_factory)


# Against llama.cpp's own tools


@pytest.mark.parametrize(
    ("case", "precision"),
    [(case, precision) for case, found in EXPECTED["tensors"].items() for precision in found],
)
def test_tensors_are_llama_quantizes_byte_for_byte(
    case: str, precision: str, cases: Artifacts
) -> None:
    written = cases.get(case, precision)
    assert digest_tensors(written.folder / "model.gguf") == EXPECTED["tensors"][case][precision]


@pytest.mark.parametrize("case", EXPECTED["metadata"])
def test_metadata_is_the_converters(case: str, cases: Artifacts) -> None:
    ours = read_metadata(cases.get(case, "f16").folder / "model.gguf")
    theirs = EXPECTED["metadata"][case]
    # Stop ids that the converter leaves out: <|end|> ends a turn, <|assistant|> a message.
    added = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"}
    assert set(ours) - set(theirs) == added
    named_after_the_folder = {"general.name", "general.basename", "general.finetune"}
    assert set(theirs) - set(ours) <= named_after_the_folder
    assert "phi-3" in ours["general.name"][1]
    for key in set(ours) & set(theirs) - {"general.name"}:
        assert ours[key] == theirs[key], key


def test_block_sizes_are_ggmls() -> None:
    for kind in GgmlType:
        assert BLOCKS[kind] == gguf_py.GGML_QUANT_SIZES[gguf_py.GGMLQuantizationType(kind)]


# Encoders


def random_weights(rows: int, columns: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((rows, columns), np.float32)
    # Rows of very different size, as real checkpoints have them, and rows of zeros.
    weights *= 10.0 ** rng.integers(-4, 3, (rows, 1)).astype(np.float32)
    weights[rng.integers(0, rows, 3)] = 0
    return weights


def as_raw(weights: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Weights as a checkpoint of that dtype has them."""
    kinds = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}
    return np.frombuffer(encode(weights, dtype), kinds[dtype]).reshape(weights.shape)  # type: ignore[arg-type]


def as_float32(raw: NDArray[Any]) -> NDArray[np.float32]:
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def run_encoder(kind: GgmlType, raw: NDArray[Any], path: Path) -> NDArray[np.uint8]:
    """What the encoder writes, behind 7 bytes that stay as they are."""
    path.write_bytes(bytes(7 + len(raw) * kind.row_bytes(raw.shape[1])))
    with path.open("r+b") as file:
        GgmlEncoder(kind).write(file.fileno(), raw, 0, (7,))
    assert path.read_bytes()[:7] == bytes(7)
    return np.fromfile(path, np.uint8, offset=7)


def run_ggml(kind: GgmlType, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The whole tensor through ggml's quantizer."""
    out = np.zeros(len(weights) * kind.row_bytes(weights.shape[1]), np.uint8)
    source = np.ascontiguousarray(weights)
    load_library().ggml_quantize_chunk(
        kind, source.ctypes.data, out.ctypes.data, 0, *source.shape, None
    )
    return out


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("kind", GgmlType)
def test_encoder_is_ggmls_quantizer(kind: GgmlType, dtype: str, tmp_path: Path) -> None:
    # 300 rows of 512 are more than one kernel call, the last one short.
    raw = as_raw(random_weights(300, 512), dtype)
    written = run_encoder(kind, raw, tmp_path / "data")
    assert np.array_equal(written, run_ggml(kind, as_float32(raw)))


@pytest.mark.parametrize("kind", [k for k in GgmlType if k.name in ("Q4_0", "Q8_0", "BF16", "F16")])
def test_encoder_is_gguf_pythons_quantizer(kind: GgmlType, tmp_path: Path) -> None:
    raw = as_raw(random_weights(64, 512), "bf16")
    expected = gguf_py.quantize(as_float32(raw), gguf_py.GGMLQuantizationType(kind))
    assert np.array_equal(
        run_encoder(kind, raw, tmp_path / "data"), expected.view(np.uint8).ravel()
    )


HARD_BITS = {
    # Few magnitudes: in most blocks the largest stands there several times, with both signs.
    "ties": [0x3F80, 0xBF80, 0x3F81, 0xBF81, 0x3F00, 0xBF00],
    "zeros of both signs": [0x0000, 0x8000],
    "zeros and one value": [0x0000, 0x8000, 0xC000],
    "largest that float16 holds": [0x477F, 0xC77F, 0x4700],
    "scales below float16's normal numbers": [0x3380, 0xB400, 0x3300],
    "scales that round to zero": [0x3000, 0xB000],
    "inverse scales near infinity": [0x0600, 0x8580, 0x0080],
    "subnormal weights": [0x0001, 0x8001, 0x007F],
}


@pytest.mark.parametrize("bits", HARD_BITS.values(), ids=HARD_BITS.keys())
def test_q4_0_of_hard_blocks_is_ggmls(bits: list[int], tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    raw = rng.choice(np.array(bits, np.uint16), (64, 256))
    written = run_encoder(GgmlType.Q4_0, raw, tmp_path / "data")
    assert np.array_equal(written, run_ggml(GgmlType.Q4_0, as_float32(raw)))


def test_q4_0_of_every_ratio_is_ggmls() -> None:
    """All pairs of an extreme's and a weight's bf16 mantissas, at the exponents that matter."""
    extremes = np.repeat(np.arange(0x3F80, 0x4000, dtype=np.uint16), 31)
    raw = np.zeros((len(extremes), 32), np.uint16)
    raw[:, 0] = extremes
    raw[1::2, 0] |= 0x8000
    raw[:, 1:] = np.random.default_rng(1).integers(0x3D00, 0x3F80, (len(extremes), 31))
    raw[:, 2::2] |= 0x8000
    encoded = np.zeros((len(raw), 18), np.uint8)
    assert q4_0.quantize(raw, encoded, LARGEST_HALF)
    assert np.array_equal(encoded.ravel(), run_ggml(GgmlType.Q4_0, as_float32(raw)))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("kind", GgmlType)
def test_weights_that_are_not_finite_are_refused(
    kind: GgmlType, value: float, dtype: str, tmp_path: Path
) -> None:
    weights = random_weights(300, 512)
    weights[270, 33] = value
    raw = as_raw(np.where(np.isnan(weights), 0, weights), dtype).copy()
    raw[270, 33] = (
        {"bf16": 0x7FC1, "f16": np.nan, "f32": np.nan}[dtype]
        if np.isnan(value)
        else (as_raw(np.full((1, 1), value, np.float32), dtype)[0, 0])
    )
    with pytest.raises(ValueError, match=r"non-finite weight .* in row 270, column 33"):
        run_encoder(kind, raw, tmp_path / "data")


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("kind", [kind for kind in GgmlType if kind.name not in ("F32", "BF16")])
def test_weights_beyond_float16_are_refused(kind: GgmlType, dtype: str, tmp_path: Path) -> None:
    weights = random_weights(8, 256)
    weights[3, 200] = -65600
    with pytest.raises(ValueError, match=f"too large for {kind.name} .* in row 3, column 200"):
        run_encoder(kind, as_raw(weights, dtype), tmp_path / "data")


# Read back


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "case", ["gqa", "longrope", "partial_rotary_tied", "narrow", "narrow_tied"]
)
def test_reading_back_keeps_every_weight_within_its_bound(
    case: str, precision: str, cases: Artifacts
) -> None:
    written = cases.get(case, precision)
    types = choose_types(make_recipe(precision).quantization, written.decoder)
    names = []
    for name, weights in gguf.dequantize(written.folder, written.decoder):
        names.append(name)
        source = written.checkpoint.read(name)
        assert weights.dtype == np.float32
        error = np.abs(weights - source)
        assert np.all(error <= bound_error(types[name], source)), name
        # A bound that nothing comes near would show nothing.
        if types[name] not in (GgmlType.F32, GgmlType.BF16):
            assert np.max(error / bound_error(types[name], source)) > 0.2, name
    assert set(names) == set(written.decoder.shapes())


def bound_error(kind: GgmlType, source: NDArray[np.float32]) -> NDArray[np.float32] | float:
    """Largest error of each weight: the step of its block, and what rounding the step adds."""
    if kind in (GgmlType.F32, GgmlType.BF16):
        return 0.0
    if kind == GgmlType.F16:
        return np.abs(source) * np.float32(2.0**-11) + np.float32(2.0**-25)
    half = 2.0**-10  # a float16 scale, times the largest code
    if kind in (GgmlType.Q4_0, GgmlType.Q5_0):
        # A weight opposite to the extreme is clipped: a whole step off.
        steps = 8 if kind == GgmlType.Q4_0 else 16
        return spread(source, 32, lambda block: _largest(block) * (1 / steps + half))
    if kind == GgmlType.Q8_0:
        return spread(source, 32, lambda block: _largest(block) * (0.5 / 127 + half))
    if kind == GgmlType.Q5_1:
        return spread(source, 32, lambda block: _range(block) * (0.5 / 31 + 2 * half))
    if kind == GgmlType.Q6_K:
        # Scales of 16 are 8 bit parts of the largest of 256; the search may trade one weight's
        # error against the others', by less than half a step.
        own = spread(source, 16, lambda block: _largest(block) / 32)
        return own + spread(source, 256, lambda block: _largest(block) / 254)
    if kind in (GgmlType.IQ4_NL, GgmlType.IQ4_XS):
        # Codes are -127 .. 113, 24 apart at most; the searched scale may clip the extremes by as
        # much. IQ4_XS: scales of 32 are 6 bit parts of the largest of 256.
        own = spread(source, 32, lambda block: _largest(block) * (24 / 127 + half))
        if kind == GgmlType.IQ4_NL:
            return own
        return own + spread(source, 256, lambda block: _largest(block) / 64)
    # Scale and minimum of 32 are 6 bit parts of the largest of 256; searched, as above.
    top = 15 if kind == GgmlType.Q4_K else 31
    own = spread(source, 32, lambda block: _range(block) / top)
    return own + spread(source, 256, lambda block: _range(block) / 63)


def spread(source: NDArray[np.float32], size: int, measure: Any) -> NDArray[np.float32]:
    """A measure of each block, repeated for its weights."""
    blocks = source.reshape(-1, size)
    return np.broadcast_to(measure(blocks)[:, None], blocks.shape).reshape(source.shape)


def _largest(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.abs(blocks).max(-1)


def _range(blocks: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.maximum(blocks.max(-1), 0) - np.minimum(blocks.min(-1), 0)


def test_a_file_with_other_tensors_is_not_read_silently(cases: Artifacts) -> None:
    other = read_decoder(cases.checkpoint("deep").config)
    with pytest.raises(ArtifactError, match=r"blk\.2\.attn_norm"):
        list(gguf.dequantize(cases.get("mha", "q4_0").folder, other))


def test_tensors_are_found_where_gguf_py_finds_them(cases: Artifacts, tmp_path: Path) -> None:
    path = cases.get("longrope", "q4_k_m").folder / "model.gguf"
    found, expected = read_tensors(path), gguf_py.GGUFReader(path).tensors
    assert [one.name for one in found] == [one.name for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.kind == other.tensor_type
        assert one.data.tobytes() == other.data.tobytes()
    for number, content in enumerate((path.read_bytes()[:-100], b"GGUF", b"")):
        damaged = tmp_path / str(number)
        damaged.write_bytes(content)
        with pytest.raises(ArtifactError, match="not a GGUF file, or cut short"):
            read_tensors(damaged)


# The whole file


@pytest.mark.parametrize("precision", ["q4_0", "q4_k_m", "bf16"])
def test_workers_and_shards_do_not_change_a_byte(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Checkpoint.open(write_random_checkpoint(tmp_path / "one", "longrope_gqa"))
    three = Checkpoint.open(write_random_checkpoint(tmp_path / "three", "longrope_gqa", shards=3))
    recipe = make_recipe(precision, is_long=True)
    for name in ("alone", "two"):
        (tmp_path / name).mkdir()
    write_artifact(recipe, one, tmp_path / "alone", workers=1)
    monkeypatch.setattr(stream, "TASK_WEIGHTS", 10_000)
    write_artifact(recipe, three, tmp_path / "two", workers=2)
    alone = (tmp_path / "alone" / "model.gguf").read_bytes()
    assert (tmp_path / "two" / "model.gguf").read_bytes() == alone


def test_nothing_is_built_of_weights_that_are_not_finite(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "source", "mha")
    checkpoint = Checkpoint.open(folder)
    weights = {name: checkpoint.read(name).copy() for name in checkpoint.tensors}
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][200, 7] = np.inf
    write_safetensors(folder / "model.safetensors", weights, "bf16")
    with pytest.raises(
        CheckpointError, match=rf"{name}: non-finite weight .* in row 200, column 7"
    ):
        write_artifact(make_recipe("q4_k_m"), Checkpoint.open(folder), tmp_path)


@pytest.mark.parametrize(
    ("changes", "precision", "message"),
    [
        ({"hidden_size": 240, "num_attention_heads": 3}, "q4_0", "q4_0 .* rows of 240"),
        ({"intermediate_size": 500}, "q6_k", "q8_0 .*down_proj.weight has rows of 500"),
        ({"hidden_size": 192, "num_attention_heads": 3}, "q4_0+q4_k", "q4_k .*embed.* of 192"),
        ({"tie_word_embeddings": True}, "q4_0+q8_0", "set quantization.head alone"),
        ({"head_dim": 32}, "f16", "4 x 32 and 256"),
    ],
)
def test_shapes_that_gguf_cannot_hold_are_refused(
    changes: dict[str, Any], precision: str, message: str, tmp_path: Path
) -> None:
    folder = write_random_checkpoint(tmp_path, "mha")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"num_key_value_heads": changes.get("num_attention_heads", 4)} | changes
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    decoder = read_decoder(Checkpoint.open(folder).config)
    with pytest.raises(PlanError, match=message):
        gguf.check_shape(make_recipe(precision), decoder)


def test_unusual_rows_are_allowed_unquantized_and_noted_in_the_plan(
    cases: Artifacts,
) -> None:
    decoder = read_decoder(cases.checkpoint("narrow").config)
    gguf.check_shape(make_recipe("q4_k_m"), decoder)
    notes = gguf.needs(make_recipe("q4_k_m"), decoder, 256).notes
    assert any("no multiple of 256 are Q5_0, Q8_0" in note for note in notes)
    assert not gguf.needs(make_recipe("q8_0"), decoder, 256).notes


@pytest.mark.parametrize(
    ("case", "context", "factors", "said"),
    [
        # llama.cpp allocates multiples of 256.
        ("long_context", 257, "short", "got 257; rope_factors: short holds up to 256 tokens"),
        ("long_context", 256, "long", "got 256 with rope_factors: long; allowed 257 or more"),
        ("mha", 256, "long", "with rope_factors: long; allowed a model with LongRoPE"),
    ],
)
def test_no_context_crosses_to_the_long_factors_unasked(
    case: str, context: int, factors: str, said: str, cases: Artifacts
) -> None:
    decoder = read_decoder(cases.checkpoint(case).config)
    recipe = make_recipe("q4_0", is_long=factors == "long")
    with pytest.raises(PlanError, match=said):
        gguf.needs(recipe, decoder, context)


def test_each_profile_says_for_which_lengths_it_is(cases: Artifacts) -> None:
    decoder = read_decoder(cases.checkpoint("long_context").config)
    short, long = (make_recipe("q4_0", is_long=is_long) for is_long in (False, True))
    assert gguf.needs(short, decoder, 256).valid_context == (1, 256)
    assert gguf.needs(long, decoder, 512).valid_context == (257, 512)
