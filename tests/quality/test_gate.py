"""What the gate lets through and what it stops.

The runtime here is the checkpoint itself, or a checkpoint with something broken; the same breakage
in real artifacts and real runtimes is in test_gate_runtimes.py.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.quality.sources import SourceSession, copy_with_scaled_tensor, edit_json
from toolkit import catalog
from toolkit.artifact import Limits, Quality, Smoke
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.config import Config
from toolkit.console import Console
from toolkit.errors import CheckpointError, GateError
from toolkit.families import read_decoder
from toolkit.quality.chat import read_chat
from toolkit.quality.gate import FailedGateError, run_gate
from toolkit.quality.measures import Comparison, compare_logits
from toolkit.quality.ordinary import CHATS
from toolkit.quality.probe import LEAST_LENGTH, MOST_LENGTH, choose_length, count_shared, read_probe

LIMITS = Limits(max_kl=0.1, min_top1=0.9)
SMOKE = Smoke(prompt="What is the capital of France?", expect="Paris")


def gate(
    session: SourceSession,
    folder: Path,
    *,
    check_logits: bool = True,
    smoke: Smoke | None = None,
    limits: Limits | None = None,
) -> Quality:
    checkpoint = Checkpoint.open(folder)
    return run_gate(
        session,
        checkpoint,
        read_decoder(checkpoint.config),
        read_chat(checkpoint),
        limits or LIMITS,
        check_logits=check_logits,
        smoke=smoke,
        console=Console(as_json=True),
    )


def values(quality: Quality) -> dict[str, float]:
    return {measure.name: measure.value for measure in quality.measures}


@pytest.fixture
def session(example) -> SourceSession:
    return SourceSession(example)


def test_the_source_passes_its_own_gate(session, example):
    quality = gate(session, example, smoke=SMOKE)
    assert quality.checked
    assert quality.runtime == "reference"
    assert all(measure.ok for measure in quality.measures)
    found = values(quality)
    assert found["mean KL"] == found["max KL"] == 0
    assert found["top-1 agreement"] == 1
    assert found["smoke answer"] == 1
    assert found["source perplexity"] == found["artifact perplexity"] > 1
    limits = {measure.name: measure.limit for measure in quality.measures}
    assert limits["mean KL"] == LIMITS.max_kl
    assert limits["top-1 agreement"] == LIMITS.min_top1


def test_without_logits_the_result_says_unchecked(session, example):
    quality = gate(session, example, check_logits=False, smoke=SMOKE)
    assert not quality.checked
    assert session.logits_calls == 0
    assert values(quality) == {"token id mismatches": 0, "stop ids ignored": 0}


@pytest.mark.parametrize("check_logits", [True, False])
def test_one_shifted_token_fails(session, example, check_logits):
    emoji = "\U0001f600"
    encode = session.encode
    session.encode = lambda text: [i + (emoji in text) for i in encode(text)]
    with pytest.raises(GateError, match=r"token ids: reference encodes \d+ of \d+ probe") as caught:
        gate(session, example, check_logits=check_logits)
    assert emoji in str(caught.value)
    assert "the source has [" in str(caught.value)
    assert "the artifact [" in str(caught.value)
    assert isinstance(caught.value, FailedGateError)
    (measure,) = caught.value.quality.measures
    assert not measure.ok
    assert measure.value > 0
    assert not caught.value.quality.checked


@pytest.mark.parametrize("check_logits", [True, False])
def test_every_stop_id_must_stop(session, example, check_logits):
    for stop_id in Checkpoint.open(example).stop_ids:
        session.stop_ids = set(session.checkpoint.stop_ids) - {stop_id}
        with pytest.raises(FailedGateError, match=rf"stop ids: .* \[{stop_id}\]") as caught:
            gate(session, example, check_logits=check_logits)
        assert caught.value.quality.measures[-1].name == "stop ids ignored"


def test_one_perturbed_tensor_fails(tmp_path, example):
    name = "model.layers.0.mlp.down_proj.weight"
    broken = copy_with_scaled_tensor(example, tmp_path / "broken", name, -1.0)
    with pytest.raises(FailedGateError, match=r"mean KL divergence .* limit 0.1") as caught:
        gate(SourceSession(broken), example)
    measures = {measure.name: measure for measure in caught.value.quality.measures}
    assert not measures["mean KL"].ok
    assert measures["mean KL"].value > 0.1


def test_disagreement_on_the_first_choice_fails(tmp_path, example):
    name = "model.layers.0.mlp.down_proj.weight"
    broken = copy_with_scaled_tensor(example, tmp_path / "broken", name, 0.5)
    limits = Limits(max_kl=100, min_top1=1.0)
    with pytest.raises(FailedGateError, match=r"most likely token .*%; limit|limit 100.0%"):
        gate(SourceSession(broken), example, limits=limits)


def test_nan_in_the_artifact_fails(tmp_path, example):
    broken = copy_with_scaled_tensor(
        example, tmp_path / "broken", "model.norm.weight", float("nan")
    )
    with pytest.raises(FailedGateError, match="the artifact's logits hold NaN"):
        gate(SourceSession(broken), example)


def test_a_runtime_that_breaks_fails(session, example):
    def logits(_: list[int]) -> None:
        raise RuntimeError("out of slots")

    session.logits = logits
    with pytest.raises(FailedGateError, match="reference failed: out of slots") as caught:
        gate(session, example)
    assert [measure.value for measure in caught.value.quality.measures] == [0, 0]


def test_a_wrong_answer_fails(session, example):
    wrong = Smoke(prompt=SMOKE.prompt, expect="Atlantis")
    with pytest.raises(FailedGateError, match=r"France\?' was answered .*Paris.*'Atlantis'"):
        gate(session, example, smoke=wrong)


def test_an_answer_that_goes_on_after_a_stop_id_fails(session, example):
    generate = session.generate
    session.generate = lambda ids, count: [*generate(ids, count), 5, 6]
    with pytest.raises(FailedGateError, match="reference went on after stop id"):
        gate(session, example, smoke=SMOKE)


def test_an_answer_that_ends_without_a_stop_id_fails(session, example):
    generate = session.generate
    session.generate = lambda ids, count: generate(ids, count)[:-1]
    with pytest.raises(FailedGateError, match=r"ended after \d+ tokens without a stop id"):
        gate(session, example, smoke=SMOKE)


def test_a_special_token_in_the_answer_fails(session, example):
    generate = session.generate
    user = session.encode("<|user|>")
    session.generate = lambda ids, count: [*user, *generate(ids, count)]
    with pytest.raises(FailedGateError, match=f"special token {user[0]} is in it"):
        gate(session, example, smoke=SMOKE)


def test_a_long_answer_may_be_cut(session, example):
    # A chatty model that needs more than max_tokens is still the model.
    one = Smoke(prompt=SMOKE.prompt, expect="", max_tokens=1)
    assert gate(session, example, smoke=one).checked


def test_the_trained_example_ends_its_answer(session):
    chat = read_chat(session.checkpoint)
    before, after = chat.turns["user"]
    prompt = session.encode(before + SMOKE.prompt + after + chat.generation)
    generated = session.generate(prompt, SMOKE.max_tokens)
    assert generated[-1] in session.checkpoint.stop_ids
    text = session.tokenizer.decode(generated[:-1], skip_special_tokens=False)
    assert "Paris" in text
    assert "<|" not in text


def test_a_tokenizer_beyond_the_vocabulary_is_the_sources_fault(session, example, tmp_path):
    folder = copy_with_scaled_tensor(example, tmp_path / "copy", "model.norm.weight", 1.0)
    extra = {"id": 9000, "content": "<|extra|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    edit_json(
        folder / "tokenizer.json",
        lambda c: c["added_tokens"].extend(
            {**extra, **flags, "id": i, "content": f"<|extra{i}|>"} for i in range(2000, 2100)
        ),
    )
    with pytest.raises(CheckpointError, match="vocab_size allows"):
        gate(session, folder)


def test_the_probe_is_chats_of_one_length(example):
    checkpoint = Checkpoint.open(example)
    chat, decoder = read_chat(checkpoint), read_decoder(checkpoint.config)
    probe = read_probe(checkpoint, chat, decoder, 4096)
    shared = count_shared(probe)  # <|user|>
    assert {len(ids) for ids in probe} == {shared + MOST_LENGTH}
    assert 1 <= shared <= 2
    tokenizer = SourceSession(example).tokenizer
    for ids, (asked, _) in zip(probe, CHATS, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert text.startswith(chat.turns["user"][0].strip())
        assert asked in text
    assert read_probe(checkpoint, chat, decoder, 50) == [ids[:49] for ids in probe]


def test_a_large_model_reads_less(example):
    decoder = read_decoder(Checkpoint.open(example).config)
    assert choose_length(decoder) == MOST_LENGTH
    phi = read_decoder(Config("config.json", catalog.load_model("phi-3-mini-4k").config))
    assert choose_length(phi) == LEAST_LENGTH


def test_the_probe_fits_the_artifacts_own_context(session, example):
    checkpoint = Checkpoint.open(example)
    lengths: list[int] = []
    logits = session.logits
    session.logits = lambda ids: lengths.append(len(ids)) or logits(ids)
    run_gate(
        session,
        checkpoint,
        read_decoder(checkpoint.config),
        read_chat(checkpoint),
        Limits(),
        check_logits=True,
        smoke=None,
        console=Console(as_json=True),
        context_length=64,
    )
    assert lengths == [63] * len(CHATS)


def test_another_comparison_may_take_the_probes_place(session, example):
    checkpoint = Checkpoint.open(example)
    half = np.array([[0.0, 1.0], [1.0, 0.0]])
    found = compare_logits(half, half[::-1], [0, 1])

    def run(compare: Callable[[], Comparison]) -> Quality:
        return run_gate(
            session,
            checkpoint,
            read_decoder(checkpoint.config),
            read_chat(checkpoint),
            Limits(max_kl=9, min_top1=0),
            check_logits=True,
            smoke=None,
            console=Console(as_json=True),
            compare=compare,
        )

    quality = run(lambda: found)
    assert session.logits_calls == 0
    assert values(quality)["mean KL"] == found.mean_kl
    errors = {measure.name: measure.error for measure in quality.measures}
    assert errors["top-1 agreement"] == 0
    assert errors["max KL"] is None

    def refuse() -> Comparison:
        raise ValueError("nothing in common")

    with pytest.raises(FailedGateError, match="logits: nothing in common"):
        run(refuse)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Limits(max_kl=100, max_kl_99=1e-4), "99 % KL"),
        (Limits(max_kl=100, min_top1=0, max_perplexity_ratio=0.5), "perplexity ratio"),
    ],
)
def test_limits_that_are_set_hold(tmp_path, example, limits, name):
    tensor = "model.layers.0.mlp.down_proj.weight"
    broken = copy_with_scaled_tensor(example, tmp_path / "broken", tensor, 0.9)
    with pytest.raises(FailedGateError, match="limit") as caught:
        gate(SourceSession(broken), example, limits=limits)
    missed = [measure.name for measure in caught.value.quality.measures if not measure.ok]
    assert missed == [name]
