"""Loading: what cannot run here is said before and instead of what the engine says."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STUB = """
__version__ = "0.1.0"
Model = None
def Config(folder):
    raise RuntimeError("unknown field in genai_config.json")
"""
METADATA = "Metadata-Version: 2.1\nName: onnxruntime-genai\nVersion: {version}\n"


def ask(artifact: Path, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "toolkit.runner", "generate", "--artifact", str(artifact)]
    done = subprocess.run(
        [*command, "--prompt", "Hello", "--json"], capture_output=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def put_stub(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """An engine's package of some version that cannot load any model."""

    def put(version: str) -> dict[str, str]:
        folder = tmp_path / version
        information = folder / f"onnxruntime_genai-{version}.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(METADATA.format(version=version))
        (folder / "onnxruntime_genai.py").write_text(STUB)
        return {"PYTHONPATH": str(folder)}

    return put


def test_engine_that_is_too_old(
    artifacts: dict[str, Path], put_stub: Callable[[str], dict[str, str]]
) -> None:
    error = ask(artifacts["onnx"], **put_stub("0.1.0"))["error"]
    assert error["kind"] == "runtime"
    assert "onnxruntime-genai 0.1.0 is here, and the artifact was checked with" in error["message"]
    assert "pip install onnxruntime-genai==" in error["advice"]


def test_newer_engine_that_fails_is_not_called_old(
    artifacts: dict[str, Path], put_stub: Callable[[str], dict[str, str]]
) -> None:
    error = ask(artifacts["onnx"], **put_stub("99.0"))["error"]
    assert error["kind"] == "model"
    assert "is here" not in error["message"]


def test_engine_that_is_missing(artifacts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "onnxruntime_genai.py").write_text("raise ImportError('not here')")
    error = ask(artifacts["onnx"], PYTHONPATH=str(tmp_path))["error"]
    assert error["kind"] == "runtime"
    assert "runs in onnxruntime-genai, which cannot be imported: not here" in error["message"]


def test_a_property_that_the_runner_does_not_know(
    artifacts: dict[str, Path], tmp_path: Path
) -> None:
    """As an adapter apart in a runner from before there were any: never left out silently."""
    folder = Path(shutil.copytree(artifacts["gguf"], tmp_path / "copy"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["runtime"]["properties"] = {"later": "x"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    error = ask(folder)["error"]
    assert error["kind"] == "model"
    assert "unexpected keyword argument 'later'" in error["message"]


def test_model_larger_than_the_memory(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """Refused before it is loaded, also where loading would succeed."""
    folder = tmp_path / "large"
    shutil.copytree(artifacts["onnx"], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "device_memory_bytes": 10**15}))
    error = ask(folder)["error"]
    assert (error["kind"], "are available" in error["message"]) == ("memory", True)


def test_context_beyond_what_was_checked(artifacts: dict[str, Path]) -> None:
    """llama.cpp would choose LongRoPE's other factors for it, and say nothing."""
    command = [sys.executable, "-m", "toolkit.runner", "generate", "--prompt", "Hello", "--json"]
    more = ["--artifact", str(artifacts["gguf"]), "--context-tokens", "4096"]
    done = subprocess.run([*command, *more], capture_output=True, check=False)
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "settings"
    assert "context_tokens is 4096; tiny-phi3-gguf-q4_0 allows up to 512" in error["message"]


@pytest.mark.parametrize("option", ["--max-tokens", "--context-tokens", "--threads"])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_numbers_that_are_none(artifacts: dict[str, Path], option: str, value: str) -> None:
    command = [sys.executable, "-m", "toolkit.runner", "generate", "--prompt", "Hello"]
    more = ["--artifact", str(artifacts["gguf"]), f"{option}={value}"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{value!r} is no whole number from 1" in done.stderr


def test_a_prompt_is_never_cut_off_silently(artifacts: dict[str, Path]) -> None:
    """onnxruntime-genai's tokenizer ends at NUL; the others read on."""
    command = [sys.executable, "-m", "toolkit.runner", "generate", "--json", "--max-tokens", "4"]
    for kind in ("onnx", "gguf"):
        done = subprocess.run(
            [*command, "--artifact", str(artifacts[kind])], capture_output=True, check=False,
            input=b"What is\0 the capital of France?",
        )  # fmt: skip
        answer = json.loads(done.stdout)
        if kind == "onnx":
            assert "cannot read a text with the character NUL" in answer["error"]["message"]
        else:
            assert answer["prompt_tokens"] > 10
