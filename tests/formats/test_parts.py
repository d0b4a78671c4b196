"""Projections put together of rows that lie elsewhere, and biases, in the formats that hold them.

Rows grouped by key head, gate and up in turn, as Phi-3-small stores them; with layer norms.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import HEAD_DIM, random_weights, write_random_checkpoint, write_safetensors
from tests.formats.test_moe import onnx_recipe, openvino_recipe
from tests.formats.writing import write_artifact
from tests.golden.cases import case_ids
from toolkit import formats
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder, Parts, Rows, cut
from toolkit.families import read_decoder
from toolkit.quality import reference
from toolkit.quality.weightonly import ArtifactWeights
from toolkit.recipe import Recipe

TOLERANCE = 2e-4  # as in test_moe.py
RECIPES: dict[str, Recipe] = {
    "onnx": onnx_recipe(),
    "onnx-fp32": onnx_recipe(precision="fp32", embedding="fp32", head="fp32"),
    "openvino": openvino_recipe(),
}


def regroup(decoder: Decoder) -> Decoder:
    """The same sizes: queries, key and value of each key head together; gate and up in turn."""
    shared = decoder.heads // decoder.kv_heads
    block = (shared + 2) * HEAD_DIM

    def every(first: int, heads: int) -> Parts:
        return tuple(
            Rows(decoder.names.qkv, group * block + first * HEAD_DIM, heads * HEAD_DIM)
            for group in range(decoder.kv_heads)
        )

    return replace(
        decoder,
        qkv_parts=(*every(0, shared), *every(shared, 1), *every(shared + 1, 1)),
        gate_parts=(Rows(decoder.names.gate_up, 0, decoder.intermediate, 2),),
        up_parts=(Rows(decoder.names.gate_up, 1, decoder.intermediate, 2),),
        biased=("qkv", "attention_out", "gate_up", "down", "head"),
        norm="layer",
    )


def add_biases(folder: Path, decoder: Decoder) -> Checkpoint:
    """The random checkpoint with a random bias wherever the decoder has one."""
    weights = random_weights(json.loads((folder / "config.json").read_text("utf-8")))
    rng = np.random.default_rng(1)
    for name, shape in decoder.shapes().items():
        if name not in weights:
            weights[name] = 0.2 * rng.standard_normal(shape, np.float32)
    write_safetensors(folder / "model.safetensors", weights, "bf16")
    return Checkpoint.open(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_its_runtime_does_what_the_reference_does(tmp_path: Path, name: str) -> None:
    folder = write_random_checkpoint(tmp_path / "gqa", "gqa")
    decoder = regroup(read_decoder(Checkpoint.open(folder).config))
    checkpoint, recipe = add_biases(folder, decoder), RECIPES[name]
    checkpoint.check(decoder)
    write_artifact(recipe, checkpoint, tmp_path, decoder=decoder)
    module, ids = formats.get(recipe.format), case_ids(folder, 40)
    weights = ArtifactWeights(partial(module.dequantize, tmp_path, decoder), decoder)
    states = reference.final_states(weights, decoder, ids)
    expected = reference.project(weights, decoder, decoder.head_name, states)
    assert np.abs(module.open_session(tmp_path).logits(ids) - expected).max() < TOLERANCE
    found = dict(module.dequantize(tmp_path, decoder))
    assert found.keys() == decoder.shapes().keys()
    for tensor, values in found.items():
        own = checkpoint.read(tensor)
        assert np.linalg.norm(values - own) < 0.12 * np.linalg.norm(own), tensor


def test_parts_are_cut() -> None:
    parts = (Rows("a", 5, 10), Rows("b", 1, 4, 2))
    assert cut(parts, 0, 14) == parts
    assert cut(parts, 3, 10) == (Rows("a", 8, 7),)
    assert cut(parts, 8, 12) == (Rows("a", 13, 2), Rows("b", 1, 2, 2))
    assert cut(parts, 12, 14) == (Rows("b", 5, 2, 2),)
