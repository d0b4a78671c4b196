"""What reference_logits.npz holds: which checkpoints, which lengths, which of the logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).with_name("reference_logits.npz")
SEED = 7

# LongRoPE switches after 64 tokens, the window is 32 tokens wide.
CASES: dict[str, tuple[int, ...]] = {
    "mha": (1, 96),
    "gqa": (96,),
    "longrope": (64, 65, 200),
    "longrope_gqa": (64, 65, 256),
    "partial_rotary_tied": (96,),
    "window": (32, 33, 34, 128),
    "phi4_mini": (64, 65, 256),
}

# lora.npz: adapters of tests/adapters.py on one variant.
LORA_GOLDEN = Path(__file__).with_name("lora.npz")
LORA_VARIANT = "gqa"
LORA_LENGTH = 64

# peft.npz: adapters of tests/peft_adapters.py on the checkpoints that they say. Ids below 2,056
# are those of the tokens that a resized vocabulary has more, too.
PEFT_GOLDEN = Path(__file__).with_name("peft.npz")
PEFT_TOKENS = 2048
PEFT_MORE = 8

# The last position sees everything before it; the others show an error's onset. Every 16th column
# is enough to see any error in the hidden state, and keeps the file small.
POSITIONS = 8
COLUMN_STEP = 16


def case_ids(folder: Path, length: int) -> list[int]:
    """Seeded token ids within the vocabulary of the checkpoint in `folder`."""
    vocabulary = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    ids: list[int] = np.random.default_rng(length).integers(0, vocabulary, length).tolist()
    return ids


def peft_ids(case: str) -> list[int]:
    """Seeded token ids, with those whose rows an adapter trains, and new ones where there are."""
    vocabulary = PEFT_TOKENS + (PEFT_MORE if case == "resized" else 0)
    ids: list[int] = np.random.default_rng(len(case)).integers(0, PEFT_TOKENS, LORA_LENGTH).tolist()
    return [*ids[:-4], 3, 5, 1999, vocabulary - 1]


def select(logits: NDArray[Any]) -> NDArray[Any]:
    """The kept part of [n, vocab]: up to POSITIONS rows, spread evenly, every 16th column."""
    rows = np.unique(np.linspace(0, len(logits) - 1, POSITIONS).round().astype(int))
    return logits[rows][:, ::COLUMN_STEP]
