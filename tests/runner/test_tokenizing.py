"""Artifacts whose engine has another tokenizer: the source's own gives ids and texts."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.bytelevel import make_tokenizer
from tests.conftest import RECIPES
from tests.deviating import write_deviating
from tests.runner.models import QUESTION, answer, ask_ids
from tests.serving.running import serving
from toolkit import catalog
from toolkit.artifact import read_manifest
from toolkit.build import build_all, require_all
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.job import Options
from toolkit.report import Report
from toolkit.runner.failure import Failure
from toolkit.runner.loading import Loaded, loading
from toolkit.runner.settings import Sampling, Settings
from toolkit.runner.tokenizing import SourceTokenizer

KINDS = tuple(RECIPES)
ROOT = Path(__file__).parent.parent.parent
EMOJI = "a \U0001f9d1\u200d\U0001f680 flies: 宇宙飛行士 \U0001d11e 우주 Grüße! \u00e9 end"


class Built:
    """Artifacts of the deviating checkpoint by format, and how they were built."""

    def __init__(self, checkpoint: Path, out: Path) -> None:
        self.report = Report("build")
        recipes = [catalog.load_recipe(name) for name in RECIPES.values()]
        results = build_all(
            recipes, Checkpoint.open(checkpoint), out, Options(), Console(), self.report
        )
        require_all(results)
        self.source = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self.folders = {kind: out / name for kind, name in RECIPES.items()}

    def encode(self, text: str) -> list[int]:
        """The source's ids."""
        ids: list[int] = self.source.encode(text, add_special_tokens=False).ids
        return ids


@pytest.fixture(scope="module")
def built(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """All four artifacts, their gates passed."""
    folder = tmp_path_factory.mktemp("deviating")
    return Built(write_deviating(example, folder / "source"), folder / "out")


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest, built: Built) -> Iterator[Loaded]:
    """One artifact after the other, loaded as the runner does."""
    with loading(built.folders[str(request.param)], Settings(256)) as one:
        yield one


def test_ids_are_looked_at_before_anything_is_converted(built: Built) -> None:
    steps = [step.name for step in built.report.steps]
    for name in RECIPES.values():
        assert steps.index(f"tokenizer: {name}") < steps.index("convert")
    told = {step.name: step.measured for step in built.report.steps}
    words = "the source's own (tokenizers): xllamacpp 2026.10.11549 (llama.cpp) encodes 2 of 106"
    assert told[f"tokenizer: {RECIPES['gguf']}"].startswith(words)


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_says_which_tokenizer_answers(kind: str, built: Built) -> None:
    manifest = read_manifest(built.folders[kind])
    assert manifest.runtime.tokenizer == "tokenizers"
    assert manifest.runtime.companions == ("tokenizers",)
    assert "tokenizer.json" in {file.path for file in manifest.files}
    assert any("token ids come from the source's tokenizer.json" in it for it in manifest.notes)
    found = {one.name: one.value for one in manifest.quality.measures}
    assert found["token id mismatches"] == 0


def test_the_source_gives_the_ids(loaded: Loaded, built: Built) -> None:
    assert loaded.engine.endswith(f" with tokenizers {loaded.model._tokenizer.version}")
    for text in ("ALL CAPS", "<|user|> \n spaces<|end|>", EMOJI):
        assert loaded.model.encode(text) == built.encode(text)


def test_answers_are_as_without(loaded: Loaded) -> None:
    found = answer(loaded, ask_ids(loaded))
    assert found.text == "The capital of France is Paris."
    assert found.stop_reason == "stop"


def test_what_is_streamed_is_the_text_of_the_ids(loaded: Loaded, built: Built) -> None:
    """Hot enough for bytes of characters that never end, special tokens, and all else."""
    prompt, count = ask_ids(loaded), 0
    before = built.source.decode(prompt)
    for seed in range(4):
        sampling = Sampling(temperature=2.0, seed=seed)
        with closing(loaded.model.generate(prompt, 32, sampling)) as pairs:
            found = list(pairs)
        ids = [token for token, _ in found]
        text = "".join(piece for _, piece in found)
        whole = built.source.decode(prompt + ids)[len(before) :]
        assert whole.startswith(text)
        assert len(whole) - len(text) <= 3  # an open character at the end
        count += len(ids)
    assert count > 16


