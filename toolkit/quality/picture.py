"""A model that sees, on a question about a picture: what the gate compares beside plain text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from toolkit import artifact
from toolkit.artifact import Chat
from toolkit.checkpoint import Checkpoint
from toolkit.decoder import Decoder
from toolkit.progress import ignore
from toolkit.quality import chat as chats
from toolkit.quality import measures, reference, tokens
from toolkit.quality.measures import Comparison
from toolkit.quality.reference import Array, CheckpointWeights
from toolkit.quality.vision import make_features, place_features
from toolkit.runner.images import Pixels, cut_crops
from toolkit.runner.manifest import Vision
from toolkit.runner.pictures import PICTURE, split_pictures

GRID = (1, 2)  # rows and columns of crops: few, for the source sees them in NumPy, and not square
QUESTION = "What is shown in this picture?"
MOST_TEXT = 128  # tokens behind the picture


@dataclass(frozen=True)
class Asked:
    """Ids, below 0 where the picture stands, its pixels, and where the text behind it begins."""

    ids: list[int]
    pixels: Pixels
    first: int


class SeeingSession(Protocol):
    """What the session of a model that sees offers beside `formats.Session`."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""

    def picture_logits(self, ids: list[int], pixels: Pixels) -> Array:
        """float32 [len(ids), vocabulary]; ids below 0 stand for the pictures' rows, in order."""


def describe_vision(decoder: Decoder, checkpoint: Checkpoint) -> artifact.Vision | None:
    """What a manifest says of pictures; None for a model that reads text only."""
    if decoder.vision is None:
        return None
    how = checkpoint.preprocessing
    return artifact.Vision(
        image_size=decoder.vision.image_size, side=decoder.vision.side, crops=how.crops,
        mean=how.mean, std=how.std,
    )  # fmt: skip


def ask_probe(checkpoint: Checkpoint, decoder: Decoder, chat: Chat, answer: str) -> Asked:
    """The gate's question about a picture that is drawn by numbers, with an answer to read."""
    vision = _read_vision(decoder, checkpoint)
    pixels = cut_crops([_draw(vision)], vision)
    text = chats.render_turns(chat, [("user", f"{PICTURE}\n{QUESTION}"), ("assistant", answer)])
    ids = encode_pictures(checkpoint, chat, text, pixels.counts)
    first = len(ids) - next(place for place, token in enumerate(reversed(ids)) if token < 0)
    return Asked(ids[: first + MOST_TEXT], pixels, first)


def encode_pictures(
    checkpoint: Checkpoint, chat: Chat, text: str, counts: Sequence[int]
) -> list[int]:
    """Ids of a text with pictures as the source's processor has them, with its own tokenizer."""
    tokenizer = tokens.read_tokenizer(checkpoint)
    start = [] if chat.bos_id is None else [chat.bos_id]
    return split_pictures(text, counts, lambda part: start + tokens.encode(tokenizer, part))


def read_picture(checkpoint: Checkpoint, decoder: Decoder, asked: Asked) -> Array:
    """The source's logits after every token of the text behind the picture: float32 [n, vocab]."""
    weights = CheckpointWeights(checkpoint, ignore)
    states = embed(weights, decoder, asked.ids, asked.pixels)
    states = reference.states_of_embedded(weights, decoder, states[None])[0]
    return weights.project(decoder.head_name, states[asked.first :])


def embed(weights: reference.Weights, decoder: Decoder, ids: list[int], pixels: Pixels) -> Array:
    """What the first layer sees of ids and pictures: float32 [len(ids), hidden]."""
    if decoder.vision is None:
        raise ValueError("this model reads no pictures")
    hidden = weights.look_up(decoder.names.embedding, [max(0, token) for token in ids])
    features = make_features(weights, decoder.vision, pixels.values, pixels.sizes)
    place_features(hidden, ids, features)
    return hidden


def compare_picture(
    session: SeeingSession, checkpoint: Checkpoint, decoder: Decoder, asked: Asked
) -> Comparison:
    """Compare logits behind the picture; ValueError names what cannot be compared."""
    source, rows = read_picture(checkpoint, decoder, asked), slice(asked.first, len(asked.ids))
    found = session.picture_logits(asked.ids, asked.pixels)
    if found.shape != (len(asked.ids), decoder.vocab):
        raise ValueError(
            f"logits of {len(asked.ids)} tokens with a picture: the source's are "
            f"{[len(asked.ids), decoder.vocab]}, the artifact's {list(found.shape)}"
        )
    return measures.compare_logits(source, found[rows], asked.ids[rows], None)


def _read_vision(decoder: Decoder, checkpoint: Checkpoint) -> Vision:
    found = describe_vision(decoder, checkpoint)
    if found is None:
        raise ValueError("this model reads no pictures")
    return Vision(found.image_size, found.side, found.crops, found.mean, found.std)


def _draw(vision: Vision) -> Any:
    """A normalized picture, as smooth as a photograph: float32 [3, height, width]."""
    rows, columns = GRID
    y, x = np.mgrid[0 : rows * vision.image_size, 0 : columns * vision.image_size]
    waves = np.sin(x / 31), np.cos((x + 2 * y) / 53), np.sin(y / 17) * np.cos(x / 97)
    return np.stack(waves).astype(np.float32)
