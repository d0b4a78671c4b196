"""The NumPy reference forward against transformers' logits, recorded in tests/golden."""

from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import VARIANTS, write_random_checkpoint
from tests.golden.cases import CASES, GOLDEN, SEED, case_ids, select
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.families import read_decoder
from toolkit.quality import reference

# Logits spread by 1.6; two float32 forward passes that add in different orders were measured at
# most 1.4e-5 apart. A wrong mask, factor or scale moves them by 0.01 and more.
TOLERANCE = 1e-4


def open_variant(folder: Path, variant: str) -> tuple[Checkpoint, Decoder]:
    checkpoint = Checkpoint.open(write_random_checkpoint(folder, variant, seed=SEED))
    return checkpoint, read_decoder(checkpoint.config)


def test_every_variant_is_recorded():
    assert set(CASES) == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, variant):
    checkpoint, decoder = open_variant(tmp_path, variant)
    golden = np.load(GOLDEN)
    for length in CASES[variant]:
        logits = reference.forward(checkpoint, decoder, case_ids(checkpoint.folder, length))
        assert logits.shape == (length, decoder.vocab)
        assert logits.dtype == np.float32
        expected = golden[f"{variant}-{length}"]
        assert np.abs(select(logits) - expected).max() < TOLERANCE, length


@pytest.mark.parametrize("variant", ["longrope_gqa", "window", "partial_rotary_tied"])
def test_small_pieces_give_the_same(tmp_path, variant, monkeypatch):
    # The test checkpoints are smaller than one piece; real tensors are cut into many.
    checkpoint, decoder = open_variant(tmp_path, variant)
    ids = case_ids(checkpoint.folder, 100)
    whole = reference.forward(checkpoint, decoder, ids)
    monkeypatch.setattr(reference, "PIECE_WEIGHTS", 7 * decoder.hidden)
    monkeypatch.setattr(reference, "QUERY_ROWS", 7)
    assert np.abs(reference.forward(checkpoint, decoder, ids) - whole).max() < TOLERANCE


def test_sequences_together_are_each_by_itself(tmp_path):
    checkpoint, decoder = open_variant(tmp_path, "gqa")
    ids = case_ids(checkpoint.folder, 100)
    sequences = [ids[:50], ids[50:]]
    weights = reference.CheckpointWeights(checkpoint, lambda _: None)
    states = reference.final_states_of(weights, decoder, sequences)
    assert states.shape == (2, 50, decoder.hidden)
    for found, some in zip(states, sequences, strict=True):
        assert np.abs(found - reference.final_states(weights, decoder, some)).max() < TOLERANCE


def test_the_past_does_not_depend_on_the_future(tmp_path):
    checkpoint, decoder = open_variant(tmp_path, "gqa")
    ids = case_ids(checkpoint.folder, 40)
    changed = [*ids[:30], *((token + 1) % decoder.vocab for token in ids[30:])]
    first, second = (reference.forward(checkpoint, decoder, i) for i in (ids, changed))
    assert np.array_equal(first[:30], second[:30])
    assert np.abs(first[30:] - second[30:]).max() > 0.1


def test_progress_counts_every_byte(tmp_path):
    for variant in ("mha", "partial_rotary_tied"):
        checkpoint, decoder = open_variant(tmp_path / variant, variant)
        seen: list[int] = []
        reference.forward(checkpoint, decoder, [1, 2, 3], advance=seen.append)
        assert sum(seen) == reference.bytes_to_read(checkpoint, decoder)


@pytest.mark.parametrize("bad", [-1, 10**9])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, bad):
    checkpoint, decoder = open_variant(tmp_path, "mha")
    with pytest.raises(ValueError, match=f"token {bad}; allowed 0 to"):
        reference.forward(checkpoint, decoder, [1, bad])


@pytest.mark.parametrize("count", [0, 257])
def test_lengths_outside_the_context_are_refused(tmp_path, count):
    checkpoint, decoder = open_variant(tmp_path, "mha")
    with pytest.raises(ValueError, match=f"{count} tokens; allowed 1 to 256"):
        reference.forward(checkpoint, decoder, [1] * count)