def test_the_server_streams_what_it_answers_in_one_piece(built: Built) -> None:
    asked = {"prompt": f"{EMOJI} Once upon", "max_tokens": 24, "temperature": 1.5, "seed": 5}
    with serving(built.folders["gguf"]) as server:
        whole = server.ask("POST", "/v1/completions", asked)
        streamed = server.ask("POST", "/v1/completions", {**asked, "stream": True})
    assert streamed.streamed_text == whole.text
    assert whole.json["usage"]["prompt_tokens"] == len(built.encode(asked["prompt"]))


def test_the_program_says_which_tokenizer_answers(built: Built) -> None:
    command = [sys.executable, "-m", "toolkit.runner", "generate", "--prompt", QUESTION, "--json"]
    done = subprocess.run(
        [*command, "--artifact", str(built.folders["gguf"])], capture_output=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    assert " with tokenizers " in json.loads(done.stdout)["engine"]


def test_without_the_package_the_runner_says_what_to_install(built: Built, tmp_path: Path) -> None:
    (tmp_path / "tokenizers.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "toolkit.runner", "generate", "--prompt", QUESTION, "--json"]
    done = subprocess.run(
        [*command, "--artifact", str(built.folders["gguf"])], capture_output=True, check=False,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "runtime"
    assert "tokenized by tokenizers, which cannot be imported" in error["message"]
    assert error["advice"] == "install it: python -m pip install tokenizers"


def test_an_unknown_tokenizer_is_refused(built: Built, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built.folders["gguf"], tmp_path / "copy"))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text("utf-8"))
    manifest["runtime"]["tokenizer"] = "abacus"
    path.write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(Failure, match="its tokenizer is 'abacus'"), loading(folder, Settings(64)):
        pass


# --- texts of ids


@pytest.fixture(scope="module", params=["SentencePiece", "byte-level"])
def tokenizer(
    request: pytest.FixtureRequest, example: Path, tmp_path_factory: pytest.TempPathFactory
) -> SourceTokenizer:
    """One of each kind, small enough that characters take several tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "SentencePiece":
        shutil.copy(example / "tokenizer.json", folder)
    else:
        (folder / "tokenizer.json").write_text(json.dumps(make_tokenizer()), "utf-8")
    return SourceTokenizer(folder)


def test_a_character_comes_with_its_last_token(tokenizer: SourceTokenizer) -> None:
    ids = tokenizer.encode(EMOJI)
    pieces = [piece for _, piece in tokenizer.spell([], ids)]
    assert "".join(pieces).strip() == EMOJI
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("") > 9


def test_a_word_keeps_its_space_behind_a_prompt(tokenizer: SourceTokenizer) -> None:
    prompt, whole = tokenizer.encode("Once upon"), tokenizer.encode("Once upon a time")
    assert whole[: len(prompt)] == prompt
    spelled = "".join(piece for _, piece in tokenizer.spell([-1, *prompt], whole[len(prompt) :]))
    assert spelled == " a time"


def test_special_tokens_add_no_text(tokenizer: SourceTokenizer) -> None:
    ids = tokenizer.encode("one<|assistant|> two<|end|>")
    text = "".join(piece for _, piece in tokenizer.spell([], ids))
    assert text.replace(" ", "") == "onetwo"


def test_bytes_that_are_no_character_are_not_held_for_ever(tokenizer: SourceTokenizer) -> None:
    half = tokenizer.encode("\U0001d11e")[-1]  # the last byte of a character
    pieces = [piece for _, piece in tokenizer.spell([], [half] * 9)]
    assert "\ufffd" in "".join(pieces[:4])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(Failure, match=r"tokenizer\.json: cannot be read"):
        SourceTokenizer(tmp_path)
