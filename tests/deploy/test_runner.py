"""The runner: one answer, the same way on every engine."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from toolkit.artifact import MANIFEST, Manifest, read_manifest
from toolkit.runner.chat import render_chat
from toolkit.runner.failure import Failure
from toolkit.runner.generate import bound_context
from toolkit.runner.manifest import Chat

FORMATS = ("onnx", "gguf", "openvino", "mlx")
FIELDS = {
    "text": str,
    "prompt_tokens": int,
    "new_tokens": int,
    "tokens_per_second": float,
    "first_token_seconds": float,
    "load_seconds": float,
    "peak_memory_bytes": int,
    "provider": str,
    "engine": str,
    "stop_reason": str,
    "token_ids": list,
}


def run(artifact: Path, prompt: str, *more: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "toolkit.runner", "generate", "--artifact", str(artifact)]
    return subprocess.run([*command, "--prompt", prompt, *more], capture_output=True, check=False)


def ask(artifact: Path, prompt: str, max_tokens: int = 24) -> dict[str, Any]:
    done = run(artifact, prompt, "--max-tokens", str(max_tokens), "--json")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def change(tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of an artifact with another manifest."""

    def make(artifact: Path, **changes: object) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(artifact, copy)
        manifest: Manifest = msgspec.structs.replace(read_manifest(artifact), **changes)
        (copy / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        return copy

    return make


@pytest.mark.parametrize("kind", FORMATS)
def test_answer_and_its_costs(artifacts: dict[str, Path], kind: str) -> None:
    manifest = read_manifest(artifacts[kind])
    assert manifest.smoke
    answer = ask(artifacts[kind], manifest.smoke.prompt)
    assert {name: type(value) for name, value in answer.items()} == FIELDS
    assert manifest.smoke.expect.lower() in answer["text"].lower()
    assert answer["stop_reason"] == "stop"
    assert answer["new_tokens"] == len(answer["token_ids"]) < 24
    assert not set(answer["token_ids"]) & set(manifest.chat.stop_ids)
    assert not any(text in answer["text"] for text in manifest.chat.stop_texts)
    assert answer["provider"] == "cpu"
    assert answer["engine"].startswith(manifest.runtime.package)
    # More than the weights, less than a whole machine.
    assert manifest.size_bytes < answer["peak_memory_bytes"] < 1e9


def test_engines_agree_on_the_prompt(artifacts: dict[str, Path]) -> None:
    """Tokens of the prompt are the source's in every engine; its text has all it can hold."""
    prompt = "What is the capital of  France?\n\tPlease — schön <|end|> 日本"
    counts = {kind: ask(artifacts[kind], prompt, 1)["prompt_tokens"] for kind in FORMATS}
    assert len(set(counts.values())) == 1


@pytest.mark.parametrize("kind", FORMATS)
def test_length_ends_an_answer(artifacts: dict[str, Path], kind: str) -> None:
    answer = ask(artifacts[kind], "What is the capital of France?", 2)
    assert (answer["new_tokens"], answer["stop_reason"]) == (2, "length")


@pytest.mark.parametrize("kind", FORMATS)
def test_stop_ids_of_the_manifest_end_an_answer(
    artifacts: dict[str, Path], kind: str, change: Callable[..., Path]
) -> None:
    """Also one that the engine itself would not stop at."""
    whole = ask(artifacts[kind], "What is the capital of France?")
    chat = read_manifest(artifacts[kind]).chat
    stop = whole["token_ids"][2]
    changed = change(
        artifacts[kind], chat=msgspec.structs.replace(chat, stop_ids=(*chat.stop_ids, stop))
    )
    answer = ask(changed, "What is the capital of France?")
    assert answer["token_ids"] == whole["token_ids"][:2]
    assert answer["stop_reason"] == "stop"


@pytest.mark.parametrize("kind", FORMATS)
def test_bos_of_the_manifest_comes_first(
    artifacts: dict[str, Path], kind: str, change: Callable[..., Path]
) -> None:
    chat = read_manifest(artifacts[kind]).chat
    other = None if chat.bos_id is not None else 1
    changed = change(artifacts[kind], chat=msgspec.structs.replace(chat, bos_id=other))
    before = ask(artifacts[kind], "Hello", 1)["prompt_tokens"]
    assert ask(changed, "Hello", 1)["prompt_tokens"] == before + (1 if other else -1)


@pytest.mark.parametrize("kind", FORMATS)
def test_prompt_longer_than_the_context(artifacts: dict[str, Path], kind: str) -> None:
    error = ask(artifacts[kind], "word " * 5000)["error"]
    assert error["kind"] == "request"
    assert "context holds" in error["message"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("provider", "words"), [("cuda", "cuda"), ("abacus", "allowed: cpu")])
def test_provider_that_is_not_active_is_no_fallback(
    artifacts: dict[str, Path], kind: str, provider: str, words: str, change: Callable[..., Path]
) -> None:
    runtime = read_manifest(artifacts[kind]).runtime
    changed = change(artifacts[kind], runtime=msgspec.structs.replace(runtime, provider=provider))
    error = ask(changed, "Hello")["error"]
    assert error["kind"] == "provider"
    assert words in error["message"]


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_model_is_a_sentence(
    artifacts: dict[str, Path], kind: str, change: Callable[..., Path]
) -> None:
    changed = change(artifacts[kind])
    (changed / read_manifest(changed).runtime.main_file).write_bytes(b"no model")
    assert ask(changed, "Hello")["error"]["kind"] == "model"


def test_unknown_engine(artifacts: dict[str, Path], change: Callable[..., Path]) -> None:
    runtime = read_manifest(artifacts["onnx"]).runtime
    changed = change(artifacts["onnx"], runtime=msgspec.structs.replace(runtime, engine="abacus"))
    assert (
        "allowed: llama_cpp, mlx_lm, onnxruntime_genai, openvino_genai"
        in ask(changed, "Hello")["error"]["message"]
    )


def test_folder_without_manifest(tmp_path: Path) -> None:
    done = run(tmp_path, "Hello")
    assert done.returncode == 1
    assert b"no artifact" in done.stderr


@pytest.mark.parametrize("kind", FORMATS)
def test_people_read_the_text_alone(artifacts: dict[str, Path], kind: str) -> None:
    manifest = read_manifest(artifacts[kind])
    assert manifest.smoke
    done = run(artifacts[kind], manifest.smoke.prompt)
    assert manifest.smoke.expect.lower() in done.stdout.decode().lower()
    assert b"tokens/s" in done.stderr


def test_chat_text() -> None:
    chat = Chat({"system": ("<s>", "</s>"), "user": ("<u>", "</u>")}, "<a>", (1,), None)
    assert render_chat(chat, [("system", "be brief"), ("user", "hi")]) == (
        "<s>be brief</s><u>hi</u><a>"
    )
    with pytest.raises(Failure, match="allowed: system, user"):
        render_chat(chat, [("tool", "x")])


@pytest.mark.parametrize(
    ("text", "new_tokens", "valid", "expected"),
    [
        ("abc", 10, (1, 4096), 21),
        ("é", 10, (1, 4096), 20),
        ("a" * 5000, 10, (1, 4096), 4096),
        ("abc", 10, (4097, 131072), 4097),
    ],
)
def test_context_bound(text: str, new_tokens: int, valid: tuple[int, int], expected: int) -> None:
    assert bound_context(text, new_tokens, valid) == expected
