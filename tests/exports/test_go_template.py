"""The templates that Ollama gets: as Go's own text/template renders them, where Go is installed."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import templates
from tests.exports.go_template import render
from toolkit.artifact import Chat, Template
from toolkit.formats.gguf.nearest import USUAL, find_pairs
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
SEVERAL = USUAL["chats of several turns"]
TURN = [("system", "Be brief."), ("user", '1 < 2 "?" {{ x }}'), ("assistant", "yes"), ("user", "")]
MESSAGES = [{"role": role, "content": content} for role, content in TURN]


def carry(template: str) -> Chat:
    """A chat that carries a template."""
    carried = Template(
        text=template, why="", tokens={"bos_token": "<s>", "eos_token": "</s>"},
        roles=("system", "user", "assistant"),
    )  # fmt: skip
    return Chat(turns={}, generation="", stop_ids=(1,), stop_texts=("</s>",), template=carried)


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


@pytest.mark.parametrize("name", sorted({*templates.NAMES} - templates.IS_DATA))
def test_go_renders_the_nearest_template(name: str, go_program: Path) -> None:
    """As the tests' own renderer, and as the template where nothing is said to differ."""
    chat = carry(templates.read(name))
    model = describe_chat(chat, 512)
    found = render_in_go(go_program, model.template)
    assert found == render(model.template, MESSAGES) == find_pairs(chat).join(TURN)
    if not any("differ" in one or "refuses" in one for one in model.differences):
        messages = [{"role": role, "content": text} for role, text in SEVERAL]
        assert render(model.template, messages) == render_chat(chat, SEVERAL)


@pytest.mark.parametrize(
    ("name", "differences"),
    [
        ("default-system", ()),
        ("system-folded", ()),
        ("trimmed", ("white space around a content stays",)),
        ("dated", ("the date stays 2025-01-01",)),
        ("thinking-removed", ("thoughts in earlier answers stay",)),
        ("role-checks", ("chats that the template refuses are answered",)),
        (
            "last-question-only",
            ("chats of several turns differ", "chats with a system message differ"),
        ),
    ],
)
def test_the_nearest_template_says_what_differs(name: str, differences: tuple[str, ...]) -> None:
    model = describe_chat(carry(templates.read(name)), 512)
    assert model.differences == differences
    text = write_modelfile(model)
    assert text.count("# The nearest to the model's chat template: ") == len(differences)
    assert read_modelfile(text, "Modelfile").template == model.template


def test_turns_are_those_of_chatml_where_a_template_shows_none() -> None:
    model = describe_chat(carry("{% for m in messages %}{{ m.content * 2 }}{% endfor %}"), 512)
    assert model.differences == ("turns are ChatML's, not this model's",)
    found = render(model.template, MESSAGES[:1] + MESSAGES[3:])
    assert found == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_constants_that_look_like_actions_are_escaped(go_program: Path) -> None:
    chat = carry('{% for m in messages %}{{ \'{{ x }} """\' + m.content | trim }}{% endfor %}')
    template = describe_chat(chat, 512).template
    assert '"""' not in template
    assert render_in_go(go_program, template) == render(template, MESSAGES)
    assert '{{ x }} """yes' in render(template, MESSAGES)


def test_a_chat_as_a_template_renders_what_the_runner_renders() -> None:
    assert render(describe_chat(CHAT, 512).template, MESSAGES) == render_chat(CHAT, TURN)


def test_a_modelfile_is_read_back() -> None:
    model = describe_chat(CHAT, 512)
    assert read_modelfile(write_modelfile(model), "Modelfile") == model
    assert model.stops == ("<|end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")
