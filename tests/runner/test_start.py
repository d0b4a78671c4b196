"""A command starts with the modules that it needs, for each is compiled anew from the zipapp."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Artifacts

# Runs the runner's command line, then says which of its modules were imported.
PROGRAM = """
import json, sys
from toolkit.runner.cli import main
code = main(sys.argv[1:])
print(json.dumps([name for name in sys.modules if name.startswith("toolkit.runner.")]))
sys.exit(code)
"""
SERVER, AGENT = "toolkit.runner.serving.server", "toolkit.runner.agent.serve"


@pytest.mark.parametrize(
    ("words", "is_fed"),
    [(["generate", "--prompt", "Hello", "--max-tokens", "1"], True), (["info"], True),
     (["agent", "serve", "--root"], False)],
)  # fmt: skip
def test_neither_server_nor_agent_is_imported_for_nothing(
    artifacts: Artifacts, tmp_path: Path, words: list[str], is_fed: bool
) -> None:
    words = [*words, "--artifact", str(artifacts["onnx"])] if is_fed else [*words, str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], input="", capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    imported = json.loads(done.stdout.splitlines()[-1])
    assert SERVER not in imported
    assert (AGENT in imported) == (not is_fed)
