"""GGUF artifacts in llama.cpp: its structs, its logits against the source's, its generation."""

import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tests.formats.gguf_cases import CASES, PRECISIONS, Artifacts, make_recipe, share_artifacts
from tests.formats.writing import write_artifact
from toolkit.checkpoint import Checkpoint
from toolkit.errors import ArtifactError, MissingExtraError
from toolkit.families import read_decoder
from toolkit.formats import gguf
from toolkit.formats.gguf import ggml, llama
from toolkit.formats.gguf.session import BATCH_TOKENS
from toolkit.quality.reference import forward

# Mean KL divergence from the float32 reference, nats a token. Measured on these checkpoints: f16
# 3e-6, bf16 9e-5 (llama.cpp rounds activations to the type of the weights, keys and values to
# float16), q8_0 1.4e-3, q6_k 1e-2, q5_k_m 2.6e-2, q4_k_m 0.084, q4_0 0.13,
# iq4_xs 0.1. Twice that is allowed.
MOST_KL = {"f16": 6e-6, "bf16": 2e-4, "q8_0": 3e-3, "q6_k": 0.02, "q5_k_m": 0.05, "q4_k_m": 0.17,
           "q4_0": 0.26, "iq4_xs": 0.2}  # fmt: skip
# What another position of the window's edge or of LongRoPE's switch makes: 0.09 and more.
DIFFERENT_KL = 0.05
LENGTHS = (1, 30, 64, 65, 200, 256, 257, 300)


