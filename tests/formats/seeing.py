"""A small checkpoint that sees, and what its NumPy forward pass makes of pictures."""

from pathlib import Path
from typing import Any

import pytest

from tests.vision_checkpoints import write_vision_checkpoint
from toolkit.artifact import Chat, Limits
from toolkit.checkpoint import Checkpoint
from toolkit.console import Console
from toolkit.decoder import Decoder
from toolkit.families import read_decoder
from toolkit.formats import Session
from toolkit.progress import ignore
from toolkit.quality import picture
from toolkit.quality.gate import FailedGateError, run_gate
from toolkit.quality.reference import CheckpointWeights, states_of_embedded
from toolkit.quality.vision import make_features
from toolkit.runner.images import Pixels
from toolkit.runner.manifest import Vision

CROPS = 6  # at most: 2 rows of 3, and 3 of 2, which an exchange of height and width would show


class Source:
    """A checkpoint that sees; its bf16 weights fit float16 but for the least of them.

    `crops` are what the checkpoint allows a picture; `vision` has CROPS all the same. `tower` as in
    write_vision_checkpoint.
    """

    def __init__(self, folder: Path, crops: int = 16, **tower: int) -> None:
        written = write_vision_checkpoint(folder, crops=crops, **tower)
        self.checkpoint = Checkpoint.open(written)
        self.decoder: Decoder = read_decoder(self.checkpoint.config)
        self.weights = CheckpointWeights(self.checkpoint, ignore)
        how = self.checkpoint.preprocessing
        self.vision = Vision(336, 12, CROPS, how.mean, how.std)

    def features(self, pixels: Pixels) -> Any:
        """Rows of the pictures: float32 [tokens, hidden]."""
        assert self.decoder.vision
        return make_features(self.weights, self.decoder.vision, pixels.values, pixels.sizes)

    def logits(self, ids: list[int], pixels: Pixels) -> Any:
        """float32 [len(ids), vocabulary]."""
        hidden = picture.embed(self.weights, self.decoder, ids, pixels)
        states = states_of_embedded(self.weights, self.decoder, hidden[None])[0]
        return self.weights.project(self.decoder.head_name, states)

    def answer(self, ids: list[int], pixels: Pixels, count: int) -> list[int]:
        """The likeliest `count` tokens behind ids, each computed anew."""
        answer: list[int] = []
        for _ in range(count):
            answer.append(int(self.logits(ids + answer, pixels)[-1].argmax()))
        return answer


def ask(pixels: Pixels, last: int = 310) -> list[int]:
    """Ids of a text with all the pictures, each part of it behind <s>, that end with `last`."""
    ids = [1, 300]
    for number, count in enumerate(pixels.counts, start=1):
        ids += [-number] * count + [1, 310 + number]
    return [*ids[:-1], last]


def expect_blame_on_pictures(
    session: Session, checkpoint: Checkpoint, decoder: Decoder, chat: Chat, limits: Limits
) -> None:
    """Run the gate, which has to fail by its picture alone, and close the session."""
    with pytest.raises(FailedGateError, match="picture: logits: the m") as error:
        run_gate(
            session, checkpoint, decoder, chat, limits, check_logits=True, smoke=None,
            console=Console(as_json=True),
        )  # fmt: skip
    session.close()
    failed = [one.name for one in error.value.quality.measures if not one.ok]
    assert failed
    assert all(name.startswith("picture: ") for name in failed)
