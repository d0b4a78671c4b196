"""Token ids: the artifact's tokenizer must give exactly what the source tokenizer gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from toolkit.artifact import BUILD_TIME, Chat
from toolkit.checkpoint.probes import PLAIN_PROBES as PLAIN_PROBES
from toolkit.checkpoint.probes import PROBES as PROBES
from toolkit.checkpoint.tokenizer import encode as encode
from toolkit.checkpoint.tokenizer import read_tokenizer as read_tokenizer
from toolkit.errors import CheckpointError
from toolkit.runner.chat import render_chat
from toolkit.runner.failure import Failure

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
    opened = _list_chats(chat, (*PROBES, *specials))
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


def _list_chats(chat: Chat, texts: Sequence[str]) -> list[str]:
    """For each text a chat in which every role says it, open for an answer.

    Roles and texts that the template refuses are left out.
    """
    orders = (
        [role for role in ("system", "user", "assistant", "user") if role in chat.roles],
        ["user", "assistant", "user"],
        ["user"],
    )
    for roles in orders:
        if found := [text for one in texts for text in _converse(chat, roles, one)]:
            return found
    return []


def _converse(chat: Chat, roles: Sequence[str], text: str) -> list[str]:
    """A chat in which these roles say `text`; none when the template refuses it."""
    try:
        return [render_chat(chat, [(role, text) for role in roles], now=BUILD_TIME)]
    except Failure:
        return []


def _shorten(ids: Sequence[int]) -> str:
    shown = ", ".join(map(str, ids[:SHOWN_IDS]))
    return f"[{shown}{', ...' if len(ids) > SHOWN_IDS else ''}]"
