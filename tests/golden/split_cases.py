"""What split_logits.npz holds: which variants of tests/split_checkpoints.py, at which lengths."""

from pathlib import Path

GOLDEN = Path(__file__).with_name("split_logits.npz")
SEED = 7

# LongRoPE switches after 64 tokens, the window is 32 tokens wide.
CASES: dict[str, tuple[int, ...]] = {
    "llama": (96,),
    "linear": (200,),
    "llama3": (200,),
    "longrope": (64, 200),
    "window": (32, 128),
    "narrow": (96,),
}
