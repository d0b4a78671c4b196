"""A chat template that an artifact carries, in every engine, on a device and in the server."""

import importlib.metadata
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from tests.conftest import EXAMPLE, RECIPES
from tests.deploy.wheelhouse import find_pip, make_wheel, serve, use_index
from tests.exports.go_template import render as render_go
from tests.quality.sources import edit_json
from tests.serving.running import Server, serving
from toolkit import catalog
from toolkit.adopt import Wish, adopt
from toolkit.artifact import read_manifest
from toolkit.build import build
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.deploy import deploy
from toolkit.device import Device
from toolkit.errors import CheckpointError, PreflightError, UnsupportedError
from toolkit.formats.gguf.ollama import write_modelfile
from toolkit.formats.gguf.stripping import unwrap_template
from toolkit.howto import write_howto
from toolkit.job import Options
from toolkit.ollama import read_model
from toolkit.quality.chat import render
from toolkit.remote import read_status
from toolkit.report import Report
from toolkit.runner.answer import Answer, Question, encode_chat, stream_answer
from toolkit.runner.loading import loading
from toolkit.runner.settings import Settings

# As the example's own, but for a default system message where none of the roles of its training
# is in the way, contents that are trimmed, a check, and a fault that only some chats show.
TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}
{{- raise_exception('A system message has to come first.') }}
{%- endif %}
{%- if message.content == 'fail' %}{{ nothing.at.all }}{% endif %}
{%- if message.content == 'grow' %}{{ 'x' * 10 ** 9 * messages | length }}{% endif %}
{{- '<|' + message.role + '|>\\n' + message.content | trim + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
FRANCE = "  What is the capital of France?\n"
CHATS = (
    [("user", FRANCE)],
    [("system", " Be brief. "), ("user", "  Hi\n"), ("assistant", " Hello \n"), ("user", FRANCE)],
)
MESSAGES = [{"role": "user", "content": FRANCE}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with a template that is carried."""
    folder = tmp_path_factory.mktemp("carrying") / "source"
    shutil.copytree(EXAMPLE, folder)
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(chat_template=TEMPLATE))
    return folder


@pytest.fixture(scope="module")
def carrying(source: Path) -> "Carrying":
    return Carrying(source)


class Carrying(dict[str, Path]):
    """Artifacts of it by format, built when first asked for."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        self.source = source

    def __missing__(self, kind: str) -> Path:
        recipe = catalog.load_recipe(RECIPES[kind])
        checkpoint, out = Checkpoint.open(self.source), self.source.parent
        self[kind] = build(recipe, checkpoint, out, Options(), Console(), Report(recipe.name))
        return self[kind]


def run_runner(artifact: Path, *words: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    first, *rest = words
    command = [sys.executable, "-m", "toolkit.runner", first, "--artifact", str(artifact), *rest]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", RECIPES)
def test_every_engine_has_the_ids_of_the_source(kind: str, carrying: Carrying) -> None:
    from transformers import AutoTokenizer

    artifact = carrying[kind]
    manifest = read_manifest(artifact)
    assert manifest.chat.template is not None
    assert manifest.chat.turns == {}
    assert manifest.runtime.companions == ("jinja2>=3.1.6",)
    assert any("renders the chat template with jinja2" in note for note in manifest.notes)
    assert manifest.quality.checked
    there = AutoTokenizer.from_pretrained(carrying.source)
    tokenizer = Tokenizer.from_file(str(carrying.source / "tokenizer.json"))
    with loading(artifact, Settings(512)) as loaded:
        for messages in CHATS:
            dicts = [{"role": role, "content": text} for role, text in messages]
            text = there.apply_chat_template(dicts, add_generation_prompt=True, tokenize=False)
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert encode_chat(loaded, messages) == expected
        question = Question(encode_chat(loaded, CHATS[0]), 24)
        assert "Paris" in "".join(stream_answer(loaded, question, Answer()))


@pytest.fixture(scope="module")
def server(carrying: Carrying) -> Iterator[Server]:
    with serving(carrying["gguf"]) as one:
        yield one


def test_the_server_answers(server: Server) -> None:
    assert "Paris" in server.chat(FRANCE, max_tokens=24).text
    developer = [{"role": "developer", "content": "Be brief."}, *MESSAGES]
    reply = server.ask("POST", "/v1/chat/completions", {"messages": developer, "max_tokens": 2})
    assert reply.status == 200


@pytest.mark.parametrize("streams", [False, True])
def test_what_the_template_refuses_is_a_400_in_its_words(server: Server, streams: bool) -> None:
    system = {"role": "system", "content": "Be brief."}
    body = {"messages": [*MESSAGES, system, *MESSAGES], "stream": streams}
    reply = server.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 400
    message = "the model's chat template refuses this chat: A system message has to come first."
    assert (reply.error["message"], reply.error["param"]) == (message, "messages")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("fail", "fails on this chat: UndefinedError: 'nothing' is undefined"),
        ("grow", "needs more than 256 MiB of memory"),
    ],
)
def test_a_template_that_fails_on_a_request_is_a_400(
    server: Server, content: str, said: str
) -> None:
    reply = server.chat(content)
    assert (reply.status, reply.error["message"]) == (400, f"the model's chat template {said}")
    assert server.chat("Hello", max_tokens=1).status == 200
    assert server.ask("GET", "/health").json == {"status": "ok"}
    assert not [line for line in server.log if "Traceback" in line or "engine failed" in line]


def test_the_terminal_says_it_in_one_sentence(carrying: Carrying) -> None:
    done = run_runner(carrying["gguf"], "chat", "--threads", "1", stdin=f"fail\n{FRANCE.strip()}\n")
    assert done.returncode == 0
    assert "error: the model's chat template fails on this chat: UndefinedError" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Paris" in done.stdout


def test_a_template_that_is_not_carried_starts_no_jinja2(artifacts: dict[str, Path]) -> None:
    program = (
        "import sys\nfrom toolkit.runner.cli import main\n"
        f"main(['generate', '--artifact', {str(artifacts['gguf'])!r}, '--prompt', 'Hi', "
        "'--max-tokens', '1', '--threads', '1'])\n"
        "print(sorted({'jinja2', 'toolkit.runner.template'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.endswith("[]\n"), done.stderr


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A device's Python that has nothing but the standard library."""
    folder = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder


def test_jinja2_that_is_missing_on_the_device_is_named(
    board: Device, bare_python: Path, carrying: Carrying, console: Console
) -> None:
    """The engine is there and jinja2 is not; nothing may be brought."""
    packages = next(bare_python.glob("lib/python*/site-packages"))
    for found in find_packages("xllamacpp"):
        (packages / found.name).symlink_to(found)
    python = str(bare_python / "bin" / "python")
    device = msgspec.structs.replace(board, python=python, runtime="device")
    with pytest.raises(
        PreflightError, match=r"jinja2>=3\.1\.6, which this artifact needs"
    ) as caught:
        deploy(carrying["gguf"], device, console)
    assert "pip install 'jinja2>=3.1.6'" in caught.value.advice
    done = subprocess.run(
        [python, "-m", "toolkit.runner", "info", "--artifact", str(carrying["gguf"]), "--json"],
        capture_output=True, text=True, env={"PYTHONPATH": str(EXAMPLE.parents[1])},
    )  # fmt: skip
    assert "jinja2 cannot be imported" in json.loads(done.stdout)["error"]["message"]


def test_jinja2_is_pushed_with_the_engine(
    board: Device,
    bare_python: Path,
    carrying: Carrying,
    console: Console,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real wheels of jinja2 and markupsafe; the engine's loads the one that is installed here."""
    wheels = tmp_path / "wheels"
    version = read_manifest(carrying["gguf"]).runtime.version
    real, *_ = find_packages("xllamacpp")
    code = (
        f"__path__.append({str(real)!r})\n"
        f"exec(compile(open({str(real / '__init__.py')!r}).read(), 'x', 'exec'))\n"
        f"__version__ = {version!r}\n"
    )
    make_wheel(wheels, "xllamacpp", version, code=code)
    shutil.copy(find_pip(), wheels)
    for name in ("jinja2", "markupsafe"):
        repack(name, wheels)
    python = str(bare_python / "bin" / "python")
    device = msgspec.structs.replace(board, python=python, runtime="auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report = Report("deploy")
    with serve(wheels) as index:
        use_index(monkeypatch, index.url)
        deploy(carrying["gguf"], device, console, report=report)
    steps = {step.name: step.measured for step in report.steps}
    assert "3 wheels and pip" in steps["runtime"] or "installed" in steps["runtime"], steps
    assert "Paris" in steps["health"]
    assert read_status(device).runtimes


def find_packages(name: str) -> list[Path]:
    """The folders of an installed package: the module's and that of its metadata."""
    found = importlib.metadata.distribution(name)
    tops = {path.parts[0] for path in found.files or () if path.parts[0] != ".."}
    return [Path(str(found.locate_file(top))) for top in sorted(tops, key=len)]


def repack(name: str, folder: Path) -> None:
    """Make a wheel of what is installed."""
    found = importlib.metadata.distribution(name)
    lines = (found.read_text("WHEEL") or "").splitlines()
    tag = next(line.partition(": ")[2] for line in lines if line.startswith("Tag"))
    proper = found.metadata["Name"].replace("-", "_")
    with zipfile.ZipFile(folder / f"{proper}-{found.version}-{tag}.whl", "w") as archive:
        for path in found.files or ():
            if path.suffix != ".pyc" and path.name not in ("INSTALLER", "REQUESTED"):
                archive.write(Path(str(found.locate_file(path))), str(path))


def test_the_gate_and_its_texts_do_not_depend_on_the_day(source: Path) -> None:
    chat = read_manifest(source.parent / RECIPES["gguf"]).chat
    assert chat.template
    dated = msgspec.structs.replace(chat.template, text="{{ strftime_now('%Y') }}")
    assert render(msgspec.structs.replace(chat, template=dated), [("user", "x")]) == "2025"


def test_gguf_keeps_the_original_template(carrying: Carrying) -> None:
    from gguf import GGUFReader

    field = GGUFReader(carrying["gguf"] / "model.gguf").fields["tokenizer.chat_template"]
    assert unwrap_template(str(field.contents())) == TEMPLATE


def test_ollama_gets_the_nearest_template_and_a_note(carrying: Carrying) -> None:
    artifact = carrying["gguf"]
    manifest = read_manifest(artifact)
    model = read_model(artifact, manifest)
    differences = (
        "white space around a content stays", "chats that the template refuses are answered",
    )  # fmt: skip
    assert model.differences == differences
    text = (artifact / "Modelfile").read_text("utf-8")
    assert text == write_modelfile(model)
    assert any(", ".join(differences) in note for note in manifest.notes)
    chat = [{"role": role, "content": content.strip()} for role, content in CHATS[1]]
    assert render_go(model.template, chat) == render(manifest.chat, CHATS[1])


@pytest.mark.parametrize("kind", ["gguf", "mlx"])
def test_an_artifact_made_elsewhere_carries_its_template(
    kind: str, carrying: Carrying, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(carrying[kind], tmp_path / "found"))
    sealed = read_manifest(folder)
    (folder / "manifest.json").unlink()
    path = folder / "model.gguf" if kind == "gguf" else folder
    adopted = adopt(path, tmp_path / "out", Wish(), Console(), Report("adopt"))
    manifest = read_manifest(adopted)
    assert manifest.runtime.companions == ("jinja2>=3.1.6",)
    tokenizer = Tokenizer.from_file(str(carrying.source / "tokenizer.json"))
    for messages in CHATS:
        texts = [render(one.chat, messages) for one in (sealed, manifest)]
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        assert ids[0] == ids[1]


def test_an_apps_page_has_the_prompt_of_one_question(carrying: Carrying) -> None:
    page = write_howto(read_manifest(carrying["onnx"]), "android")
    assert "<|user|>QUESTION<|end|><|assistant|>" in page
    assert "have to be rendered with it" in page


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[0].content * 10 ** 9 }}", "needs more than 256 MiB of memory"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "it calls itself without an end"),
        ("{{ raise_exception('Ask in French.') }}", "refuses this chat: Ask in French."),
    ],
)
def test_a_hostile_template_ends_the_build_with_a_sentence(
    source: Path, tmp_path: Path, template: str, said: str
) -> None:
    """At planning: nothing was converted, and nothing is left."""
    folder = Path(shutil.copytree(source, tmp_path / "source"))
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    recipe, out = catalog.load_recipe(RECIPES["gguf"]), tmp_path / "out"
    report = Report("build")
    with pytest.raises((CheckpointError, UnsupportedError), match=said) as caught:
        build(recipe, Checkpoint.open(folder), out, Options(), Console(), report)
    assert str(caught.value).startswith(f"{folder / 'tokenizer_config.json'}: chat_template: ")
    assert caught.value.advice
    assert [step.name for step in report.steps] == ["plan"]
    assert not out.exists() or not list(out.iterdir())
