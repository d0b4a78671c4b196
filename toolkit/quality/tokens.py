"""Token ids: the artifact's tokenizer must give exactly what the source tokenizer gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.ranks import RANKS_FILE
from toolkit.errors import CheckpointError

PLAIN_PROBES = (
    "Hello",
    " Hello",
    "Hello, world! It's 3 o'clock; don't be late.",
    "The quick brown fox jumps over the lazy dog.",
    "ALL CAPS, mixedCase, snake_case, kebab-case",
    "0 1 12 123 1234567890 3.14159 -2e-10 0xFF 1,000,000",
    "a+b=c; x != y && z <= 2 || !w ? p : q",
    "https://example.org/path?query=1&other=%20#part user@example.org",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]} # comment\n\n\nclass A:\n\tpass\n",
    '{"key": [1, 2.5, null, true], "text": "line\\nnext"}',
    "<p class='x'>5 &lt; 6</p> <|not a token|> <s <|end| <unknown>",
)
SPACE_PROBES = (
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "two  three   four    many                end",
    "\n",
    "\n\n",
    "a\nb\n\nc\n\n\nd\r\ne",
    "\t",
    "a\tb\t\tc\n\t\td",
    " \n \t ",
)
UNICODE_PROBES = (
    "Grüße aus Köln, naïve café, Ærøskøbing, İstanbul",
    "Привет, мир! Γειά σου Κόσμε",
    "你好,世界。こんにちは世界 안녕하세요 세계",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
    "e\u0301 vs \u00e9, \ufb01ligature, \uff21\uff22, \u00bd \u2460 \u2122",
    "no\u00a0break, em\u2003space, zero\u200bwidth, line\u2028end",
    "\u201cquotes\u201d \u2018single\u2019 \u2014 dash \u2026 \u20ac \u00a3 \u221e \u2211 \u2260",
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U00020000\U0001d54f rare \u0378 \ufffd",
)
# Left out, because onnxruntime-genai 0.18 differs on them (docs/quality.md): a text that starts
# with a no-break space, and a literal U+2581.
PROBES = PLAIN_PROBES + SPACE_PROBES + UNICODE_PROBES
"""Texts without special tokens; `list_probes` adds the checkpoint's own tokens and chats."""

SHOWN_IDS = 24
HALF_CHARACTER = "\ufffd"
UTF8_BYTES = 4  # of the longest character


@dataclass(frozen=True)
class Mismatch:
    """A text whose ids differ."""

    text: str
    source: tuple[int, ...]
    artifact: tuple[int, ...]

    def __str__(self) -> str:
        """One clause for an error: the text and both lists, shortened."""
        return (
            f"{self.text!r}: the source has {_shorten(self.source)}, "
            f"the artifact {_shorten(self.artifact)}"
        )


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """Read tokenizer.json, or what stands for it; CheckpointError when it is missing or damaged."""
    path = checkpoint.tokenizer_folder / "tokenizer.json"
    if made := checkpoint.made_tokenizer:
        return Tokenizer.from_buffer(made)
    if not path.is_file():
        has_model = (checkpoint.tokenizer_folder / "tokenizer.model").is_file()
        found = "only tokenizer.model" if has_model else "no tokenizer"
        raise CheckpointError(
            f"{path}: missing; found {found}, and no {RANKS_FILE} to make it of",
            advice="make it with transformers: "
            "AutoTokenizer.from_pretrained(FOLDER, use_fast=True).save_pretrained(FOLDER)",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Source ids of `text`: special tokens parsed, nothing added in front or behind."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def split_text(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each id amid the others, special tokens shown; together they are the text.

    A space that decoders strip in front is kept. Of a character that takes several tokens the last
    one has it, the others are empty.
    """
    # Decoders strip what stands first, so something does that is not shown.
    front = encode(tokenizer, "a")
    known = len(tokenizer.decode(front))
    texts: list[str] = []
    held: list[int] = []
    for place, token in enumerate(ids, start=1):
        held.append(token)
        text = tokenizer.decode([*front, *held], skip_special_tokens=False)[known:]
        is_open = text.endswith(HALF_CHARACTER) and len(held) < UTF8_BYTES and place < len(ids)
        texts.append("" if is_open else text)
        held = held if is_open else []
    return texts


def list_probes(tokenizer: Tokenizer, chat: Chat) -> list[str]:
    """Every text to compare: PROBES, each added token alone and amid text, and chats of both."""
    specials = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items())]
    opened = [_converse(chat, text) for text in (*PROBES, *specials)]
    amid = [f"before {special} after{special}{special}\n{special}" for special in specials]
    return [*PROBES, *specials, *amid, *opened]


def compare_ids(
    encode_source: Callable[[str], list[int]],
    encode_artifact: Callable[[str], list[int]],
    texts: Sequence[str],
) -> list[Mismatch]:
    """Encode every text on both sides; returns those that differ."""
    pairs = ((text, tuple(encode_source(text)), tuple(encode_artifact(text))) for text in texts)
    return [Mismatch(text, source, found) for text, source, found in pairs if source != found]


def check_vocabulary(tokenizer: Tokenizer, vocab: int, where: str) -> None:
    """CheckpointError when the tokenizer has an id that the model's vocabulary has not."""
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values())
    if highest >= vocab:
        raise CheckpointError(
            f"{where}: tokenizer.json has id {highest} ({tokenizer.id_to_token(highest)!r}); "
            f"config.json's vocab_size allows 0 to {vocab - 1}"
        )


def _converse(chat: Chat, text: str) -> str:
    """A chat in which every role says `text`, open for an answer."""
    roles = [role for role in ("system", "user", "assistant", "user") if role in chat.turns]
    turns = [chat.turns[role][0] + text + chat.turns[role][1] for role in roles]
    return "".join(turns) + chat.generation


def _shorten(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:SHOWN_IDS]))
    return f"[{shown}{', ...' if len(ids) > SHOWN_IDS else ''}]"
