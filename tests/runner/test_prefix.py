"""A prompt that begins as the last one did is not computed again, and the answer is the same."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import write_random_checkpoint
from tests.formats.writing import write_artifact
from tests.runner.models import RUNTIMES, ask_ids, generate_ids, open_model
from toolkit.checkpoint import Checkpoint
from toolkit.formats.onnx.recipe import OnnxQuantization, OnnxRecipe
from toolkit.runner.answer import encode_chat
from toolkit.runner.engines import onnxruntime_genai
from toolkit.runner.engines._prefix import count_common
from toolkit.runner.loading import Loaded
from toolkit.runner.settings import Sampling, Settings

CHAT = [
    ("user", "What is the capital of France?"),
    ("assistant", "The capital of France is Paris."),
    ("user", "What is a young dog called?"),
    ("assistant", "A young dog is called a puppy."),
    ("user", "What is the capital of Spain?"),
]


def test_common_beginning() -> None:
    assert count_common([], [1, 2]) == 0
    assert count_common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert count_common([1, 2, 3], [1, 2, 3]) == 2, "the last token is always computed"
    assert count_common([1, 2, 3], [1, 2, 3, 4]) == 3


def test_a_chat_is_answered_as_if_it_were_new(loaded: Loaded) -> None:
    """Turn after turn, back to an earlier one, something else; greedily and sampled."""
    sampled = Sampling(2.0, 0.9, 11)
    asked = [
        (encode_chat(loaded, CHAT[:1]), sampled),
        (encode_chat(loaded, CHAT[:3]), sampled),
        (encode_chat(loaded, CHAT[:5]), Sampling()),
        (encode_chat(loaded, CHAT[:3]), sampled),
        (ask_ids(loaded, "Name a colour."), Sampling()),
    ]
    fresh = []
    for prompt, sampling in asked:
        _forget(loaded)
        fresh.append(generate_ids(loaded, prompt, 4, sampling))
    _forget(loaded)
    assert [generate_ids(loaded, prompt, 4, sampling) for prompt, sampling in asked] == fresh


def test_only_the_new_turn_is_computed(loaded: Loaded) -> None:
    if loaded.model.reused_tokens is None:
        pytest.skip("paged attention does not say what it finds in its blocks")
    _forget(loaded)
    first = ask_ids(loaded)
    answer = generate_ids(loaded, first)
    turn = first + answer
    # The answer's stop token may not have been computed, and llama.cpp does not give it.
    following = turn + ask_ids(loaded, "What is a young dog called?")
    generate_ids(loaded, following, 4)
    assert len(turn) - 1 <= loaded.model.reused_tokens <= len(turn)
    generate_ids(loaded, following, 4)
    assert loaded.model.reused_tokens == len(following) - 1


@pytest.mark.parametrize("count", [3, 24])
def test_an_answer_without_end_leaves_no_trace(loaded: Loaded, count: int) -> None:
    """It was as long as it may be, or was broken off."""
    prompt = ask_ids(loaded)
    expected = generate_ids(loaded, prompt)
    stream = loaded.model.generate(prompt, count)
    begun = [next(stream)[0] for _ in range(3)]
    if count == 3:
        assert next(stream, None) is None
    stream.close()
    following = prompt + begun + ask_ids(loaded, "What is a young dog called?")
    reused = generate_ids(loaded, following, 3)
    _forget(loaded)
    assert generate_ids(loaded, following, 3) == reused
    assert generate_ids(loaded, prompt) == expected


def _forget(loaded: Loaded) -> None:
    """Make the engine's cache useless: with a prompt that begins otherwise."""
    other = ask_ids(loaded, "x")[::-1]
    generate_ids(loaded, other, 1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_another_thread_may_break_off_an_answer(runtime: str, loaded_once: Loaded) -> None:
    """And the engine is free for the next one at once."""
    prompt = ask_ids(loaded_once)
    expected = generate_ids(loaded_once, prompt)
    for _ in range(2):
        stream = loaded_once.model.generate(prompt, 24)
        assert next(stream)[0] == expected[0]
        tokens: list[int] = []

        def go_on_and_close() -> None:
            tokens.append(next(stream)[0])  # noqa: B023
            stream.close()  # noqa: B023
            tokens.extend(generate_ids(loaded_once, prompt))  # noqa: B023

        thread = threading.Thread(target=go_on_and_close)
        thread.start()
        thread.join()
        assert tokens == [expected[1], *expected]


@pytest.fixture
def loaded_once(runtime: str, models: dict[str, Loaded]) -> Loaded:
    """The runtime of the test's own parameter."""
    return models[runtime]


# onnxruntime-genai, whose cache is ours to bound


def test_the_cache_is_as_large_as_the_chat(artifacts: dict[str, Path]) -> None:
    with open_model("onnx", artifacts, 400) as loaded:
        model, sizes = loaded.model, []
        for length in (20, 21, 40, 150, 300, 30):
            list(model.generate(list(range(10, 10 + length)), 10))
            sizes.append(model._kept.capacity)
    assert sizes == [32, 32, 64, 256, 400, 400]


SWITCH = onnxruntime_genai.SWITCHES["phi3"]


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose LongRoPE switches where the engine takes it to."""
    folder = tmp_path_factory.mktemp("long")
    write_random_checkpoint(folder / "source", "longrope")
    path = folder / "source" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["rope_scaling"]["original_max_position_embeddings"] = SWITCH
    config |= {"original_max_position_embeddings": SWITCH, "max_position_embeddings": 2 * SWITCH}
    config["sliding_window"] = 4 * SWITCH
    path.write_text(json.dumps(config), "utf-8")
    quantization = OnnxQuantization(precision="fp32", embedding="fp32")
    recipe = OnnxRecipe(
        name="long", model="x", title="x", provider="cpu", quantization=quantization
    )
    (folder / "out").mkdir()
    write_artifact(recipe, Checkpoint.open(folder / "source"), folder / "out")
    return folder / "out"


def draw_ids(length: int) -> list[int]:
    rng = np.random.default_rng(3)
    return [int(token) for token in rng.integers(5, 1900, length)]


def test_longrope_is_never_mixed(long_folder: Path) -> None:
    """Each token is the likeliest after a sequence that is computed as a whole."""
    settings = Settings(2 * SWITCH, batch_tokens=1000)
    model = onnxruntime_genai.load(long_folder, "model.onnx", "cpu", settings)
    prompt = draw_ids(SWITCH - 1)
    greedy = [token for token, _ in model.generate(prompt, 4)]
    # So cold that the likeliest token is always drawn: our way through the switch.
    assert [t for t, _ in model.generate(prompt, 4, Sampling(1e-5, seed=1))] == greedy
    assert model.reused_tokens == 0, "what is kept has keys of the long factors by now"
    following = [*prompt, *greedy, 7]
    assert next(model.generate(following, 1))[0] == _compute(model, following)
    assert model.reused_tokens >= len(following) - 2
    assert next(model.generate(prompt, 1))[0] == _compute(model, prompt)
    assert model.reused_tokens == 0
    for count in range(1, 4):
        assert greedy[count] == _compute(model, prompt + greedy[:count])
    hot = [token for token, _ in model.generate(prompt, 4, Sampling(1e6, seed=1))]
    assert hot[2] != _compute(model, prompt + hot[:2]), "drawn, not the likeliest of 2048"
    long_prompt = draw_ids(SWITCH + 900)[::-1]
    assert next(model.generate(long_prompt, 1))[0] == _compute(model, long_prompt)
    assert model.reused_tokens == 0
    model.close()


def _compute(model: onnxruntime_genai.Model, ids: list[int]) -> int:
    """Return the likeliest token after a sequence, from the network alone."""
    params = model._genai.GeneratorParams(model._model)
    params.set_search_options(max_length=len(ids) + 1, do_sample=False)
    generator = model._genai.Generator(model._model, params)
    generator.append_tokens(ids)
    return int(generator.get_logits().argmax())
