"""What small_logits.npz holds: which checkpoints, which lengths, which of the logits."""

from pathlib import Path

GOLDEN = Path(__file__).with_name("small_logits.npz")
SEED = 3

# Sparse from the 33rd token on (wide_stride: the 17th); LongRoPE switches after 64 tokens.
CASES: dict[str, tuple[int, ...]] = {
    "8k": (1, 32, 33, 200),
    "128k": (64, 65, 150),
    "homo": (150,),
    "wide_stride": (150,),
}
