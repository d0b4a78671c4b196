"""The templates that Ollama gets: as Go's own text/template renders them, where Go is installed."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.exports.go_template import render
from toolkit.artifact import Chat
from toolkit.formats.gguf.ollama import TURNS, describe_chat, read_modelfile, write_modelfile
from toolkit.quality.chat import render as render_chat

PROGRAM = """\
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

func main() {
	var given struct {
		Template string
		Messages []struct{ Role, Content string }
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	made := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	if err := made.Execute(os.Stdout, map[string]any{"Messages": given.Messages}); err != nil {
		panic(err)
	}
}
"""
CHAT = Chat(
    turns={
        "system": ("<|system|>\n", "<|end|>\n"),
        "user": ("<|user|>\n", "<|end|>\n"),
        "assistant": ("<|assistant|>", "<|end|>\n"),
    },
    generation="<|assistant|>\n",
    stop_ids=(1, 2),
    stop_texts=("<|end|>", "<|endoftext|>"),
)
TURN = [("system", "Be brief."), ("user", '1 < 2 "?" {{ x }}'), ("assistant", "yes"), ("user", "")]
MESSAGES = [{"role": role, "content": content} for role, content in TURN]


@pytest.fixture(scope="module")
def go_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = shutil.which("go") or next(map(str, Path("/usr/lib").glob("go-*/bin/go")), None)
    if not found:
        pytest.skip("Go is not installed")
    folder = tmp_path_factory.mktemp("go")
    (folder / "main.go").write_text(PROGRAM, "utf-8")
    variables = {"HOME": str(folder), "GOFLAGS": "-mod=mod", "GO111MODULE": "off", "PATH": "/bin"}
    command = [found, "build", "-o", str(folder / "render"), str(folder / "main.go")]
    subprocess.run(command, check=True, env=variables, cwd=folder)
    return folder / "render"


def render_in_go(program: Path, template: str) -> str:
    given = json.dumps({"Template": template, "Messages": MESSAGES})
    done = subprocess.run([str(program)], input=given, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("template", [TURNS, describe_chat(CHAT, 512).template])
def test_go_renders_what_the_tests_render(template: str, go_program: Path) -> None:
    assert render_in_go(go_program, template) == render(template, MESSAGES)


def test_a_chat_as_a_template_renders_what_the_runner_renders() -> None:
    assert render(describe_chat(CHAT, 512).template, MESSAGES) == render_chat(CHAT, TURN)


def test_a_modelfile_is_read_back() -> None:
    model = describe_chat(CHAT, 512)
    assert read_modelfile(write_modelfile(model), "Modelfile") == model
    assert model.stops == ("<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")
