"""Schema-driven fuzz: what the contract allows is answered as it says, all else is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import TOKEN
from tests.clients.contract import describe
from tests.serving.running import Server

EXAMPLES = int(os.environ.get("PHISHIP_FUZZ_EXAMPLES", "25"))  # of each operation, in each phase
SEED = os.environ.get("PHISHIP_FUZZ_SEED", "1")


# What an engine does with an answer is not looked at here, so one of them is enough.
@pytest.mark.parametrize("server", ["onnx"], indirect=True)
def test_contract(server: Server, model: str, tmp_path: Path) -> None:
    """No 5xx, the documented status and body, valid data taken and invalid data refused."""
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(describe(model)))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(document)]
    command += ["--url", server.told["listening"], "--header", f"Authorization: Bearer {TOKEN}"]
    command += ["--max-examples", str(EXAMPLES), "--seed", SEED, "--no-color"]
    command += ["--suppress-health-check", "all", "--continue-on-failure"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # It lives, and answers as before.
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    reply = server.ask("POST", "/v1/chat/completions", {"messages": messages}, bearer)
    assert reply.text == "The capital of France is Paris."
