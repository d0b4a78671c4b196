"""Split checkpoints: read as transformers reads them, written byte for byte as fused ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import random_weights
from tests.formats.writing import write_artifact
from tests.golden.cases import case_ids, select
from tests.golden.split_cases import CASES, GOLDEN, SEED
from tests.quality.artifacts import FORMATS, make_recipe
from tests.split_checkpoints import (
    VARIANTS,
    split_config,
    write_parts,
    write_split_checkpoint,
)
from toolkit.checkpoint import Checkpoint
from toolkit.families import read_decoder
from toolkit.quality import reference

# Two float32 forward passes that add in other orders (tests/quality/test_reference.py).
TOLERANCE = 1e-4
FUSED = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}


def write_both(folder: Path, variant: str) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint of a variant, split and fused."""
    split = write_split_checkpoint(folder / "split", variant)
    config = {**split_config(variant), **FUSED}
    fused = write_parts(folder / "fused", config, random_weights(config))
    return Checkpoint.open(split), Checkpoint.open(fused)


def write_files(kind: str, source: Checkpoint, folder: Path, **changes: Any) -> dict[str, bytes]:
    """Every file of an artifact."""
    folder.mkdir()
    write_artifact(make_recipe(kind, **changes), source, folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_variant_is_recorded() -> None:
    assert set(CASES) == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_split_checkpoint(tmp_path, variant, seed=SEED))
    decoder = read_decoder(checkpoint.config)
    checkpoint.check(decoder)
    for length in CASES[variant]:
        logits = reference.forward(checkpoint, decoder, case_ids(tmp_path, length))
        expected = np.load(GOLDEN)[f"{variant}-{length}"]
        assert np.abs(select(logits) - expected).max() < TOLERANCE, length


@pytest.mark.parametrize("kind", FORMATS)
def test_every_byte_is_that_of_the_fused_checkpoint(kind: str, tmp_path: Path) -> None:
    split, fused = write_both(tmp_path, "llama3")
    found, expected = (
        write_files(kind, source, tmp_path / f"{kind}-{number}")
        for number, source in enumerate((split, fused))
    )
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        assert found[name] == content, name
