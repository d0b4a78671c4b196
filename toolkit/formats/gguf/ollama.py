"""What Ollama is told of a GGUF artifact: template, stops, context; as a Modelfile or as data.

The Modelfile beside the GGUF file is the one place where they stand: `ollama create NAME -f
Modelfile` takes it as it is, and toolkit/ollama.py reads it back for Ollama's API.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.errors import ArtifactError
from toolkit.formats.gguf.layout import DATA_FILE
from toolkit.formats.gguf.nearest import END, START, Pairs, find_pairs
from toolkit.formats.gguf.nearest import ROLES as PAIR_ROLES
from toolkit.formats.gguf.stripping import texts_to_strip
from toolkit.formats.gguf.vocabulary import Token
from toolkit.runner.chat import strip_text

MODELFILE = "Modelfile"
TURNS = "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
TEMPLATE = re.compile(r'^TEMPLATE """(.*?)"""$', re.MULTILINE | re.DOTALL)
STOP = re.compile(r'^PARAMETER stop "(.*)"$', re.MULTILINE)
CONTEXT = re.compile(r"^PARAMETER num_ctx (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class OllamaModel:
    """A Go template over .Messages, the texts that end an answer, and the context in tokens.

    `differences` are what the template does otherwise than the checkpoint's, for people.
    """

    template: str
    stops: tuple[str, ...]
    context_length: int
    differences: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict[str, object]:
        """The parameters as POST /api/create takes them."""
        return {"stop": list(self.stops), "num_ctx": self.context_length}


def describe_model(
    checkpoint: Checkpoint, tokens: Sequence[Token], context_length: int
) -> OllamaModel:
    """Phi-3's turns, a stop for each role and stop id, the context."""
    texts = {tokens[token_id].text: None for token_id in checkpoint.stop_ids}
    strippers = texts_to_strip(tokens)
    turns = TURNS.replace("\n", "") if {*ROLES, "<|end|>"} <= {*strippers} else TURNS
    template = strip_text(turns, strippers)
    return OllamaModel(template, _list_stops(list(texts)), context_length)


def describe_chat(chat: Chat, context_length: int) -> OllamaModel:
    """The same of a manifest's chat; of a template that is carried, the nearest Go template."""
    stops = _list_stops(chat.stop_texts)
    if chat.template is None:
        template = _write_template(chat.turns, chat.generation)
        return OllamaModel(template, stops, context_length)
    pairs = find_pairs(chat)
    return OllamaModel(_write_pairs(pairs), stops, context_length, pairs.differences)


def has_phi3_turns(chat: Chat) -> bool:
    """Whether a chat is written as Phi-3's: as TURNS, which a built Modelfile has, writes it.

    A whole chat tells, for templates differ in whose turn they count the next one's start to.
    """
    others = [role for role in chat.turns if role not in ("user", "assistant")]
    roles = [*others, "user", "assistant", "user"]
    own = "".join(f"<|{role}|>{role}<|end|>" for role in roles) + "<|assistant|>"
    found = "".join(role.join(chat.turns.get(role, ())) for role in roles) + chat.generation
    return "".join(found.split()) == own


def write_modelfile(model: OllamaModel) -> str:
    """The Modelfile's text, for a GGUF file that lies beside it."""
    lines = [
        f"FROM ./{DATA_FILE}",
        *(f"# The nearest to the model's chat template: {one}." for one in model.differences),
        f'TEMPLATE """{model.template}"""',
        *(f'PARAMETER stop "{text}"' for text in model.stops),
        f"PARAMETER num_ctx {model.context_length}",
    ]
    return "\n".join(lines) + "\n"


def read_modelfile(text: str, where: str) -> OllamaModel:
    """What `write_modelfile` wrote; ArtifactError, naming `where`, when a part is missing."""
    template, context = TEMPLATE.search(text), CONTEXT.search(text)
    stops = tuple(STOP.findall(text))
    for name, found in (("TEMPLATE", template), ("stop", stops), ("num_ctx", context)):
        if not found:
            raise ArtifactError(
                f"{where}: no {name}; allowed a Modelfile as phiship writes it",
                advice="build the artifact again",
            )
    assert template and context
    return OllamaModel(template[1], stops, int(context[1]))


def _list_stops(texts: Sequence[str]) -> tuple[str, ...]:
    return (*texts, *(role for role in ROLES if role not in texts))


def _write_template(turns: Mapping[str, tuple[str, str]], generation: str) -> str:
    """A branch for each role."""
    branches = {
        role: f"{_escape(before)}{{{{ .Content }}}}{_escape(after)}"
        for role, (before, after) in turns.items()
    }
    return (
        f"{{{{ range .Messages }}}}{_choose('.Role', branches)}{{{{ end }}}}{_escape(generation)}"
    )


def _write_pairs(pairs: Pairs) -> str:
    """Branches for a message's role, and in each for the role before it."""

    def write(role: str) -> str:
        return _choose("$last", {a: _escape(pairs.find(a, role)) for a in (START, *PAIR_ROLES)})

    branches = {role: write(role) for role in PAIR_ROLES}
    return (
        '{{ $last := "" }}{{ range .Messages }}'
        f"{_choose('.Role', branches)}{{{{ .Content }}}}{{{{ $last = .Role }}}}{{{{ end }}}}"
        f"{write(END)}"
    )


def _choose(value: str, branches: Mapping[str, str]) -> str:
    """What stands for a value: the text itself where it is the same for all."""
    if len(set(branches.values())) == 1:
        return next(iter(branches.values()))
    keyword, parts = "if", []
    for name, text in branches.items():
        parts.append(f'{{{{ {keyword} eq {value} "{name}" }}}}{text}')
        keyword = "else if"
    return f"{''.join(parts)}{{{{ end }}}}"


def _escape(text: str) -> str:
    """A constant that looks neither like one of Go's actions nor like the end of a Modelfile's."""
    text = text.replace("{{", '{{ "{{" }}')
    return text.replace('"""', '{{ "\\"\\"\\"" }}')
