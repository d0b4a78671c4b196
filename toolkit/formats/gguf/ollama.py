"""A Modelfile beside the GGUF file: `ollama create NAME -f Modelfile` takes it as it is."""

from collections.abc import Sequence

from toolkit.checkpoint import Checkpoint
from toolkit.formats.gguf.layout import DATA_FILE
from toolkit.formats.gguf.stripping import strip_text, texts_to_strip
from toolkit.formats.gguf.vocabulary import Token

TURNS = "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n"
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")


def write_modelfile(checkpoint: Checkpoint, tokens: Sequence[Token], context_length: int) -> str:
    """The Modelfile's text: Phi-3's turns, a stop for each role and stop id, the context."""
    texts = {tokens[token_id].text: None for token_id in checkpoint.stop_ids}
    stops = [*texts, *(role for role in ROLES if role not in texts)]
    lines = [
        f"FROM ./{DATA_FILE}",
        f'TEMPLATE """{strip_text(TURNS, texts_to_strip(tokens))}"""',
        *(f'PARAMETER stop "{text}"' for text in stops),
        f"PARAMETER num_ctx {context_length}",
    ]
    return "\n".join(lines) + "\n"
