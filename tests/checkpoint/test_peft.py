"""Adapters of every kind that PEFT writes: the logits are those that PEFT computes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.adapters import write_adapter
from tests.checkpoints import copy_tokenizer, random_weights
from tests.formats.writing import write_artifact
from tests.golden.cases import LORA_GOLDEN, LORA_LENGTH, PEFT_GOLDEN, case_ids, peft_ids, select
from tests.peft_adapters import (
    CASES,
    EMBEDDING,
    HEAD,
    SEED,
    base_weights,
    make_arrays,
    write_base,
    write_case,
)
from tests.quality.artifacts import make_recipe
from tests.split_checkpoints import write_parts
from toolkit import fileio
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.merged import MergedCheckpoint, merge
from toolkit.errors import CheckpointError, PhishipError, UnsupportedError
from toolkit.families import read_decoder
from toolkit.quality import reference

# Two float32 forward passes that add in other orders (tests/quality/test_reference.py).
TOLERANCE = 1e-4
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def open_case(folder: Path, case: str, **changes: Any) -> MergedCheckpoint:
    """A case's checkpoint with its adapter, and the tokenizer that more tokens need."""
    adapter = write_case(folder / "adapter", case, **changes)
    if CASES[case].is_resized:
        copy_tokenizer(adapter)
    return merge(Checkpoint.open(write_base(folder / "base", case)), adapter)


def compute(checkpoint: Checkpoint, ids: list[int]) -> Any:
    """The kept part of the logits."""
    decoder = read_decoder(checkpoint.config)
    checkpoint.check(decoder)
    return select(reference.forward(checkpoint, decoder, ids))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str, tmp_path: Path) -> None:
    merged, expected = open_case(tmp_path, case), np.load(PEFT_GOLDEN)[case]
    assert np.abs(compute(merged, peft_ids(case)) - expected).max() < TOLERANCE
    if not CASES[case].is_resized:
        assert np.abs(compute(merged.base, peft_ids(case)) - expected).max() > 0.1


