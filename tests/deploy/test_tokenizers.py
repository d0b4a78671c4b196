"""An artifact that the source's tokenizer answers for, on a device whose Python has nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.conftest import RECIPES
from tests.deviating import write_deviating
from toolkit import catalog
from toolkit.artifact import read_manifest
from toolkit.build import build
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.deploy import Push, deploy
from toolkit.errors import PreflightError
from toolkit.job import Options
from toolkit.remote import generate
from toolkit.report import Report
from toolkit.ssh.embedded import EmbeddedDevice


def test_the_tokenizer_comes_as_a_wheel(
    example: Path,
    tmp_path: Path,
    start_embedded: Callable[..., EmbeddedDevice],
    console: Console,
) -> None:
    """The real wheels, from the user's index; skipped when that cannot be reached."""
    source = write_deviating(example, tmp_path / "source")
    recipe, options = catalog.load_recipe(RECIPES["gguf"]), Options(check=False)
    checkpoint, report = Checkpoint.open(source), Report("build")
    artifact = build(recipe, checkpoint, tmp_path / "out", options, console, report)
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = str(bare / "bin" / "python")
    device = msgspec.structs.replace(start_embedded().start(), python=python, runtime="auto")
    try:
        report = deploy(artifact, device, console, Push(accept_unchecked=True))
    except PreflightError as error:
        if "does not answer" in str(error):
            pytest.skip(str(error))
        raise
    smoke = read_manifest(artifact).smoke
    assert smoke
    found = generate(device, smoke.prompt, smoke.max_tokens)
    assert smoke.expect in found.text
    assert " with tokenizers " in found.engine
    installed = {
        path.name.partition("-")[0] for path in tmp_path.rglob("site-packages/*.dist-info")
    }
    assert {"tokenizers", "xllamacpp"} <= installed
    assert "huggingface_hub" not in installed
