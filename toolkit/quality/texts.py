"""The texts that models read here: Python's manual, or the user's own, as sequences of token ids.

Two parts that share no topic: `evaluation` is what artifacts are measured on, `calibration` what
quantizers may look at.
"""

import hashlib
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import msgspec
import numpy as np
from tokenizers import Tokenizer

from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.errors import SettingsError, UnsupportedError
from toolkit.quality import tokens as token_ids
from toolkit.quality.chat import render_turns

Part = Literal["evaluation", "calibration"]

# One topic in so many is for evaluation; examples/tiny-phi3 was trained without exactly those.
HELD_OUT_ONE_IN = 20
HEADING_CHARACTERS = 60
LEAST_TOKENS = 2  # one to read and one to foresee
# No tokenizer's tokens are longer on average; more of a plain text is not even read.
MOST_TOKEN_CHARACTERS = 64


@dataclass(frozen=True)
class Text:
    """Token ids to read, in sequences that each start anew.

    `digest` is the hex sha256 over the ids of all sequences, each behind its length.
    """

    name: str
    digest: str
    sequences: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return len(self.sequences[0])

    @property
    def count(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


def read_text(
    checkpoint: Checkpoint,
    chat: Chat,
    part: Part,
    *,
    path: Path | None = None,
    tokens: int,
    length: int,
) -> Text:
    """Return sequences of `length` ids, at most `tokens` in all; a last short one is dropped.

    At least one comes, shorter when the text, `tokens` or the checkpoint's context is. Without
    `path` they are `part` of Python's manual as chats, taken at even distances over all of it. A
    `.jsonl` file holds one chat a line, any other is plain text; of these the beginning is taken.
    SettingsError names a file, or its line, that cannot be used; CheckpointError when the tokenizer
    has ids beyond the vocabulary; ValueError when fewer than two tokens are asked for.
    """
    length = min(length, tokens, checkpoint.config.integer("max_position_embeddings"))
    if length < LEAST_TOKENS:
        raise ValueError(f"{length} tokens; allowed {LEAST_TOKENS} and more")
    tokenizer = token_ids.read_tokenizer(checkpoint)
    vocabulary = checkpoint.config.integer("vocab_size")
    token_ids.check_vocabulary(tokenizer, vocabulary, str(checkpoint.folder))
    if path is None:
        name = f"Python {platform.python_version()} manual, {part} part"
        ids = _encode(tokenizer, chat, _manual(chat, part), None)
        sequences = _spread(_cut(ids, length), tokens // length)
    else:
        name = path.name
        ids = _encode(tokenizer, chat, _own(path, chat, tokens), tokens)
        sequences = _cut(ids, length)
    if len(ids) < LEAST_TOKENS:
        raise SettingsError(
            f"{path or name}: found {len(ids)} tokens; allowed {LEAST_TOKENS} and more",
            advice="give a longer text",
        )
    return Text(name, digest_ids(sequences), sequences)


def digest_ids(sequences: Iterable[Sequence[int]]) -> str:
    """Hex sha256 over sequences of ids: each as its length and its ids, 4 bytes little-endian."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], "<u4").tobytes())
    return digest.hexdigest()


def _manual(chat: Chat, part: Part) -> Iterator[str]:
    """Topics of Python's manual, each as a chat that asks for it."""
    for name in list_topics(part):
        asked, answer = f"Explain {name} in Python.", topics[name].strip()
        yield render_turns(chat, [("user", asked), ("assistant", answer)])


def list_topics(part: Part) -> list[str]:
    """Names of a part's topics; some that repeat a paragraph of the evaluation are in neither."""
    names = sorted(topics)
    held_out = names[::HELD_OUT_ONE_IN]
    if part == "evaluation":
        return held_out
    known = set().union(*(_paragraphs(topics[name]) for name in held_out))
    return [name for name in names if not known & _paragraphs(topics[name])]


def _paragraphs(text: str) -> set[str]:
    """Paragraphs that are more than a heading."""
    parts = (part.strip() for part in text.split("\n\n"))
    return {part for part in parts if len(part) > HEADING_CHARACTERS}


def _own(path: Path, chat: Chat, tokens: int) -> Iterator[str]:
    """The user's text: chats of a .jsonl file, else the beginning of a plain text."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() == ".jsonl":
                yield from _read_chats(path, chat, stream)
            else:
                yield _read_plain(path, stream.read(tokens * MOST_TOKEN_CHARACTERS))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{path}: byte {error.object[error.start]:#04x} is not UTF-8; allowed a text in UTF-8"
        ) from error


def _read_plain(path: Path, text: str) -> str:
    if "\0" in text:
        raise SettingsError(f"{path}: found a NUL byte; allowed a text in UTF-8")
    return text


class _Message(msgspec.Struct):
    role: str
    content: str


class _Conversation(msgspec.Struct):
    messages: list[_Message]


def _read_chats(path: Path, chat: Chat, lines: Iterable[str]) -> Iterator[str]:
    """Render one chat a line; SettingsError names file and line of the first bad one."""
    decoder = msgspec.json.Decoder(_Conversation | list[_Message])
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = decoder.decode(line)
            messages = found.messages if isinstance(found, _Conversation) else found
            yield render_turns(chat, [(one.role, one.content) for one in messages])
        except (msgspec.DecodeError, UnicodeEncodeError, UnsupportedError) as error:
            raise SettingsError(
                f"{path}:{number}: {error}; allowed a chat such as "
                '{"messages": [{"role": "user", "content": "Hello"}]}'
            ) from error


def _encode(
    tokenizer: Tokenizer, chat: Chat, documents: Iterable[str], most: int | None
) -> list[int]:
    """Ids of all documents one behind the other, `most` at most, the bos token before each."""
    start = [] if chat.bos_id is None else [chat.bos_id]
    ids: list[int] = []
    for document in documents:
        if document:
            ids += start + token_ids.encode(tokenizer, document)
        if most is not None and len(ids) >= most:
            break
    return ids[:most]


def _cut(ids: Sequence[int], length: int) -> tuple[tuple[int, ...], ...]:
    """Sequences of `length`; the rest is dropped unless it is all there is."""
    count = max(1, len(ids) // length)
    return tuple(tuple(ids[i * length : (i + 1) * length]) for i in range(count))


def _spread(sequences: tuple[tuple[int, ...], ...], count: int) -> tuple[tuple[int, ...], ...]:
    """`count` of the sequences, at even distances; all when there are fewer."""
    count = min(count, len(sequences))
    return tuple(sequences[i * len(sequences) // count] for i in range(count))
