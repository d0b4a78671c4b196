"""LoRA adapters merged into a checkpoint's rows: as PEFT merges them, and nothing dropped."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from numpy.typing import NDArray

from tests.adapters import CASES, make_adapter, write_adapter, write_case
from tests.checkpoint.hub_cases import COMMIT, ID
from tests.checkpoint.hub_server import Hub
from tests.checkpoints import (
    variant_config,
    weight_shapes,
    write_random_checkpoint,
    write_safetensors,
)
from tests.formats.writing import write_artifact
from tests.golden.cases import LORA_GOLDEN as GOLDEN
from tests.golden.cases import LORA_LENGTH as LENGTH
from tests.golden.cases import LORA_VARIANT as VARIANT
from tests.golden.cases import SEED, case_ids, select
from tests.moe_checkpoints import write_moe_checkpoint
from tests.quality.artifacts import FORMATS, make_recipe
from tests.small_checkpoints import write_small_checkpoint
from toolkit import formats
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint import merged as merging
from toolkit.console import Console
from toolkit.errors import CheckpointError, PhishipError, UnsupportedError
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.quality import reference
from toolkit.source import open_source
from toolkit.stream import read_piece

# Two float32 forward passes that add in other orders (tests/quality/test_reference.py).
TOLERANCE = 1e-4
SHAPES = weight_shapes(variant_config(VARIANT))
QKV = "model.layers.0.self_attn.qkv_proj.weight"
FIRST = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    """A bf16 checkpoint."""
    return Checkpoint.open(write_random_checkpoint(tmp_path / "base", VARIANT, seed=SEED))


def changed(name: str, array: NDArray[np.float32] | None) -> dict[str, NDArray[np.float32]]:
    """The adapter's tensors with one replaced, added, or (None) left out."""
    arrays = make_adapter(SHAPES)
    if array is None:
        del arrays[name]
        return arrays
    return {**arrays, name: array}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_pefts_merged_model(
    case: str, base: Checkpoint, tmp_path: Path
) -> None:
    merged = merging.merge(base, write_case(tmp_path / "adapter", case, SHAPES))
    decoder = read_decoder(merged.config)
    merged.check(decoder)
    ids = case_ids(base.folder, LENGTH)
    expected = np.load(GOLDEN)[case]
    assert np.abs(select(reference.forward(merged, decoder, ids)) - expected).max() < TOLERANCE
    assert np.abs(select(reference.forward(base, decoder, ids)) - expected).max() > 0.1


def test_rows_are_merged_in_float32_and_not_rounded_back(base: Checkpoint, tmp_path: Path) -> None:
    merged = merging.merge(base, write_case(tmp_path / "adapter", "plain", SHAPES))
    arrays = make_adapter(SHAPES)
    a, b = arrays[FIRST], arrays[FIRST.replace("_A.", "_B.")]
    exact = base.read(QKV).astype(np.float64) + 2.0 * b.astype(np.float64) @ a.astype(np.float64)
    # A sum of five float32 products: a few units of the last place.
    np.testing.assert_allclose(merged.read(QKV), exact, atol=1e-6, rtol=0)
    for row, raw in merged.read_rows(QKV, 5, 40, piece=10 * 256):
        assert raw.dtype == np.float32
        assert len(raw) <= 10
        np.testing.assert_allclose(raw, exact[row : row + len(raw)], atol=1e-6, rtol=0)
    norm = "model.norm.weight"
    assert np.array_equal(merged.read(norm), base.read(norm))
    assert next(merged.read_rows(norm))[1].dtype == np.uint16


@pytest.mark.parametrize("kind", FORMATS)
def test_the_artifact_is_that_of_the_checkpoint_merged_beforehand(
    kind: str, base: Checkpoint, tmp_path: Path
) -> None:
    merged = merging.merge(base, write_case(tmp_path / "adapter", "patterns", SHAPES))
    beforehand = Path(shutil.copytree(base.folder, tmp_path / "beforehand"))
    tensors = {name: merged.read(name) for name in SHAPES}
    write_safetensors(beforehand / "model.safetensors", tensors, "f32")
    data = []
    for source, workers in ((merged, 2), (Checkpoint.open(beforehand), 1), (base, 1)):
        folder = tmp_path / f"{kind}-{len(data)}"
        folder.mkdir()
        # The rows of a float32 checkpoint's embedding are not bf16.
        changes = {"embedding": "fp32"} if kind == "onnx" else {}
        write_artifact(make_recipe(kind, **changes), source, folder, workers)
        module, decoder = formats.get(kind), read_decoder(base.config)
        data.append(dict(module.dequantize(folder, decoder)))
    ours, theirs, without = data
    for name in SHAPES:
        assert np.array_equal(ours[name], theirs[name]), name
    assert not np.array_equal(ours[QKV], without[QKV])


def test_the_digest_covers_weights_and_scales(base: Checkpoint, tmp_path: Path) -> None:
    arrays = make_adapter(SHAPES)
    folders = [
        write_adapter(tmp_path / "a", arrays),
        write_adapter(tmp_path / "b", arrays, lora_alpha=9),
        write_adapter(tmp_path / "c", make_adapter(SHAPES, seed=2)),
    ]
    opened = [merging.merge(base, folder) for folder in folders]
    assert len({one.fingerprint() for one in [base, *opened]}) == 4
    assert len({one.adapter_digest for one in [base, *opened]}) == 4
    again = merging.merge(base, write_adapter(tmp_path / "again", arrays, lora_dropout=0.3))
    assert again.adapter_digest == opened[0].adapter_digest


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_adapters_in_other_types_are_read(dtype: Any, base: Checkpoint, tmp_path: Path) -> None:
    arrays = make_adapter(SHAPES)
    exact = merging.merge(base, write_adapter(tmp_path / "exact", arrays)).read(QKV)
    rounded = merging.merge(base, write_adapter(tmp_path / dtype, arrays, dtype)).read(QKV)
    assert 0 < np.abs(exact - rounded).max() < 0.01


