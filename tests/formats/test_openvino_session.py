"""OpenVINO artifacts in their own runtime: logits, cache, both kinds of attention, the runner."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import VARIANTS, write_random_checkpoint, write_safetensors
from tests.formats.openvino_cases import SCHEMES, Artifacts, make_recipe
from tests.formats.writing import write_artifact
from toolkit.checkpoint import Checkpoint
from toolkit.errors import ArtifactError
from toolkit.families import read_decoder
from toolkit.formats import openvino
from toolkit.formats.openvino.session import EXACT, OpenvinoSession
from toolkit.quality.reference import forward
from toolkit.runner.engines import openvino_genai
from toolkit.runner.failure import Failure
from toolkit.runner.settings import Sampling, Settings

# float32 sums in another order: 1e-5 is what was measured.
FLOAT_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Every variant in every scheme, written when first asked for."""
    return Artifacts(tmp_path_factory.mktemp("openvino"))


@contextmanager
def opened(folder: Path, **properties: str) -> Iterator[OpenvinoSession]:
    session = OpenvinoSession(folder, **properties)
    try:
        yield session
    finally:
        session.close()


def draw_ids(length: int) -> list[int]:
    """Seeded token ids."""
    ids: list[int] = np.random.default_rng(length).integers(0, 1900, length).tolist()
    return ids


