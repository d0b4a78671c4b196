"""curl, as in docs/serving.md."""

import json
import shutil
import subprocess

import pytest

from tests.clients.conftest import TOKEN
from tests.clients.test_openai import ANSWER, MESSAGES

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")


def curl(*arguments: str) -> str:
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", "60", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ask(base_url: str, **fields: object) -> str:
    body = json.dumps({"messages": MESSAGES, **fields})
    return curl(f"{base_url}/chat/completions", "--oauth2-bearer", TOKEN, "--json", body)


def test_chat(base_url: str) -> None:
    assert json.loads(ask(base_url))["choices"][0]["message"]["content"] == ANSWER


def test_stream(base_url: str) -> None:
    lines = [line for line in ask(base_url, stream=True).splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks) == ANSWER


def test_a_large_body_from_standard_input(base_url: str) -> None:
    """curl asks first whether it may send that much."""
    body = json.dumps({"messages": [{"role": "user", "content": "word " * 100_000}]})
    command = ["curl", "-s", f"{base_url}/chat/completions", "--oauth2-bearer", TOKEN]
    command += ["-H", "Content-Type: application/json", "-d", "@-"]
    done = subprocess.run(command, input=body, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["error"]["code"] == "context_length_exceeded"


def test_health_without_the_token(base_url: str) -> None:
    assert json.loads(curl(base_url.replace("/v1", "/health"))) == {"status": "ok"}
