"""What the environment is, and what works without the extras."""

import re
import subprocess
import sys
from importlib import metadata

import pytest

EXTRAS = ("onnx", "onnxruntime", "onnxruntime_genai", "gguf", "xllamacpp", "sentencepiece",
          "openvino", "openvino_genai", "openvino_tokenizers", "mlx", "mlx_lm", "asyncssh",
          "transformers", "torch")  # fmt: skip


def run_without_extras(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run phiship where no extra can be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}));"
        "from toolkit.cli import main; sys.argv[0] = 'phiship'; main()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_everything_installs_together_without_torch() -> None:
    """`pip install phiship[all]` made this environment."""
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    assert not {name for name in installed if re.fullmatch(r"torch(vision|audio)?", name)}
    wanted = {"onnxruntime-genai", "openvino-genai", "mlx-lm", "gguf", "xllamacpp"}
    assert wanted <= installed


@pytest.mark.parametrize(
    "arguments", [["--help"], ["list"], ["plan", "phi-3-mini-4k-onnx-cpu-int4"],
                  ["plan", "phi-3-mini-4k-gguf-q4_k_m", "--for", "raspberry-pi-5"],
                  ["plan", "phi-3-mini-4k-mlx-4bit", "--for", "mac-apple-silicon"],
                  ["plan", "phi-3-mini-4k-openvino-int4", "--for", "intel-cpu"]],
)  # fmt: skip
def test_looking_and_planning_need_no_extra(arguments: list[str]) -> None:
    done = run_without_extras(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", ["ship", "list", "plan", "build", "check", "parity", "vendor",
                                     "deploy", "probe", "status", "trust"])  # fmt: skip
def test_every_command_has_help(command: str) -> None:
    done = run_without_extras(command, "--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout
