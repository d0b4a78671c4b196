"""Settings take effect, each shown by what the engine does; those it has not are refused."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_random_checkpoint
from tests.formats.openvino_cases import make_recipe
from tests.formats.writing import write_artifact
from tests.runner.models import (
    RUNTIMES,
    SERVER,
    ask_ids,
    chosen,
    generate_ids,
    open_model,
    pass_over_missing,
)
from toolkit.checkpoint import Checkpoint
from toolkit.runner import engines
from toolkit.runner.engines import llama_cpp, mlx_lm, onnxruntime_genai, openvino_genai
from toolkit.runner.failure import Failure
from toolkit.runner.loading import Loaded
from toolkit.runner.settings import Settings

ENGINES = {"onnx": onnxruntime_genai, "openvino": openvino_genai, "mlx": mlx_lm, "gguf": llama_cpp}
NAMES = ("threads", "kv_bits", "batch_tokens")

# Threads

COUNT_THREADS = """
import json, os, sys
from pathlib import Path
from toolkit.runner.loading import loading
from toolkit.runner.settings import Settings
with loading(Path(sys.argv[1]), Settings(64, threads=int(sys.argv[2]))) as loaded:
    prompt = loaded.model.encode("one two three four")
    assert len(list(loaded.model.generate(prompt, 2)))
    shell = getattr(getattr(loaded.model, "_server", None), "_shell", None)
    process = "self"
    if shell:
        children = Path(f"/proc/{shell.pid}/task/{shell.pid}/children").read_text().split()
        names = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in children}
        process = names["llama-server"]
    print(json.dumps(len(os.listdir(f"/proc/{process}/task"))))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("runtime", ["onnx", "openvino", "gguf", SERVER])
def test_threads_are_as_many_as_asked_for(runtime: str, artifacts: dict[str, Path]) -> None:
    pass_over_missing(runtime)
    artifact = artifacts["gguf" if runtime == SERVER else runtime]
    cores = os.cpu_count() or 1
    few, many = (_count_threads(runtime, artifact, count) for count in (1, 4))
    if runtime == "openvino":  # its pool is no larger than the machine
        assert many > few or cores == 1
    elif runtime == "onnx":
        assert many - few == 3
    else:  # either server may have made one thread more when we count
        assert many - few in (2, 3, 4)


def _count_threads(runtime: str, artifact: Path, count: int) -> int:
    command = [sys.executable, "-c", COUNT_THREADS, str(artifact), str(count)]
    with chosen(runtime):
        done = subprocess.run(command, capture_output=True, check=True)
    return int(done.stdout.splitlines()[-1])


# The width of the cache


def test_openvino_keeps_keys_in_so_many_bits(artifacts: dict[str, Path]) -> None:
    """The likelihood of an answer changes, and is what CPUs have by default with 8 bits."""
    scores = {bits: _score_openvino(artifacts, bits) for bits in (None, 4, 8, 16)}
    assert scores[None] == scores[8]
    assert len(set(scores.values())) == 3