@pytest.fixture
def cases(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Checkpoints and artifacts of all cases."""
    return share_artifacts(tmp_path_factory)


def random_ids(length: int) -> list[int]:
    ids: list[int] = np.random.default_rng(length).integers(0, 1900, length).tolist()
    return ids


def mean_kl(source: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (source, found))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("case", [case for case in CASES if case != "deep"])
def test_f16_has_the_sources_logits_where_the_plan_says_so_and_only_there(
    case: str, cases: Artifacts
) -> None:
    written = cases.get(case, "f16")
    decoder = written.decoder
    session = gguf.open_session(written.folder)
    for length in (length for length in LENGTHS if length <= decoder.context):
        ids = random_ids(length)
        source = forward(written.checkpoint, decoder, ids)
        found = session.logits(ids)
        assert found.dtype == np.float32
        assert found.shape == (length, decoder.vocab)
        # The session allocates no more than it needs, as a device with that context would.
        first, last = gguf.find_valid_context(decoder, length)[0]
        if first <= length <= last:
            assert mean_kl(source, found) < MOST_KL["f16"], length
        elif length > 1:  # one token has no positions to confuse
            assert mean_kl(source, found) > DIFFERENT_KL, length
    session.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_precision_is_as_near_to_the_source_as_it_should_be(
    precision: str, cases: Artifacts
) -> None:
    for case in ("gqa", "partial_rotary_tied", "narrow"):
        written = cases.get(case, precision)
        session = gguf.open_session(written.folder)
        ids = random_ids(100)
        source = forward(written.checkpoint, written.decoder, ids)
        assert mean_kl(source, session.logits(ids)) < MOST_KL[precision]
        session.close()


def test_more_bits_are_nearer(cases: Artifacts) -> None:
    ids = random_ids(200)
    written = cases.get("mha", "f16")
    source = forward(written.checkpoint, written.decoder, ids)
    found = []
    for precision in PRECISIONS:
        session = gguf.open_session(cases.get("mha", precision).folder)
        found.append(mean_kl(source, session.logits(ids)))
        session.close()
    assert found == sorted(found)


def test_positions_beyond_a_batch_see_what_stands_before(cases: Artifacts) -> None:
    session = gguf.open_session(cases.get("mha", "f16").folder)
    ids = random_ids(BATCH_TOKENS + 60)
    whole, part = session.logits(ids), session.logits(ids[:40])
    # The kernels for other batch sizes add in another order.
    np.testing.assert_allclose(whole[:40], part, atol=0.02)
    alone = session.logits(ids[BATCH_TOKENS:])
    assert np.abs(alone - whole[BATCH_TOKENS:]).max() > 0.5
    session.close()


def test_the_example_answers_and_stops(example: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(example)
    write_artifact(make_recipe("q4_k_m", model="tiny-phi3"), checkpoint, tmp_path)
    session = gguf.open_session(tmp_path)
    ids = session.encode("<|user|>\nWhat is the capital of France?<|end|>\n<|assistant|>\n")
    answer = session.generate(ids, 30)
    assert [session.stops(token) for token in answer] == [False] * (len(answer) - 1) + [True]
    assert "Paris" in Tokenizer.from_file(str(example / "tokenizer.json")).decode(answer)
    assert session.generate(ids, 2) == answer[:2]
    assert all(session.stops(token) for token in checkpoint.stop_ids)
    # Greedy: each token is the best one after all before it.
    logits = session.logits(ids + answer[:-1])
    assert logits[len(ids) - 1 :].argmax(-1).tolist() == answer
    assert session.runtime == f"xllamacpp {llama.VERSION} (llama.cpp), cpu"
    session.close()


# The C interface


def test_structs_lie_as_in_the_library(cases: Artifacts) -> None:
    library = llama.load_llama()
    model = library.llama_model_default_params()
    # llama.cpp's own defaults, seen through our layout: all layers, by layer, mapped, whole.
    assert (model.n_gpu_layers, model.split_mode, model.load_mode, model.main_gpu) == (-1, 1, -1, 0)
    assert (model.vocab_only, model.check_tensors, model.use_extra_bufts) == (False, False, True)
    context = library.llama_context_default_params()
    names = [name for name, _ in context._fields_[:9]]
    assert [getattr(context, name) for name in names] == [512, 2048, 512, 1, 0, 0, 1, 4, 4]
    # And back: what is set is what the library uses.
    path = str(cases.get("mha", "f16").folder / "model.gguf").encode()
    model.n_gpu_layers = 0
    handle = library.llama_model_load_from_file(path, model)
    context.n_ctx, context.n_batch, context.n_ubatch = 768, 96, 32
    context.n_threads, context.n_threads_batch = 3, 2
    made = library.llama_init_from_model(handle, context)
    assert library.llama_n_ctx(made) == 768
    assert library.llama_n_batch(made) == 96
    assert library.llama_n_threads(made) == 3
    library.llama_free(made)
    library.llama_model_free(handle)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_encoding_needs_no_weights(cases: Artifacts) -> None:
    folder = cases.get("mha", "f16").folder
    session = gguf.open_session(folder)
    assert session.encode("Hello")
    assert session.stops(3) in (True, False)
    assert not _is_mapped(folder)
    session.logits([1, 2])
    assert _is_mapped(folder)
    session.close()
    assert not _is_mapped(folder)


def _is_mapped(folder: Path) -> bool:
    return f"{folder}/model.gguf" in Path("/proc/self/maps").read_text("utf-8")


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2027.1.1")
    llama.load_llama.cache_clear()
    with pytest.raises(MissingExtraError, match=r"found version 2027\.1\.1") as caught:
        llama.load_llama()
    assert caught.value.advice == f"install it with: pip install xllamacpp=={llama.VERSION}"


def test_without_the_wheel_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ggml.load_library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingExtraError) as caught:
        ggml.load_library()
    assert caught.value.advice == "install it with: pip install 'phiship[gguf]'"


def test_the_extra_pins_the_version_whose_structs_are_known() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert f'"xllamacpp=={llama.VERSION}"' in pyproject


@pytest.mark.parametrize("damage", ["missing", "truncated", "other magic"])
def test_a_damaged_file_is_an_error_that_says_why(
    damage: str, cases: Artifacts, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    content = (cases.get("mha", "q4_0").folder / "model.gguf").read_bytes()
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "other magic":
        path.write_bytes(b"GGML" + content[4:])
    # As a server of the same wheel does in its process.
    llama.load_llama().llama_log_set(llama.LogCallback(), None)
    with pytest.raises(ArtifactError, match=r"llama\.cpp does not load it: .*\w") as caught:
        session = gguf.open_session(tmp_path)
        session.logits([1])
    assert str(path) in str(caught.value)


def test_llama_cpp_says_nothing_on_its_own(
    cases: Artifacts, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copyfile(cases.get("mha", "q4_0").folder / "model.gguf", tmp_path / "model.gguf")
    session = gguf.open_session(tmp_path)
    session.logits([1, 2, 3])
    session.close()
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_cache_bytes_are_float16_keys_and_values(cases: Artifacts) -> None:
    decoder = read_decoder(cases.checkpoint("gqa").config)
    needs = gguf.needs(make_recipe("q4_0"), decoder, 256)
    # 2 layers x (keys + values) x 2 heads x 64 x 2 bytes
    assert needs.kv_bytes_per_token == 2 * 2 * 2 * 64 * 2
    assert (needs.engine, needs.provider, needs.main_file) == ("llama_cpp", "cpu", "model.gguf")