@pytest.mark.parametrize("case", ["embedding", "dora_embedding"])
def test_files_that_cannot_be_mapped_give_the_same(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of one file are then read into one buffer, in turn."""
    mapped = open_case(tmp_path, case)
    expected = {name: mapped.read(name) for name in mapped.adapter.changes}
    monkeypatch.setattr(fileio, "map_file", lambda _: None)
    merged = mapped.reopen()
    merged.lengths.clear()
    for name in reversed(expected):
        assert np.array_equal(merged.read(name), expected[name]), name


@pytest.mark.parametrize("case", ["split", "dora"])
def test_split_modules_are_rows_of_a_fused_checkpoint(case: str, tmp_path: Path) -> None:
    config, _ = base_weights(case)
    config |= {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}
    fused = write_parts(tmp_path / "fused", config, random_weights(config, SEED), "f32")
    merged = merge(Checkpoint.open(fused), write_case(tmp_path / "adapter", case))
    expected = np.load(PEFT_GOLDEN)[case]
    assert np.abs(compute(merged, peft_ids(case)) - expected).max() < TOLERANCE


def test_fused_modules_go_with_a_split_checkpoint(tmp_path: Path) -> None:
    from tests import adapters

    config, weights = base_weights("split")
    shapes = {name: weight.shape for name, weight in random_weights(config, SEED).items()}
    base = Checkpoint.open(write_parts(tmp_path / "base", config, weights, "bf16"))
    merged = merge(base, adapters.write_case(tmp_path / "adapter", "patterns", shapes))
    found = compute(merged, case_ids(base.folder, LORA_LENGTH))
    assert np.abs(found - np.load(LORA_GOLDEN)["patterns"]).max() < TOLERANCE


@pytest.mark.parametrize("case", ["split", "dora", "saved", "dora_embedding", "tokens"])
def test_rows_are_the_same_in_any_pieces(case: str, tmp_path: Path) -> None:
    merged = open_case(tmp_path, case)
    for name in merged.adapter.changes:
        whole = merged.read(name)
        again = merged.reopen()
        rows = [raw.copy() for _, raw in again.read_rows(name, piece=7 * whole.shape[-1])]
        # Products of other sizes add in other orders.
        np.testing.assert_allclose(np.concatenate(rows).reshape(whole.shape), whole, atol=1e-5)
        if whole.ndim == 2:
            for row, raw in again.read_rows(name, 50, 100, piece=11 * whole.shape[1]):
                assert 50 <= row < 150
                np.testing.assert_allclose(raw, whole[row : row + len(raw)], atol=1e-5)


def test_rows_of_an_embedding_are_rounded_to_the_checkpoints_type(tmp_path: Path) -> None:
    config, weights = base_weights("embedding")
    base = Checkpoint.open(write_parts(tmp_path / "base", config, weights, "bf16"))
    merged = merge(base, write_case(tmp_path / "adapter", "embedding"))
    name = f"{EMBEDDING}.weight"
    assert next(merged.read_rows(name))[1].dtype == np.uint16
    arrays = make_arrays("embedding")
    a, b = (arrays[f"base_model.model.{EMBEDDING}.lora_embedding_{part}"] for part in "AB")
    exact = weights[name] + 2 * (b @ a).T
    # Half a unit of bf16's last place.
    np.testing.assert_allclose(merged.read(name), exact, rtol=2**-8, atol=1e-6)


def test_a_larger_vocabulary_comes_with_its_tokenizer(tmp_path: Path) -> None:
    merged = open_case(tmp_path, "resized")
    assert merged.config.integer("vocab_size") == 2056
    assert merged.tensors[f"{HEAD}.weight"].shape == (2056, 256)
    assert merged.tokenizer_folder == merged.adapter.folder
    assert b'"vocab_size": 2056' in merged.config_bytes()
    tokenizer = merged.adapter.folder / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text("utf-8") + "\n", encoding="utf-8")
    assert merge(merged.base, merged.adapter.folder).adapter_digest != merged.adapter_digest
    tokenizer.unlink()
    with pytest.raises(CheckpointError, match=r"has 2056 tokens, .* 2048, and no tokenizer.json"):
        merge(merged.base, merged.adapter.folder)


def test_an_artifact_has_the_adapters_tokenizer(tmp_path: Path) -> None:
    merged = open_case(tmp_path, "resized")
    path = merged.adapter.folder / "tokenizer_config.json"
    path.write_text(path.read_text("utf-8").replace("{", '{"mine": 1,', 1), encoding="utf-8")
    merged = merge(merged.base, merged.adapter.folder)
    (tmp_path / "mlx").mkdir()
    write_artifact(make_recipe("mlx", group_size=64), merged, tmp_path / "mlx")
    assert (tmp_path / "mlx" / path.name).read_bytes() == path.read_bytes()
    config = json.loads((tmp_path / "mlx" / "config.json").read_text("utf-8"))
    assert (config["vocab_size"], config["model_type"]) == (2056, "phi3")


def test_a_tied_model_stays_tied_where_its_tensors_stay_the_same(tmp_path: Path) -> None:
    """As PEFT saves a tied model whose vocabulary was resized: both names, the same rows."""
    folder = write_base(tmp_path / "base", "tied_saved")
    arrays = make_arrays("tied_saved")
    same = {f"base_model.model.{HEAD}.weight": arrays[f"base_model.model.{EMBEDDING}.weight"]}
    adapter = write_adapter(tmp_path / "adapter", {**arrays, **same})
    merged = merge(Checkpoint.open(folder), adapter)
    assert not merged.adapter.is_untied
    assert read_decoder(merged.config).is_tied
    larger = {name: np.concatenate([array, array[:8]]) for name, array in arrays.items()
              if EMBEDDING in name}  # fmt: skip
    resized = write_adapter(tmp_path / "resized", {**arrays, **larger})
    copy_tokenizer(resized)
    merged = merge(merged.base, resized)
    assert not merged.adapter.is_untied
    merged.check(read_decoder(merged.config))
    other = {name: array + 1 for name, array in same.items()}
    apart = merge(merged.base, write_adapter(tmp_path / "apart", {**arrays, **other}))
    assert apart.adapter.is_untied
    apart.check(read_decoder(apart.config))


# Refusals


def refuse(folder: Path, case: str, arrays: Any, **settings: Any) -> PhishipError:
    """What is said of an adapter on a case's checkpoint."""
    base = Checkpoint.open(write_base(folder / "base", case))
    adapter = write_adapter(folder / "adapter", arrays, **{**CASES[case].settings, **settings})
    with pytest.raises(PhishipError) as caught:
        merge(base, adapter)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({f"{Q_PROJ}.bias": (256,)}, r"q_proj.bias: a bias, of which .* has none"),
        ({f"{Q_PROJ}.lora_B.bias": (256,)}, r"lora_B.bias: a bias, of which .* has none"),
        ({f"{Q_PROJ}.lora_magnitude_vector": (255,)}, r"found \[255\]; expected \[256\]"),
        ({f"{Q_PROJ}.weight": (128, 256)}, r"found \[128, 256\]; expected \[256, 256\]"),
        ({f"{Q_PROJ.replace('q_proj', 'qkv_proj')}.weight": (512, 256)}, "two modules"),
        ({f"{Q_PROJ.replace('.0.', '.7.')}.weight": (256, 256)}, "has no such matrix"),
        ({f"{Q_PROJ}.lora_C.weight.more": (1,)}, "not known from PEFT's LoRA"),
        ({f"base_model.model.{EMBEDDING}.weight": (2050, 256)}, "vocabularies of two sizes"),
        ({f"{Q_PROJ}.token_adapter.trainable_tokens_delta": (1, 256)}, "an update and trained"),
        ({f"base_model.model.{EMBEDDING}.token_adapter.trainable_tokens_delta": (1, 256)},
         "trainable_token_indices: got None"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    changes: dict[str, tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    more = {name: np.ones(shape, np.float32) for name, shape in changes.items()}
    error = refuse(tmp_path, "split", {**make_arrays("split"), **more})
    assert re.search(says, str(error)), str(error)


def test_zero_biases_are_no_biases(tmp_path: Path) -> None:
    arrays = {**make_arrays("split"), f"{Q_PROJ}.bias": np.zeros(256, np.float32)}
    base = Checkpoint.open(write_base(tmp_path / "base", "split"))
    merged = merge(base, write_adapter(tmp_path / "adapter", arrays, bias="all"))
    assert set(merged.adapter.changes) <= set(base.tensors)


def test_a_folder_of_several_adapters_names_them(tmp_path: Path) -> None:
    write_case(tmp_path / "several" / "mine", "split")
    base = Checkpoint.open(write_base(tmp_path / "base", "split"))
    with pytest.raises(CheckpointError) as caught:
        merge(base, tmp_path / "several")
    assert caught.value.advice == "give one of the adapters in it: mine"


def test_what_cannot_be_merged_says_how_peft_does(tmp_path: Path) -> None:
    error = refuse(tmp_path, "split", make_arrays("split"), init_lora_weights="pissa")
    assert isinstance(error, UnsupportedError)
    assert "merge_and_unload().save_pretrained(MERGED)" in str(error.advice)
