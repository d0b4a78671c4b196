"""Sampling in every engine: seeds, temperature, top_p, and nothing hidden."""

import json
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from tests.runner.models import RUNTIMES, ask_ids, chosen, generate_ids, pass_over_missing
from toolkit import formats
from toolkit.runner.engines._sampling import SEEDS, choose_seed, make_chooser
from toolkit.runner.loading import Loaded
from toolkit.runner.settings import Sampling

WARM = 2.5
# So hot that all tokens of the vocabulary are about equally likely.
HOT = 1e4


def test_temperature_zero_is_greedy_whatever_the_rest_says(loaded: Loaded) -> None:
    prompt = ask_ids(loaded)
    expected = generate_ids(loaded, prompt)
    assert generate_ids(loaded, prompt, sampling=Sampling(0.0, 0.3, 7)) == expected


def test_a_seed_decides_the_answer(loaded: Loaded) -> None:
    prompt = ask_ids(loaded)
    answers = [generate_ids(loaded, prompt, 6, Sampling(WARM, 0.98, seed)) for seed in range(4)]
    again = [generate_ids(loaded, prompt, 6, Sampling(WARM, 0.98, seed)) for seed in range(4)]
    assert again == answers
    # The model is sure of this answer: some samples may agree.
    assert len({tuple(ids) for ids in answers}) >= 2


def test_without_a_seed_every_answer_is_another(loaded: Loaded) -> None:
    prompt = ask_ids(loaded)
    answers = {tuple(generate_ids(loaded, prompt, 4, Sampling(HOT))) for _ in range(4)}
    assert len(answers) == 4  # four tokens of 2048 each time: 1e-12 for a chance hit


ASK = """
import json, sys
from pathlib import Path
from tests.runner.models import generate_ids
from toolkit.runner.loading import loading
from toolkit.runner.settings import Sampling, Settings
with loading(Path(sys.argv[1]), Settings(512)) as loaded:
    print(json.dumps(generate_ids(loaded, json.loads(sys.argv[2]), 12, Sampling(2.5, 0.98, 3))))
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_seed_decides_in_every_process(runtime: str, models: dict[str, Loaded]) -> None:
    pass_over_missing(runtime)
    loaded = models[runtime]
    prompt = ask_ids(loaded)
    command = [sys.executable, "-c", ASK, str(loaded.artifact), json.dumps(prompt)]
    with chosen(runtime):
        done = subprocess.run(command, capture_output=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer == generate_ids(loaded, prompt, 12, Sampling(WARM, 0.98, 3))


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_no_token_is_left_out(loaded: Loaded, top_p: float) -> None:
    """No top_k of 40 or 50, no min_p; and top_p counts what the temperature has made likely."""
    if top_p == 1 and loaded.manifest.engine == "mlx_lm":
        pytest.skip("MLX is slow on a CPU, and top_p only leaves out more")
    prompt = ask_ids(loaded)
    samples = [generate_ids(loaded, prompt, 1, Sampling(HOT, top_p, seed)) for seed in range(60)]
    # Of 1024 equally likely tokens 60 draws hit 58.3 on average, with a spread of 1.3.
    assert len({tuple(ids) for ids in samples}) > 52


def test_a_small_top_p_leaves_the_likeliest(loaded: Loaded) -> None:
    prompt = ask_ids(loaded)
    expected = generate_ids(loaded, prompt, 6)
    for seed in range(3):
        assert generate_ids(loaded, prompt, 6, Sampling(WARM, 1e-4, seed)) == expected


@pytest.mark.parametrize("kind", ["onnx", "openvino", "mlx", "gguf"])
def test_tokens_are_as_frequent_as_they_are_likely(kind: str, models: dict[str, Loaded]) -> None:
    """Also repeated ones: a penalty would move what the prompt has said already."""
    loaded = models[kind]
    prompt = ask_ids(loaded, "What is the capital of")
    with closing(formats.get(kind).open_session(loaded.artifact)) as session:
        logits = session.logits(prompt)[-1].astype(np.float64)
    temperature = float(logits.max() - np.sort(logits)[-20]) / 2
    weights = np.exp((logits - logits.max()) / temperature)
    likely = weights / weights.sum()
    count = 30 if kind == "mlx" else 100  # MLX takes a tenth of a second for each on a CPU
    samples = [
        token
        for seed in range(count)
        for token in generate_ids(loaded, prompt, 1, Sampling(temperature, seed=seed))
    ]
    for token in np.argsort(-likely)[:5]:
        spread = np.sqrt(likely[token] * (1 - likely[token]) / count)
        # Four standard deviations, and what a cache or activations of 8 bits move.
        assert abs(samples.count(int(token)) / count - likely[token]) < 4 * spread + 0.01


def test_chooser_takes_the_fewest_tokens_that_reach_top_p() -> None:
    logits = np.log(np.array([[[0.1, 0.4, 0.2, 0.3]]], np.float32))
    chosen_ids = []
    for top_p in (0.39, 0.69, 0.71, 1.0):
        choose = make_chooser(Sampling(1.0, top_p, 0))
        chosen_ids.append({choose(logits) for _ in range(300)})
    assert chosen_ids == [{1}, {1, 3}, {1, 2, 3}, {0, 1, 2, 3}]


def test_seeds_of_any_size_are_taken() -> None:
    numbers = [choose_seed(Sampling(seed=seed)) for seed in (-1, 0, 2**31 - 1, 2**63, 10**30)]
    assert all(0 <= number < SEEDS for number in numbers)
    assert choose_seed(Sampling(seed=5)) != choose_seed(Sampling(seed=5), part=1)
    assert choose_seed(Sampling()) != choose_seed(Sampling())


def test_huge_seeds_are_taken_by_every_engine(loaded: Loaded) -> None:
    prompt = ask_ids(loaded)
    for seed in (-1, 2**63):
        assert generate_ids(loaded, prompt, 2, Sampling(WARM, seed=seed))
