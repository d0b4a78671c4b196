"""Checkpoints that are quantized already: 8-bit floats are read, other schemes named."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.checkpoints import random_weights
from tests.split_checkpoints import split_config, split_weights, write_parts
from toolkit.checkpoint import Checkpoint, fp8
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.families import read_decoder

CODES = np.dtype(ml_dtypes.float8_e4m3fn)
BLOCK = (128, 96)  # no divisor of 256 columns: the last blocks are smaller
LAST = 448.0  # the largest value of E4M3
DTYPES = {np.dtype(np.float32): "F32", np.dtype(np.uint16): "BF16", CODES: "F8_E4M3"}


def write_tensors(path: Path, tensors: dict[str, NDArray[Any]]) -> None:
    """A safetensors file of arrays of several types."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": tensor.shape,
                        "data_offsets": offsets}  # fmt: skip
        end = offsets[1]
    text = json.dumps(header).encode()
    content = b"".join(tensor.tobytes() for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def scale_up(weight: NDArray[np.float32], kind: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Codes of a matrix, and its scales as a scheme has them."""
    rows, columns = weight.shape
    if kind == "tensor":
        scales = np.array(np.abs(weight).max() / LAST, np.float32)
        return (weight / scales).astype(CODES), scales
    if kind == "channel":
        scales = (np.abs(weight).max(axis=1, keepdims=True) / LAST).astype(np.float32)
        return (weight / scales).astype(CODES), scales
    counts = [-(-size // step) for size, step in zip(weight.shape, BLOCK, strict=True)]
    padded = np.zeros([count * step for count, step in zip(counts, BLOCK, strict=True)], np.float32)
    padded[:rows, :columns] = weight
    blocks = np.abs(padded.reshape(counts[0], BLOCK[0], counts[1], BLOCK[1]))
    scales = (blocks.max(axis=(1, 3)) / LAST).astype(np.float32)
    whole = np.repeat(np.repeat(scales, BLOCK[0], axis=0), BLOCK[1], axis=1)[:rows, :columns]
    return (weight / whole).astype(CODES), scales


SCHEMES: dict[str, dict[str, Any]] = {
    "tensor": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "channel": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
    },
    "block": {"quant_method": "fp8", "weight_block_size": [*BLOCK]},
}


def write_fp8(folder: Path, kind: str) -> dict[str, NDArray[np.float32]]:
    """A split checkpoint with layers of 8-bit floats; returns what its weights stand for."""
    config = {**split_config("llama"), "quantization_config": SCHEMES[kind]}
    weights = split_weights(random_weights(config), config)
    tensors: dict[str, NDArray[Any]] = {}
    expected = dict(weights)
    end = "weight_scale_inv" if kind == "block" else "weight_scale"
    for name, weight in weights.items():
        tensors[name] = weight
        if "proj" not in name:
            continue
        codes, scales = scale_up(weight, kind)
        root = name.removesuffix("weight")
        tensors |= {name: codes, f"{root}{end}": scales}
        tensors[f"{root}input_scale"] = np.ones(1, np.float32)
        whole = np.broadcast_to(scales, (1, 1)) if not scales.shape else scales
        if kind == "block":
            whole = np.repeat(np.repeat(scales, BLOCK[0], axis=0), BLOCK[1], axis=1)
            whole = whole[: weight.shape[0], : weight.shape[1]]
        expected[name] = codes.astype(np.float32) * whole
    write_parts(folder, config, {})
    write_tensors(folder / "model.safetensors", tensors)
    return expected


def test_every_code_is_what_the_format_says() -> None:
    expected = np.arange(256, dtype=np.uint8).view(CODES).astype(np.float32)
    assert np.array_equal(fp8.list_values(), expected, equal_nan=True)


@pytest.mark.parametrize("kind", SCHEMES)
def test_8_bit_floats_are_read_with_their_scales(kind: str, tmp_path: Path) -> None:
    expected = write_fp8(tmp_path, kind)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.check(read_decoder(checkpoint.config))
    for layer in range(2):
        root = f"model.layers.{layer}"
        fused = np.concatenate([expected[f"{root}.self_attn.{x}_proj.weight"] for x in "qkv"])
        name = f"{root}.self_attn.qkv_proj.weight"
        assert np.array_equal(checkpoint.read(name), fused)
        rows = [raw.copy() for _, raw in checkpoint.reopen().read_rows(name, 100, 300, 7 * 256)]
        assert np.array_equal(np.concatenate(rows), fused[100:400])
        down = f"{root}.mlp.down_proj.weight"
        assert np.array_equal(checkpoint.read(down), expected[down])


def test_8_bit_floats_without_scales_are_refused(tmp_path: Path) -> None:
    write_fp8(tmp_path, "block")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["quantization_config"]["weight_block_size"] = [64, 64]
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"weight_scale_inv: found \[2, 3\] for \[256, 256\]"):
        Checkpoint.open(tmp_path)
    write_tensors(tmp_path / "model.safetensors", {"x.weight": np.zeros((2, 2), CODES)})
    with pytest.raises(CheckpointError, match=r"x\.weight: F8_E4M3 \[2, 2\] without its scales"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("fields", "says", "advice"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "with GPTQ to 4 bits",
         "16-bit checkpoint that it was made of"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "with AWQ to 4 bits",
         "16-bit checkpoint that it was made of"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
         "with bitsandbytes to 4 bits", "dequantize().save_pretrained(OUT)"),
        ({"quantization_config": {"load_in_8bit": True}}, "with bitsandbytes to 8 bits", "-bnb-4"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {
            "group_0": {"weights": {"num_bits": 4, "type": "int"}}}}},
         "with compressed-tensors to 4 bits", "run_compressed=False"),
        ({"quantization_config": {"quant_method": "newest"}}, "with newest;", "16-bit"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "with MLX to 4 bits", "16-bit"),
    ],
)  # fmt: skip
def test_another_scheme_is_named(
    fields: dict[str, Any], says: str, advice: str, tmp_path: Path
) -> None:
    write_parts(tmp_path, {**split_config("llama"), **fields}, {})
    with pytest.raises(UnsupportedError) as caught:
        Checkpoint.open(tmp_path)
    assert says in str(caught.value)
    assert advice in str(caught.value.advice)
