"""Damaged or contradictory checkpoints: a sentence that names file and reason, no traceback."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import write_random_checkpoint, write_safetensors
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.families import read_decoder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good checkpoint in two shards, to be damaged."""
    return write_random_checkpoint(tmp_path / "sharded", "mha", shards=2)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    return f"{caught.value} | {caught.value.advice}"


def write_file(folder: Path, content: bytes) -> Path:
    (folder / "config.json").write_text("{}")
    (folder / SINGLE).write_bytes(content)
    return folder


def header(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DEEP = b"[" * 100_000
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "shorter than its length field": (b"\x01\x02", "2 bytes"),
    "header longer than the file": (header(b"{}")[:8] + b"{", "truncated"),
    "header of 2^63 bytes": (b"\xff" * 8 + b"{}", "18446744073709551615"),
    "header of no bytes": (b"\0" * 8, "header of 0"),
    "not JSON": (header(b"{'a': 1}"), "not JSON"),
    "not UTF-8": (header(b'{"\xff": 1}'), "not JSON"),
    "nested without end": (header(DEEP), "not JSON"),
    "a JSON list": (header([1]), "not a JSON object"),
    "a pickle": (b"\x80\x02}q\x00." * 20, "truncated or damaged"),
    "an entry that is a number": (header({"w": 3}), "entry of w is incomplete"),
    "no offsets": (header({"w": {"dtype": "F32", "shape": [1]}}), "entry of w is incomplete"),
    "three offsets": (
        header({"w": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, b"1234"),
        "entry of w is incomplete",
    ),
    "negative offset": (header({"w": entry(-4, 4)}, b"1234"), "do not agree"),
    "offsets of text": (
        header({"w": {**entry(0, 4), "data_offsets": ["0", "4"]}}, b"1234"),
        "do not agree",
    ),
    "fractions in the shape": (header({"w": entry(0, 4, [1.0])}, b"1234"), "do not agree"),
    "a negative shape": (header({"w": entry(0, 4, [-1, -1])}, b"1234"), "do not agree"),
    "shape larger than the data": (header({"w": entry(0, 4, [2])}, b"1234"), "do not agree"),
    "offsets outside the file": (header({"w": entry(0, 8)}, b"1234"), "the header says"),
    "data cut off": (header({"a": entry(0, 4), "b": entry(4, 12)}, b"12345678"), "header says"),
    "data too long": (header({"w": entry(0, 4)}, b"12345678"), "the header says"),
    "a gap at the start": (header({"w": entry(4, 8)}, b"12345678"), "begins at byte"),
    "a gap": (header({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12), "b begins at byte"),
    "an overlap": (header({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12), "b begins at byte"),
    "one tensor twice": (
        header(b'{"w": %s, "w": %s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"1234"),
        "w stands in it twice",
    ),
}


@pytest.mark.parametrize(("content", "says"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file(content: bytes, says: str, tmp_path: Path) -> None:
    message = refusal(write_file(tmp_path, content))
    assert message.startswith(f"{tmp_path / SINGLE}: truncated or damaged: ")
    assert says in message and "download this file again" in message


@pytest.mark.parametrize("dtype", ["I8", "F8_E5M2", "F64", "U8", ["F32"], None])
def test_wrong_dtype(dtype: object, tmp_path: Path) -> None:
    message = refusal(write_file(tmp_path, header({"w": entry(0, 4, [4], dtype)}, b"1234")))
    assert f"w: dtype: got {dtype!r}; allowed BF16, F16, F32" in message
    assert "not a quantized one" in message


@pytest.mark.parametrize("cut_bytes", [1, 1000, 1_000_000])
def test_truncated_download(cut_bytes: int, sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - cut_bytes)
    assert refusal(sharded).startswith(f"{shard}: truncated or damaged: found ")


def test_empty_tensors_and_metadata_are_fine(tmp_path: Path) -> None:
    entries = {"__metadata__": {"format": "pt"}, "none": entry(0, 0, [0, 4]), "w": entry(0, 4)}
    assert set(Checkpoint.open(write_file(tmp_path, header(entries, b"1234"))).tensors) == {
        "none",
        "w",
    }


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").unlink()
    message = refusal(sharded)
    assert "model-00001-of-00002.safetensors: this shard is missing" in message
    assert f"the first {EMBEDDING}" in message


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    edit(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def test_index_names_a_tensor_that_its_shard_lacks(sharded: Path) -> None:
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    edit_index(sharded, lambda weight_map: weight_map.update({"extra": second}))
    assert f"extra is not in {second}" in refusal(sharded)
    # In another shard than the index says: a mixed-up download, not to be read either.
    edit_index(sharded, lambda weight_map: weight_map.pop("extra"))
    edit_index(sharded, lambda weight_map: weight_map.update({"lm_head.weight": first}))
    assert f"lm_head.weight is not in {first}" in refusal(sharded)


def test_tensor_in_two_shards_is_read_where_the_index_says(sharded: Path) -> None:
    second = "model-00002-of-00002.safetensors"
    head = Checkpoint.open(sharded).read("lm_head.weight")
    write_safetensors(
        sharded / "a-first.safetensors", {"lm_head.weight": head * 0, "x": head}, "f32"
    )
    write_safetensors(
        sharded / "z-last.safetensors", {"lm_head.weight": head * 0, "y": head}, "f32"
    )
    names = {"x": "a-first.safetensors", "y": "z-last.safetensors"}
    edit_index(sharded, lambda weight_map: weight_map.update(names))
    checkpoint = Checkpoint.open(sharded)
    assert checkpoint.tensors["lm_head.weight"].file == second
    np.testing.assert_array_equal(checkpoint.read("lm_head.weight"), head)


@pytest.mark.parametrize(
    "file",
    [
        *("../other/model.safetensors", "/etc/model.safetensors", "sub/x.safetensors", "..", ""),
        *("a\\b.safetensors", "C:x.safetensors", "pytorch_model.bin", 3, None, ["x.safetensors"]),
    ],
)
def test_shards_outside_the_folder(file: object, sharded: Path) -> None:
    edit_index(sharded, lambda weight_map: weight_map.update({"w": file}))
    assert f"weight_map: w: got {file!r}; allowed the name of a .safetensors file" in refusal(
        sharded
    )


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{"])
def test_index_that_is_none(content: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(content)
    assert refusal(sharded).startswith(f"{sharded / INDEX}: ")


def test_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    message = refusal(tmp_path)
    assert "found neither model.safetensors nor model.safetensors.index.json" in message
    assert "safetensors only" in message


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "missing")
    (tmp_path / "file").touch()
    assert "is a file" in refusal(tmp_path / "file")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": 1,}', "\ufeff{}", "[" * 100_000])
def test_config_that_is_none(content: str, sharded: Path) -> None:
    (sharded / "config.json").write_text(content, encoding="utf-8")
    assert refusal(sharded).startswith(f"{sharded / 'config.json'}: ")


def test_config_that_cannot_be_read(sharded: Path) -> None:
    (sharded / "config.json").write_bytes(b'{"a": "\xff"}')
    assert "config.json: cannot be read" in refusal(sharded)
    (sharded / "config.json").unlink()
    assert "config.json: missing" in refusal(sharded)
    (sharded / "config.json").mkdir()
    assert "config.json: cannot be read" in refusal(sharded)


def check(folder: Path, **changes: Any) -> None:
    """Open, describe and compare, with fields of config.json changed; None removes one."""
    path = folder / "config.json"
    fields = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    checkpoint = Checkpoint.open(folder)
    decoder: Decoder = read_decoder(checkpoint.config)
    checkpoint.check(decoder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 2049}, rf"{EMBEDDING}: found \[\d+, 256\]; expected \[2049, 256\]"),
        ({"num_hidden_layers": 3}, r"model.layers.2.input_layernorm.weight \[256\] is missing"),
        ({"num_hidden_layers": 1}, r"model.layers.1\S+ is not part of .*6 unknown tensors"),
        ({"num_hidden_layers": 10**12}, r"config.json says 1000000000000 layers; found only 15"),
        ({"intermediate_size": 256}, r"gate_up_proj.weight: found \[1024, 256\]; expected \[512"),
        ({"num_key_value_heads": 2}, r"qkv_proj.weight: found \[768, 256\]; expected \[512, 256\]"),
        ({"hidden_size": 512}, r"found \[\d+, 256\]; expected \[\d+, 512\]"),
        ({"head_dim": 32}, r"qkv_proj.weight: found \[768, 256\]; expected \[384, 256\]"),
    ],
)
def test_config_contradicts_the_tensors(changes: dict[str, Any], says: str, sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        check(sharded, **changes)
    assert "config.json and the tensors contradict each other" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 0}, "hidden_size: got 0; allowed a whole number above 0"),
        ({"hidden_size": "256"}, "hidden_size: got '256'"),
        ({"hidden_size": True}, "hidden_size: got True"),
        ({"vocab_size": None}, "vocab_size: got None"),
        ({"vocab_size": 10**400}, "vocab_size: got 1000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3; allowed a divisor of 4"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: got -1; allowed a number above 0"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'; allowed 'silu'"),
    ],
)
def test_impossible_config(changes: dict[str, Any], says: str, sharded: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape(f"{sharded / 'config.json'}: {says}")):
        check(sharded, **changes)


def test_extra_tensors_are_refused_and_known_ones_ignored(tmp_path: Path) -> None:
    folder = write_random_checkpoint(tmp_path / "tied", "partial_rotary_tied")
    checkpoint = Checkpoint.open(folder)
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    known = {
        "lm_head.weight": weights[EMBEDDING],
        "model.layers.0.self_attn.rotary_emb.inv_freq": weights["model.norm.weight"],
    }
    write_safetensors(folder / SINGLE, {**weights, **known}, "bf16")
    check(folder)
    adapter = {"model.layers.0.self_attn.qkv_proj.lora_A.weight": weights["model.norm.weight"]}
    write_safetensors(folder / SINGLE, {**weights, **adapter}, "bf16")
    with pytest.raises(CheckpointError, match=r"lora_A\.weight is not part of Phi3ForCausalLM"):
        check(folder)


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("Phi4FlashForCausalLM", "phi4flash"),
        ("LlamaModel", "llama"),
        ("", "mamba"),
        ("Qwen3ForCausalLM", "qwen3"),
    ],
)
def test_unknown_architecture(architecture: str, model_type: str, sharded: Path) -> None:
    with pytest.raises(UnsupportedError) as caught:
        check(sharded, architectures=[architecture] if architecture else [], model_type=model_type)
    message = str(caught.value)
    assert (
        f"architectures: got {architecture or 'nothing'!r} (model_type {model_type!r})" in message
    )
    assert ("norms of queries and keys" in message) == (model_type == "qwen3")
    assert "supported: " in message and "Phi3ForCausalLM (Phi-3-mini, Phi-3-medium" in message


@pytest.mark.parametrize("found", ["Phi3ForCausalLM", {"a": 1}, 3])
def test_architectures_that_are_no_list(found: object, sharded: Path) -> None:
    with pytest.raises(UnsupportedError, match="architectures: got 'nothing'"):
        check(sharded, architectures=found)
