"""The tokens on which the gate compares logits: the ordinary chats, cut to one length."""

from collections.abc import Sequence
from math import prod

from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.quality import tokens
from toolkit.quality.chat import render_turns
from toolkit.quality.ordinary import CHATS

MOST_LENGTH, LEAST_LENGTH = 96, 20  # tokens of a sequence
# Weights times tokens of a forward pass, where that is more than the least.
WORK = 80_000_000_000


def choose_length(decoder: Decoder) -> int:
    """Tokens of each sequence: fewer of a large model, so that the gate takes at most a minute."""
    weights = sum(map(prod, decoder.shapes().values()))
    return max(LEAST_LENGTH, min(MOST_LENGTH, WORK // weights // len(CHATS)))


def read_probe(
    checkpoint: Checkpoint, chat: Chat, decoder: Decoder, context_length: int
) -> list[list[int]]:
    """Sequences of one length, each the beginning of another chat; special tokens included.

    What the chat's template puts in front of all of them comes on top of that length: it is read,
    and not compared (`count_shared`). One place of the context stays free: runtimes want room for
    the token that would follow.
    """
    tokenizer = tokens.read_tokenizer(checkpoint)
    start = [] if chat.bos_id is None else [chat.bos_id]
    texts = [render_turns(chat, [("user", asked), ("assistant", said)]) for asked, said in CHATS]
    ids = [start + tokens.encode(tokenizer, text) for text in texts]
    length = min(count_shared(ids) + choose_length(decoder), context_length - 1, *map(len, ids))
    return [one[:length] for one in ids]


def count_shared(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens with which all sequences begin: the template's, which a model may know by heart.

    0 where that leaves fewer than half of the shortest.
    """
    shortest = min(map(len, sequences))
    differing = (i for i in range(shortest) if len({ids[i] for ids in sequences}) > 1)
    shared = next(differing, shortest)
    return shared if 2 * shared <= shortest else 0