# Refusals


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"use_qalora": True}, "use_qalora: got True; supported: false or nothing"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication: got \[\[0, 2\]\]"),
        ({"peft_type": "IA3"}, "peft_type: got 'IA3'; supported: 'LORA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: got 'pissa'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: got True"),
        ({"r": 0}, "r: got 0; allowed a whole number above 0"),
        ({"lora_alpha": "8"}, "lora_alpha: got '8'"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: got '\\('; allowed regular expressions"),
        ({"rank_pattern": {"qkv_proj": 8}}, r"found \[4, 256\]; expected \[8, 256\]"),
    ],
)
def test_settings_beyond_lora_are_refused(
    changes: dict[str, Any], text: str, base: Checkpoint, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", make_adapter(SHAPES), **changes)
    with pytest.raises(PhishipError, match=text):
        merging.merge(base, folder)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "text"),
    [
        (FIRST, (4, 128), CheckpointError, r"found \[4, 128\]; expected \[4, 256\]"),
        (FIRST, None, CheckpointError, "no lora_A for it"),
        (FIRST.replace("layers.0", "layers.9"), (4, 256), CheckpointError, "no lora_B for it"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 9), CheckpointError,
         "no lora_embedding_B for it"),
        ("transformer.h.0.lora_A.weight", (4, 256), UnsupportedError, "not known from PEFT's LoRA"),
    ],
)  # fmt: skip
def test_tensors_that_would_be_dropped_are_refused(
    name: str, shape: tuple[int, ...] | None, kind: type[PhishipError], text: str,
    base: Checkpoint, tmp_path: Path,
) -> None:  # fmt: skip
    arrays = changed(name, None if shape is None else np.zeros(shape, np.float32))
    with pytest.raises(kind, match=text):
        merging.merge(base, write_adapter(tmp_path / "adapter", arrays))


def test_modules_that_the_checkpoint_lacks_are_refused(base: Checkpoint, tmp_path: Path) -> None:
    arrays = make_adapter({"model.layers.0.self_attn.q_proj.qkv_proj.weight": (256, 256)})
    with pytest.raises(CheckpointError, match="has no such matrix"):
        merging.merge(base, write_adapter(tmp_path / "adapter", arrays))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("adapter_config.json", "no adapter_config.json"),
        ("adapter_model.safetensors", "no adapter_model.safetensors"),
    ],
)
def test_a_missing_file_is_named(file: str, text: str, base: Checkpoint, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", make_adapter(SHAPES))
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=text):
        merging.merge(base, folder)


def test_the_id_of_another_base_is_refused(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    console, reference = Console(as_json=True), f"{ID}@{COMMIT}"
    other = write_adapter(tmp_path / "other", make_adapter(SHAPES))
    with pytest.raises(CheckpointError, match=r"base_model_name_or_path: got 'somewhere/else'"):
        open_source(reference, console, other)
    # Its own name, and that of a copy in 4 bits, as unsloth publishes them.
    for base in (ID, f"unsloth/{ID.rpartition('/')[2]}-unsloth-bnb-4bit"):
        arrays = make_adapter(SHAPES)
        own = write_adapter(tmp_path / base, arrays, base_model_name_or_path=base)
        assert open_source(reference, console, own).adapter_digest


def test_a_folder_is_taken_whatever_the_adapter_calls_its_base(
    base: Checkpoint, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "adapter", make_adapter(SHAPES))
    assert open_source(str(base.folder), Console(as_json=True), folder).adapter_digest


@pytest.mark.parametrize(
    ("write", "kind", "matrices"),
    [
        # Rows of two matrices in turn, and every second row: both in several pieces.
        (write_moe_checkpoint, "onnx", ("experts.3.w1", "experts.3.w3", "self_attn.k_proj")),
        (write_small_checkpoint, "onnx", ("mlp.up_proj", "self_attn.query_key_value")),
        (write_small_checkpoint, "openvino", ("mlp.up_proj",)),
    ],
)
def test_rows_in_other_orders_are_merged_too(
    write: Any, kind: str, matrices: tuple[str, ...], tmp_path: Path
) -> None:
    base = Checkpoint.open(write(tmp_path / "source"))
    names = [n for n in base.tensors if n.removesuffix(".weight").endswith(matrices)]
    shapes = {name: base.tensors[name].shape for name in names}
    merged = merging.merge(base, write_adapter(tmp_path / "adapter", make_adapter(shapes)))
    decoder = read_decoder(base.config)
    plan = make_plan(make_recipe(kind), decoder)
    seen = set()
    for piece in plan.data.pieces:
        if not set(piece.sources) & set(names):
            continue
        seen |= set(piece.sources)
        span = slice(piece.start, piece.start + piece.rows * piece.step, piece.step)
        whole = [merged.read(name)[span] for name in piece.sources]
        expected = np.stack(whole, axis=1).reshape(-1, piece.columns)
        found = [raw.copy() for _, raw in read_piece(merged, piece, 40 * piece.columns)]
        # Summed in products of other sizes.
        np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6, rtol=0)
    assert seen >= set(names)