@pytest.mark.parametrize("variant", VARIANTS)
def test_float_artifact_has_the_sources_logits(variant: str, artifacts: Artifacts) -> None:
    """Across the LongRoPE switch (64 tokens) and the window (32) too."""
    checkpoint = artifacts.checkpoint(variant)
    decoder = read_decoder(checkpoint.config)
    with opened(artifacts.find(variant, "f16")) as session:
        for length in (1, 32, 33, 64, 65, 120):
            ids = draw_ids(length)
            expected = forward(checkpoint, decoder, ids)
            np.testing.assert_allclose(session.logits(ids), expected, atol=FLOAT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_piece_by_piece_equals_one_prefill(variant: str, artifacts: Artifacts) -> None:
    """The cache works; of LongRoPE on either side of its switch, which no cache can cross."""
    with opened(artifacts.find(variant, "f16")) as session:
        for first, last in ((1, 40), (66, 80)):
            ids = draw_ids(last)
            expected = session.logits(ids)
            starts = range(first, last, 3)
            found = [session.logits(ids[:first])]
            found += [session.extend(ids[:start], ids[start : start + 3]) for start in starts]
            np.testing.assert_allclose(
                np.concatenate(found), expected, atol=FLOAT_TOLERANCE, rtol=0
            )


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "f16"])
@pytest.mark.parametrize("variant", ["gqa", "partial_rotary_tied"])
def test_quantized_artifact_computes_with_the_weights_it_reads_back(
    variant: str, scheme: str, artifacts: Artifacts, tmp_path: Path
) -> None:
    checkpoint, folder = artifacts.checkpoint(variant), artifacts.find(variant, scheme)
    decoder = read_decoder(checkpoint.config)
    read_back = Path(shutil.copytree(checkpoint.folder, tmp_path / "read_back"))
    weights = dict(openvino.dequantize(folder, decoder))
    write_safetensors(read_back / "model.safetensors", weights, "f32")
    ids = draw_ids(48)
    expected = forward(Checkpoint.open(read_back), decoder, ids)
    with opened(folder) as session:
        np.testing.assert_allclose(session.logits(ids), expected, atol=FLOAT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_cpu_keeps_weights_as_they_are_stored(scheme: str, artifacts: Artifacts) -> None:
    """A pattern that it does not know would be unpacked to float32 at load."""
    quantization = make_recipe(scheme).quantization
    stored = {"f16": "f16", "int8": "u8", "int4": "i4" if quantization.symmetric else "u4"}
    kinds = (quantization.embedding, quantization.head, quantization.precision)
    embedding, head, linear = (stored[kind or ""] for kind in kinds)
    network = (
        pytest.importorskip("openvino")
        .Core()
        .compile_model(artifacts.find("gqa", scheme) / "openvino_model.xml", "CPU", EXACT)
    )
    found = [_inputs(node) for node in network.get_runtime_model().get_ordered_ops()]
    matrices = [types[1] for kind, types in found if kind == "FullyConnected"]
    assert matrices == [linear] * 8 + [head]
    assert embedding in [types[0] for kind, types in found if kind == "Gather"]
    # What the plugin fuses from the other patterns: two norms a layer and the last one, queries and
    # keys of each layer.
    kinds_found = [kind for kind, _ in found]
    assert kinds_found.count("RMS") == 5
    assert kinds_found.count("RoPE") == 4
    assert kinds_found.count("ScaledDotProductAttention") == 2


def _inputs(node: Any) -> tuple[str, list[str]]:
    """Kind of a node of the compiled network, and the types of its inputs."""

    def info(of: Any, key: str) -> str:
        return str(of.get_rt_info()[key].astype(str))

    sources = [port.get_source_output().get_node() for port in node.inputs()]
    return info(node, "layerType"), [info(n, "outputPrecisions").split(",")[0] for n in sources]


@pytest.mark.parametrize(
    ("variant", "scheme"),
    [*((variant, "f16") for variant in VARIANTS), ("gqa", "int4"), ("window", "int4-asym")],
)
def test_both_kinds_of_attention_generate_the_exact_tokens(
    variant: str, scheme: str, artifacts: Artifacts
) -> None:
    """Paged attention rebuilds the network from its patterns: a window it missed would be lost."""
    folder = artifacts.find(variant, scheme)
    prompts = [draw_ids(length) for length in (40, 70)]
    with opened(folder) as session:
        expected = [_generate_exactly(session, prompt, 8) for prompt in prompts]
    for backend in ("SDPA", "PA"):
        with opened(folder, **EXACT, ATTENTION_BACKEND=backend) as session:
            assert [session.generate(prompt, 8) for prompt in prompts] == expected, backend


def _generate_exactly(session: OpenvinoSession, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens from plain inference."""
    ids, logits = list(prompt), session.logits(prompt)
    while True:
        ids.append(int(logits[-1].argmax()))
        if len(ids) == len(prompt) + count or session.stops(ids[-1]):
            return ids[len(prompt) :]
        logits = session.extend(ids[:-1], ids[-1:])


def test_session_stops_on_every_stop_id(artifacts: Artifacts) -> None:
    with opened(artifacts.find("mha", "int4")) as session:
        assert [t for t in range(2048) if session.stops(t)] == sorted(
            artifacts.checkpoint("mha").stop_ids
        )


@pytest.mark.parametrize("file", ["generation_config.json", "openvino_model.bin"])
def test_an_incomplete_folder_is_refused(file: str, artifacts: Artifacts, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts.find("mha", "int4"), tmp_path / "copy"))
    (folder / file).unlink()
    with pytest.raises(ArtifactError, match="OpenVINO does not load it"), opened(folder) as session:
        session.logits([1])


def test_runner_answers_as_the_session_does(example: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(example)
    write_artifact(make_recipe("int4", group_size=32), checkpoint, tmp_path)
    text = "<|user|>\nWhat is the capital of France?<|end|>\n<|assistant|>\n"
    model = openvino_genai.load(tmp_path, "openvino_model.xml", "cpu", Settings(256))
    try:
        with opened(tmp_path) as session:
            prompt = session.encode(text)
            expected = session.generate(prompt, 24)
        assert model.encode(text) == prompt
        answer = list(model.generate(prompt, 24))
        assert [token for token, _ in answer] == expected
        assert expected[-1] in checkpoint.stop_ids
        assert "Paris" in "".join(piece for _, piece in answer)
        assert [token for token, _ in model.generate(prompt, 3)] == expected[:3]
    finally:
        model.close()


@pytest.mark.parametrize("length", [50, 63, 64, 65])
@pytest.mark.parametrize("variant", ["longrope", "longrope_gqa"])
def test_runner_crosses_the_longrope_switch_as_the_source_does(
    variant: str, length: int, artifacts: Artifacts
) -> None:
    """From 65 tokens on, the source computes the whole sequence with the long factors."""
    checkpoint = artifacts.checkpoint(variant)
    decoder, ids = read_decoder(checkpoint.config), draw_ids(length)
    model = openvino_genai.load(
        artifacts.find(variant, "f16"), "openvino_model.xml", "cpu", Settings(256)
    )
    try:
        count = 68 - length
        found = [token for token, _ in model.generate(ids, count)]
    finally:
        model.close()
    for token in found:
        logits = forward(checkpoint, decoder, ids)[-1]
        # The cache is in 8 bits here, as on a device; keys of the wrong factors are 10 times worse.
        assert logits[token] >= logits.max() - 0.1
        ids.append(token)
    assert len(found) == count


@pytest.mark.parametrize("seed", [1, 2])
def test_runner_samples_across_the_longrope_switch(seed: int, artifacts: Artifacts) -> None:
    """Both parts come of the seed, and the second one not of the same random numbers again."""
    folder, ids = artifacts.find("longrope", "f16"), draw_ids(60)
    model = openvino_genai.load(folder, "openvino_model.xml", "cpu", Settings(256))
    try:
        hot, cold = Sampling(1e6, seed=seed), Sampling(1e-3, seed=seed)
        found = [[token for token, _ in model.generate(ids, 10, hot)] for _ in range(2)]
        assert found[0] == found[1]
        assert len(found[0]) == 10
        assert found[0][:5] != found[0][5:]
        greedy = [token for token, _ in model.generate(ids, 10)]
        assert [token for token, _ in model.generate(ids, 10, cold)] == greedy
    finally:
        model.close()


@pytest.mark.parametrize(
    ("length", "new", "expected"),
    [(10, 20, [20]), (60, 5, [5]), (60, 6, [5, 1]), (64, 3, [1, 2]), (65, 3, [3]), (64, 1, [1])],
)
def test_only_tokens_beyond_the_switch_are_computed_anew(
    length: int, new: int, expected: list[int]
) -> None:
    assert openvino_genai.split_at_switch(length, new, 64) == expected
    assert openvino_genai.split_at_switch(length, new, None) == [new]


def test_pipeline_is_made_for_what_it_runs() -> None:
    choose, plain = openvino_genai.choose_properties, Settings(512)
    sdpa = {"ATTENTION_BACKEND": "SDPA"}
    assert choose("cpu", plain, None) == choose("gpu", plain, None) == {}
    assert choose("cpu", plain, 4096) == choose("gpu", plain, 4096) == sdpa
    assert choose("npu", plain, None) == {"MAX_PROMPT_LEN": 512}
    assert choose("cpu", Settings(512, threads=3, kv_bits=4), None) == {
        "INFERENCE_NUM_THREADS": 3,
        "KV_CACHE_PRECISION": "u4",
    }


def test_runner_ends_a_generation_that_nobody_reads(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artifacts.find("mha", "f16")
    model = openvino_genai.load(folder, "openvino_model.xml", "cpu", Settings(256))
    try:
        prompt = draw_ids(40)
        assert len(list(model.generate(prompt, 120))) == 120, "this prompt's answer is long"
        put: list[int] = []
        run = model._producer.produce

        def produce(work: Any) -> Any:
            def count(pass_on: Any) -> None:
                work(lambda token: put.append(token) or pass_on(token))

            return run(count)

        monkeypatch.setattr(model._producer, "produce", produce)
        stream = model.generate(prompt, 120)
        first = next(stream)
        stream.close()
        assert len(put) < 100
        assert next(model.generate(prompt, 1)) == first
    finally:
        model.close()


def test_runner_prints_a_character_when_its_last_byte_has_come(
    example: Path, tmp_path: Path
) -> None:
    """Byte tokens of one character: text comes once, and whole."""
    write_artifact(make_recipe("int4", group_size=32), Checkpoint.open(example), tmp_path)
    model = openvino_genai.load(tmp_path, "openvino_model.xml", "cpu", Settings(256))
    try:
        tokens = model.encode("a\N{GRINNING FACE}b")
        assert len(tokens) > 3, "the example has no token for it, so it comes as bytes"
        pieces = [piece for _, piece in openvino_genai.spell(model._tokenizer, iter(tokens))]
        assert "".join(pieces).strip() == "a\N{GRINNING FACE}b"
        assert openvino_genai.INCOMPLETE not in "".join(pieces)
    finally:
        model.close()


@pytest.mark.parametrize("provider", ["gpu", "npu", "cuda"])
def test_runner_refuses_a_device_that_is_not_there(provider: str, artifacts: Artifacts) -> None:
    devices = pytest.importorskip("openvino").Core().available_devices
    if any(device.startswith(provider.upper()) for device in devices):
        pytest.skip(f"this machine has a {provider}")
    with pytest.raises(Failure, match=f"provider '?{provider}'?") as caught:
        openvino_genai.load(
            artifacts.find("mha", "int4"), "openvino_model.xml", provider, Settings(64)
        )
    assert caught.value.kind == "provider"


def test_runner_names_a_missing_configuration(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts.find("mha", "int4"), tmp_path / "copy"))
    (folder / "config.json").unlink()
    with pytest.raises(Failure, match=r"cannot load it: .*config\.json"):
        openvino_genai.load(folder, "openvino_model.xml", "cpu", Settings(64))


def test_runner_names_a_damaged_network(artifacts: Artifacts, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifacts.find("mha", "int4"), tmp_path / "copy"))
    path = folder / "openvino_model.xml"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(Failure, match="cannot load it") as caught:
        openvino_genai.load(folder, path.name, "cpu", Settings(64))
    assert caught.value.kind == "model"


def test_a_wider_vocabulary_than_the_tokenizers_is_kept(tmp_path: Path) -> None:
    """Phi-3 has 32,064 rows for 32,011 tokens."""
    checkpoint = Checkpoint.open(write_random_checkpoint(tmp_path / "source", "mha"))
    (tmp_path / "out").mkdir()
    write_artifact(make_recipe("int8"), checkpoint, tmp_path / "out")
    with opened(tmp_path / "out") as session:
        assert session.logits([1, 2]).shape == (2, read_decoder(checkpoint.config).vocab)
