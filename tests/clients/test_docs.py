"""The snippets of docs/serving.md, run as they stand but for the address, the key and the model."""

import re
import subprocess
import sys

import pytest

from tests.clients.conftest import TOKEN
from tests.serving.running import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text("utf-8")
SNIPPETS = re.findall(r"```(python|sh)\n(.*?)```", PAGE, re.DOTALL)
CLIENTS = [
    (kind, text) for kind, text in SNIPPETS if "127.0.0.1:8080/v1/" in text or kind == "python"
]


@pytest.mark.parametrize(("kind", "text"), CLIENTS, ids=range(len(CLIENTS)))
def test_snippet(base_url: str, model: str, kind: str, text: str) -> None:
    text = text.replace("http://127.0.0.1:8080/v1", base_url)
    text = text.replace('"none"', f'"{TOKEN}"').replace("phi-3.5-mini-gguf-q4_0", model)
    if kind == "sh":
        text = text.replace("curl ", f"curl --silent --show-error --oauth2-bearer {TOKEN} ")
    command = [sys.executable, "-c", text] if kind == "python" else ["sh", "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "The capital of France is Paris." in done.stdout, done.stderr


def test_there_are_snippets() -> None:
    assert [kind for kind, _ in CLIENTS] == ["sh", "python", "python", "python"]