def _score_openvino(artifacts: dict[str, Path], bits: int | None) -> float:
    with open_model("openvino", artifacts, kv_bits=bits) as loaded:
        model, prompt = loaded.model, ask_ids(loaded)
        import numpy
        import openvino

        config = model._genai.GenerationConfig()
        config.max_new_tokens, config.logprobs = 12, 1
        ids = openvino.Tensor(numpy.array([prompt], numpy.int64))
        return float(model._pipeline.generate(ids, config).scores[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_keeps_keys_in_so_many_bits(bits: int, artifacts: dict[str, Path]) -> None:
    with open_model("mlx", artifacts, kv_bits=bits) as loaded:
        assert len(generate_ids(loaded, ask_ids(loaded), 4)) == 4
        assert {(type(c).__name__, c.bits) for c in loaded.model._cache} == {
            ("QuantizedKVCache", bits)
        }


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_divides_the_heads_of_phi3_mini(bits: int) -> None:
    """They have 96 values, which mlx-lm's own groups of 64 do not divide."""
    mlx = pytest.importorskip("mlx.core")
    from mlx_lm.models.base import scaled_dot_product_attention
    from mlx_lm.models.cache import KVCache

    def attend(cache: Any) -> Any:
        keys, values = cache.update_and_fetch(new[0], new[1])
        return scaled_dot_product_attention(
            new[2], keys, values, cache=cache, scale=96**-0.5, mask=None
        )

    new = mlx.random.normal((3, 1, 2, 7, 96), key=mlx.random.key(0))
    cache = KVCache().to_quantized(group_size=mlx_lm.KV_GROUP_SIZE, bits=bits)
    difference = mlx.abs(attend(cache) - attend(KVCache())).max().item()
    # A step of 8 bits is 1/60 of a standard deviation, one of 4 bits a quarter.
    assert 0 < difference < (0.5 if bits == 4 else 0.05)


@pytest.mark.parametrize("runtime", ["gguf", SERVER])
def test_llama_cpp_keeps_keys_in_so_many_bits(runtime: str, artifacts: dict[str, Path]) -> None:
    chances = {bits: _read_chance(runtime, artifacts, bits) for bits in (None, 8, 16)}
    assert chances[None] == chances[16] != chances[8]


def _read_chance(runtime: str, artifacts: dict[str, Path], bits: int | None) -> float:
    """Return the log of how likely the first token of an answer is."""
    with open_model(runtime, artifacts, kv_bits=bits) as loaded:
        # The first token sees the keys of the whole prompt.
        request = {"prompt": ask_ids(loaded), "n_predict": 1, "temperature": 1, "n_probs": 1}
        with loaded.model._posting("/completion", {**request, "samplers": []}) as response:
            answer = json.load(response)
        loaded.model._has_begun = True
        return float(answer["completion_probabilities"][0]["top_logprobs"][0]["logprob"])


# Tokens at once


def test_onnx_takes_prompts_in_pieces(artifacts: dict[str, Path]) -> None:
    with open_model("onnx", artifacts, batch_tokens=4) as loaded:
        model, sizes = loaded.model, []
        expected = generate_ids(loaded, ask_ids(loaded))

        class Recorder(model._genai.Generator):  # type: ignore[misc,name-defined]
            def append_tokens(self, tokens: list[int]) -> None:
                sizes.append(len(tokens))
                super().append_tokens(tokens)

        class Genai:
            Generator = Recorder
            GeneratorParams = model._genai.GeneratorParams

        model._genai, model._kept = Genai, None
        prompt = ask_ids(loaded)
        assert generate_ids(loaded, prompt) == expected
        assert sum(sizes) == len(prompt)
        assert sizes[:-1] == [4] * (len(sizes) - 1)


def test_mlx_takes_prompts_in_pieces(artifacts: dict[str, Path]) -> None:
    with open_model("mlx", artifacts, batch_tokens=4) as loaded:
        model, sizes = loaded.model, []
        network = model._model

        class Recorder:
            def __getattr__(self, name: str) -> Any:
                return getattr(network, name)

            def __call__(self, tokens: Any, **arguments: Any) -> Any:
                sizes.append(tokens.shape[1])
                return network(tokens, **arguments)

        model._model = Recorder()
        prompt = ask_ids(loaded)
        generate_ids(loaded, prompt, 1)
        rest = len(prompt) - 1  # the last one is computed with the answer
        assert sizes[: len(sizes) - 2] == [*[4] * (rest // 4), *([rest % 4] if rest % 4 else [])]


@pytest.mark.parametrize("runtime", ["gguf", SERVER])
def test_llama_cpp_takes_prompts_in_pieces(runtime: str, artifacts: dict[str, Path]) -> None:
    with open_model(runtime, artifacts, batch_tokens=16) as loaded:
        request = {"prompt": list(range(10, 110)), "n_predict": 1, "stream": True}
        request["return_progress"] = True
        done = []
        with loaded.model._posting("/completion", request) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    done.append(chunk.get("prompt_progress", {}).get("processed"))
        loaded.model._has_begun = True
        processed = [count for count in done if count is not None]
        steps = {after - before for before, after in itertools.pairwise(processed)}
        assert max(steps) == 16


def test_openvino_takes_prompts_in_pieces(artifacts: dict[str, Path]) -> None:
    """What waits for its turn is seen in how the time of a long prompt grows."""
    seconds = {size: min(_time_openvino(artifacts, size)) for size in (1, 256)}
    # 220 steps instead of one. Measured: 5 times as long.
    assert seconds[1] > 2 * seconds[256]


def _time_openvino(artifacts: dict[str, Path], batch_tokens: int) -> list[float]:
    with open_model("openvino", artifacts, batch_tokens=batch_tokens) as loaded:
        import numpy
        import openvino

        times = []
        for first in range(3):
            prompt = [first + 100, *range(100, 320)]
            ids = openvino.Tensor(numpy.array([prompt], numpy.int64))
            config = loaded.model._genai.GenerationConfig()
            config.max_new_tokens = 1
            result = loaded.model._pipeline.generate(ids, config)
            times.append(float(result.perf_metrics.get_ttft().mean))
        return times


# What is not offered


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_what_an_engine_has_not_is_refused_before_loading(
    kind: str, name: str, tmp_path: Path
) -> None:
    """There is nothing to load in this folder."""
    engine = ENGINES[kind]
    refused = 3 if name == "kv_bits" or name not in engine.OFFERED else None
    if refused is None:
        return
    with pytest.raises(Failure, match=name) as caught:
        engine.load(tmp_path, "model", "cpu", Settings(64, **{name: refused}))
    assert caught.value.kind == "settings"


def test_what_engines_offer() -> None:
    offered = {engine: engines.find_engine(engine).OFFERED for engine in engines.list_engines()}
    assert offered == {
        "llama_cpp": {"threads": (), "kv_bits": (8, 16), "batch_tokens": ()},
        "mlx_lm": {"kv_bits": (4, 8), "batch_tokens": ()},
        "onnxruntime_genai": {"threads": (), "batch_tokens": ()},
        "openvino_genai": {"threads": (), "kv_bits": (4, 8, 16), "batch_tokens": ()},
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_settings_together_leave_the_answer(runtime: str, models: dict[str, Loaded],
                                                artifacts: dict[str, Path]) -> None:  # fmt: skip
    engine = engines.find_engine(models[runtime].manifest.engine)
    settings = {"threads": 2, "kv_bits": 8, "batch_tokens": 8}
    offered = {name: value for name, value in settings.items() if name in engine.OFFERED}
    with open_model(runtime, artifacts, **offered) as loaded:
        prompt = ask_ids(loaded)
        assert generate_ids(loaded, prompt) == generate_ids(models[runtime], prompt)


def test_llama_cpp_wants_two_tokens_at_once(artifacts: dict[str, Path]) -> None:
    with (
        pytest.raises(Failure, match="the lowest is 2"),
        open_model("gguf", artifacts, batch_tokens=1),
    ):
        pass


def test_openvino_has_less_on_other_devices_and_with_longrope(tmp_path: Path) -> None:
    assert set(openvino_genai.offer("cpu", None)) == {"threads", "kv_bits", "batch_tokens"}
    assert set(openvino_genai.offer("cpu", 4096)) == {"threads", "kv_bits"}
    assert set(openvino_genai.offer("gpu", None)) == {"kv_bits", "batch_tokens"}
    assert set(openvino_genai.offer("npu", None)) == set()
    checkpoint = Checkpoint.open(write_random_checkpoint(tmp_path / "source", "longrope"))
    (tmp_path / "out").mkdir()
    write_artifact(make_recipe("f16"), checkpoint, tmp_path / "out")
    with pytest.raises(Failure, match="no setting batch_tokens"):
        openvino_genai.load(
            tmp_path / "out", "openvino_model.xml", "cpu", Settings(64, batch_tokens=8)
        )
