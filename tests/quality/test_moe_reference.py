"""The reference forward of a mixture of experts against transformers' recorded logits."""

import numpy as np
import pytest

from tests.golden.cases import case_ids, select
from tests.golden.moe_cases import CASES, GOLDEN, SEED
from tests.moe_checkpoints import write_moe_checkpoint
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder, Experts
from toolkit.families import read_decoder
from toolkit.quality import reference
from toolkit.quality.routing import route

# As in test_reference.py: two float32 passes were at most 1.3e-5 apart, and no routing of the
# recorded texts is nearer to another one than 2e-4.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Decoder]:
    folder = write_moe_checkpoint(tmp_path_factory.mktemp("moe"), seed=SEED)
    checkpoint = Checkpoint.open(folder)
    return checkpoint, read_decoder(checkpoint.config)


@pytest.mark.parametrize("length", CASES)
def test_logits_are_those_of_transformers(opened, length):
    checkpoint, decoder = opened
    checkpoint.check(decoder)
    logits = reference.forward(checkpoint, decoder, case_ids(checkpoint.folder, length))
    expected = np.load(GOLDEN)[f"moe-{length}"]
    assert np.abs(select(logits) - expected).max() < TOLERANCE


def test_progress_counts_every_byte(opened):
    checkpoint, decoder = opened
    seen: list[int] = []
    reference.forward(checkpoint, decoder, [1, 2, 3], advance=seen.append)
    assert sum(seen) == reference.bytes_to_read(checkpoint, decoder)


def test_sparsemixer_by_hand():
    """The first two within 2 %: they share; the third is far; the second shares with nobody."""
    picked, weights = route(np.array([[1.0, 5.0, 4.95, 2.0]]), Experts(4, 2, 0.01))
    assert picked.tolist() == [[1, 2]]
    assert weights[0] == pytest.approx([1 / (1 + np.exp(-0.05)), 1.0])


def test_sparsemixer_below_zero_and_at_zero():
    picked, weights = route(np.array([[-1.0, -1.01, -3.0], [0.0, 0.0, -2.0]]), Experts(3, 2, 0.01))
    assert picked.tolist() == [[0, 1], [0, 1]]
    assert weights[0] == pytest.approx([1 / (1 + np.exp(-0.01)), 1.0])
    assert weights[1] == pytest.approx([0.5, 1.0])
