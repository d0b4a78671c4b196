"""Phi-3-small's reference forward against a float64 one, recorded in tests/golden."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden.cases import case_ids, select
from tests.golden.small_cases import CASES, GOLDEN, SEED
from tests.small_checkpoints import COUNT, END, VARIANTS, write_small_checkpoint
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import MASKED_LOGIT, Decoder
from toolkit.errors import CheckpointError
from toolkit.families import read_decoder
from toolkit.quality import reference
from toolkit.quality.chat import read_chat, render

# Logits spread by 1.6; float32 against float64 was measured at most 1.2e-5 apart. A block too much
# or too little moves them by 0.5 and more.
TOLERANCE = 1e-4


def open_small(folder: Path, variant: str = "8k", **changes: object) -> tuple[Checkpoint, Decoder]:
    checkpoint = Checkpoint.open(write_small_checkpoint(folder, variant, seed=SEED, **changes))
    decoder = read_decoder(checkpoint.config)
    checkpoint.check(decoder)
    return checkpoint, decoder


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_published_code(tmp_path, variant):
    checkpoint, decoder = open_small(tmp_path, variant)
    golden = np.load(GOLDEN)
    for length in CASES[variant]:
        logits = reference.forward(checkpoint, decoder, case_ids(checkpoint.folder, length))
        assert logits.shape == (length, decoder.vocab)
        found, expected = select(logits), golden[f"{variant}-{length}"]
        said = expected > MASKED_LOGIT
        assert np.abs(found - expected)[said].max() < TOLERANCE, length
        assert found[~said].max() < MASKED_LOGIT / 2


def test_small_pieces_give_the_same(tmp_path, monkeypatch):
    checkpoint, decoder = open_small(tmp_path)
    ids = case_ids(checkpoint.folder, 70)
    whole = reference.forward(checkpoint, decoder, ids)
    monkeypatch.setattr(reference, "PIECE_WEIGHTS", 7 * decoder.hidden)
    monkeypatch.setattr(reference, "QUERY_ROWS", 7)
    cut = reference.forward(checkpoint, decoder, ids)
    assert np.abs(cut - whole)[:, :COUNT].max() < TOLERANCE


def test_every_layer_dense(tmp_path):
    checkpoint, decoder = open_small(tmp_path, dense_attention_every_n_layers=1)
    assert decoder.sparse is None
    ids = case_ids(checkpoint.folder, 40)
    sparse = open_small(tmp_path / "sparse")[1]
    first, second = (reference.forward(checkpoint, one, ids) for one in (decoder, sparse))
    # All blocks are local until the third.
    assert np.abs(first[:32] - second[:32])[:, :COUNT].max() < TOLERANCE
    assert np.abs(first[32:] - second[32:])[:, :COUNT].max() > 0.1


def test_the_chat_is_read_with_the_made_tokenizer(tmp_path):
    checkpoint, _ = open_small(tmp_path)
    chat = read_chat(checkpoint)
    assert render(chat, [("user", "Hi")]) == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert chat.stop_ids == checkpoint.stop_ids == (COUNT + 1, END)
    (tmp_path / "generation_config.json").unlink()
    assert Checkpoint.open(tmp_path).stop_ids == (COUNT + 1, END)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'; allowed 'gegelu'"),
        ({"rope_position_scale": 2.0}, "rope_position_scale: got 2.0; allowed 1.0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: got 3; allowed a divisor of 8"),
        ({"gegelu_limit": None}, "gegelu_limit: got None"),
        ({"blocksparse_num_local_blocks": 0}, "blocksparse_num_local_blocks: got 0"),
        ({"dense_attention_every_n_layers": None}, "dense_attention_every_n_layers: got None"),
        ({"dummy_token_indices": [1, 9999]}, "dummy_token_indices: got 9999"),
        ({"dummy_token_indices": 5}, "dummy_token_indices: got 5"),
        ({"mup_use_scaling": 1}, "mup_use_scaling: got 1; allowed true or false"),
    ],
)
def test_a_config_that_cannot_be(tmp_path, changes, reason):
    path = write_small_checkpoint(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_decoder(Checkpoint.open(tmp_path).config)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"ff_intermediate_size": 512}, "model.layers.0.mlp.up_proj.weight: found [768, 256]"),
        ({"num_key_value_heads": 4}, "model.layers.0.self_attn.query_key_value.weight: found"),
        ({"num_hidden_layers": 5}, "model.layers.4.input_layernorm.weight [256] is missing"),
        ({"num_hidden_layers": 3}, "model.layers.3.input_layernorm.bias is not part of"),
        ({"tie_word_embeddings": False}, "lm_head.weight [1024, 256] is missing"),
    ],
)
def test_tensors_that_contradict_the_config(tmp_path, changes, name):
    path = write_small_checkpoint(tmp_path) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="contradict each other") as caught:
        checkpoint.check(read_decoder(checkpoint.config))
    assert name in str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path):
    checkpoint, _ = open_small(tmp_path)
    (tmp_path / "cl100k_base.tiktoken").unlink()
    with pytest.raises(CheckpointError, match=r"no cl100k_base\.tiktoken to make it of"):
        read_chat(checkpoint)
