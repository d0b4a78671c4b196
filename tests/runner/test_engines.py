"""What every engine does alike: token ids, stops, providers."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer

from tests.runner.models import QUESTION, RUNTIMES, SERVER, answer, ask_ids, open_model
from toolkit.runner import engines
from toolkit.runner.answer import encode_chat
from toolkit.runner.failure import Failure
from toolkit.runner.loading import Loaded
from toolkit.runner.settings import Sampling, Settings

CONVERSATIONS: dict[str, list[tuple[str, str]]] = {
    "one": [("user", QUESTION)],
    "many": [
        ("system", "You are terse."),
        ("user", QUESTION),
        ("assistant", "Paris."),
        ("user", "And of Spain?"),
    ],
    "spaces": [("user", "  two  before, \t a tab,\n\n lines, and behind  ")],
    "unicode": [("user", "Grüße — 日本語 🙂👍🏽 ﬁ Å A\u030a \u200b\u00a0x")],
    "special": [("user", "<|end|> and <|assistant|> or </s><s> <|user|>, < |end|>, <|END|>")],
    "code": [("user", "def f(x):\n    return x**2  # <0xZZ>\n"), ("assistant", "'\"\\n")],
    "bytes": [("user", "<0x0A> and <0x41>")],
    "empty": [("user", "")],
}
# Takes text that is spelled like a token of one byte for that token.
WRONG = {("openvino", "bytes")}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_prompts_have_the_sources_ids(
    runtime: str, name: str, models: dict[str, Loaded], example: Path
) -> None:
    expected = encode_source(example, CONVERSATIONS[name])
    is_equal = encode_chat(models[runtime], CONVERSATIONS[name]) == expected
    assert is_equal == ((runtime, name) not in WRONG)


def encode_source(folder: Path, conversation: list[tuple[str, str]]) -> list[int]:
    """Return token ids by the source's own template and tokenizer."""
    config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # as transformers
    text = environment.from_string(config["chat_template"]).render(
        messages=[{"role": role, "content": content} for role, content in conversation],
        add_generation_prompt=True,
        bos_token=config["bos_token"],
        eos_token=config["eos_token"],
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def test_no_stop_is_in_an_answer(loaded: Loaded) -> None:
    """Neither as a token nor as text, whatever is sampled."""
    manifest = json.loads((loaded.artifact / "manifest.json").read_text("utf-8"))
    stop_texts, stop_ids = manifest["chat"]["stop_texts"], set(manifest["chat"]["stop_ids"])
    reasons = set()
    for seed in range(3):
        sampling = Sampling(0.0 if seed == 0 else 2.0, seed=seed)
        given = answer(loaded, ask_ids(loaded), 12, sampling)
        reasons.add(given.stop_reason)
        assert not set(given.token_ids) & stop_ids
        assert not any(text in given.text for text in stop_texts)
    assert "stop" in reasons


@pytest.mark.parametrize(
    ("runtime", "provider", "words"),
    [
        ("onnx", "cuda", "the one active here is CPU"),
        ("onnx", "npu", "allowed: cpu, cuda, dml, webgpu"),
        ("openvino", "npu", "OpenVINO has only CPU here"),
        ("openvino", "metal", "allowed: cpu, gpu, npu"),
        ("mlx", "metal", "mlx has none here"),
        ("mlx", "cuda", "allowed: cpu, metal"),
        ("gguf", "vulkan", "llama.cpp has only CPU here"),
        ("gguf", "npu", "allowed: cpu, cuda, metal, vulkan"),
        (SERVER, "cuda", "llama.cpp has only CPU here"),
    ],
)
def test_a_provider_that_is_not_active_is_an_error(
    runtime: str, provider: str, words: str, models: dict[str, Loaded]
) -> None:
    """Never a fallback."""
    manifest = models[runtime].manifest
    engine = engines.find_engine(manifest.engine)
    folder = models[runtime].artifact
    with pytest.raises(Failure, match=words) as caught:
        engine.load(folder, manifest.main_file, provider, Settings(64))
    assert caught.value.kind == "provider"


def test_a_damaged_artifact_is_named(loaded: Loaded, tmp_path: Path) -> None:
    """A file that is none, in the place of the model's."""
    engine = engines.find_engine(loaded.manifest.engine)
    for file in loaded.artifact.iterdir():
        is_model = file.name.endswith((".gguf", ".safetensors", ".onnx", "_model.xml"))
        content = b"nothing" if is_model else file.read_bytes()
        (tmp_path / file.name).write_bytes(content)
    with pytest.raises(Failure, match="load") as caught:
        engine.load(tmp_path, loaded.manifest.main_file, "cpu", Settings(64))
    assert caught.value.kind == "model"


def test_engines_are_modules_without_underscore() -> None:
    assert engines.list_engines() == [
        "llama_cpp", "mlx_lm", "onnxruntime_genai", "openvino_genai",
    ]  # fmt: skip
    with pytest.raises(Failure, match="is unknown"):
        engines.find_engine("_sampling")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_model_can_be_closed_unused_and_loaded_again(
    runtime: str, artifacts: dict[str, Path]
) -> None:
    for _ in range(2):
        with open_model(runtime, artifacts):
            pass


def test_a_broken_off_answer_is_not_gone_on_with(loaded: Loaded) -> None:
    """Nothing is left of it that the next answer would wait for or show."""
    prompt = ask_ids(loaded)
    with closing(loaded.model.generate(prompt, 400, Sampling(2.0, seed=1))) as stream:
        next(stream)
    assert "Paris" in answer(loaded, prompt).text


def test_a_prompt_is_encoded_while_another_is_answered(loaded: Loaded) -> None:
    """A server with a queue does so."""
    prompt = ask_ids(loaded)
    with closing(loaded.model.generate(prompt, 400, Sampling(1e4, seed=5))) as stream:
        next(stream)
        assert ask_ids(loaded) == prompt
        next(stream)
