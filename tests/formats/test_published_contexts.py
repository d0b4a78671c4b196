"""The published contexts and windows in every runtime, against transformers' own logits.

Lengths on both sides of the window's edge (2,047) and of LongRoPE's switch (4,096); where a
runtime's plan says that it agrees it must, and where it says not it must not.
"""

from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from tests.formats.published import GOLDEN, LENGTHS, SHAPES, write_published
from tests.formats.writing import write_artifact
from tests.golden.cases import case_ids, select
from toolkit import formats
from toolkit.checkpoint import Checkpoint
from toolkit.errors import PlanError
from toolkit.families import read_decoder
from toolkit.plan import make_plan
from toolkit.quality import reference
from toolkit.recipe import Recipe

CASES = [(shape, length) for shape in SHAPES for length in LENGTHS[shape]]
# One key more than the window, in one position, is hardly seen; of the shapes with LongRoPE one is
# run on both sides of the switch.
ASKED = [case for case in CASES if case not in (("mini-4k", 2048), ("medium-128k", 4096))]
# mlx-lm's attention takes 10 to 20 s on a CPU at these lengths: one with LongRoPE is enough of it.
RUNS = [
    (kind, shape, length)
    for kind in ("onnx", "openvino", "gguf", "mlx")
    for shape, length in ASKED
    if kind != "mlx"
    or (shape, length) in (("mini-4k", 2047), ("mini-4k", 2300), ("phi-3.5-mini", 4097))
]
QUANTIZATION: dict[str, dict[str, Any]] = {
    "onnx": {"precision": "fp32"},
    "openvino": {"precision": "f16", "embedding": "f16", "head": "f16"},
    "gguf": {"precision": "f16"},
    "mlx": {"bits": 16, "dtype": "fp32"},
}
ROOM = 64
# Logits spread by 1.6. float32 sums in another order: measured at most 3.2e-5, in ONNX, whose
# tables of cos and sin are rounded to float32 once more.
EXACT = 1e-4
# llama.cpp's keys and values are float16 here: measured at most 0.0061.
HALF = 0.02
# What attention beyond the window makes at 2,300 tokens, in the worst of 8 positions: 0.14.
DIFFERENT = 0.05


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint of a shape."""
    made = tmp_path_factory.mktemp("published")
    return cache(lambda shape: write_published(made / shape, shape))


def distance(logits: NDArray[np.float32], shape: str) -> float:
    golden: NDArray[np.float32] = np.load(GOLDEN)[f"{shape}-{len(logits)}"]
    return float(np.abs(select(logits) - golden).max())


def make_recipe(kind: str, rope_factors: str | None, context: int) -> Recipe:
    fields = {"format": kind, "name": "x", "model": "tiny-phi3", "title": "x",
              "context_length": context, "quantization": QUANTIZATION[kind]}  # fmt: skip
    if rope_factors:
        fields["rope_factors"] = rope_factors
    recipe: Recipe = msgspec.convert(fields, formats.get(kind).RECIPE)
    return recipe


@pytest.mark.parametrize(("shape", "length"), CASES)
def test_the_reference_has_transformers_logits(shape: str, length: int, folders: Any) -> None:
    checkpoint = Checkpoint.open(folders(shape))
    decoder = read_decoder(checkpoint.config)
    logits = reference.forward(checkpoint, decoder, case_ids(folders(shape), length))
    assert distance(logits, shape) < EXACT


@pytest.mark.parametrize(("kind", "shape", "length"), RUNS)
def test_runtimes_agree_where_the_plan_says_so_and_only_there(
    kind: str, shape: str, length: int, folders: Any, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(folders(shape))
    decoder = read_decoder(checkpoint.config)
    # Where the context decides the factors it is the text's own; elsewhere there is room beyond.
    is_fixed = kind in ("gguf", "mlx")
    context = length if is_fixed else length + ROOM
    factors = None
    if decoder.rope.is_long and is_fixed:
        factors = "long" if length > decoder.rope.original_context else "short"
    recipe = make_recipe(kind, factors, context)
    plan = make_plan(recipe, decoder)
    write_artifact(recipe, checkpoint, tmp_path)
    session = formats.get(kind).open_session(tmp_path)
    found = distance(session.logits(case_ids(folders(shape), length)), shape)
    session.close()
    first, last = plan.needs.valid_context
    if first <= length <= last:
        assert found < (HALF if kind == "gguf" else EXACT)
    else:
        assert is_fixed
        assert found > DIFFERENT


@pytest.mark.parametrize("kind", ["gguf", "mlx"])
@pytest.mark.parametrize(("factors", "length"), [("short", 4097), ("long", 4096)])
def test_no_plan_crosses_the_switch_unasked(
    kind: str, factors: str, length: int, folders: Any
) -> None:
    decoder = read_decoder(Checkpoint.open(folders("phi-3.5-mini")).config)
    with pytest.raises(PlanError, match=rf"context_length: got {length}.*rope_factors: {factors}"):
        make_plan(make_recipe(kind, factors, length), decoder)
