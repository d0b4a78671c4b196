"""Writes reference_logits.npz: what transformers computes for the random checkpoints.

Needs torch and transformers, which the project itself never installs. From the repository's root:

    PYTHON_WITH_TORCH -m tests.golden.make_reference_logits

The versions used are stored in the file. Run it again when tests/checkpoints.py or the vocabulary
of examples/tiny-phi3 changes.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.checkpoints import VARIANTS, write_random_checkpoint
from tests.golden.cases import CASES, GOLDEN, SEED, case_ids, select


def compute_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits [n, vocab] of transformers' own Phi3ForCausalLM, eager attention, float32."""
    model = transformers.Phi3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def main() -> None:
    torch.set_num_threads(1)
    arrays = {}
    with tempfile.TemporaryDirectory() as scratch:
        for variant in VARIANTS:
            folder = write_random_checkpoint(Path(scratch) / variant, variant, seed=SEED)
            for length in CASES[variant]:
                logits = compute_logits(folder, case_ids(folder, length))
                arrays[f"{variant}-{length}"] = select(logits.numpy())
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    np.savez_compressed(GOLDEN, versions=np.array(versions), **arrays)
    print(f"{GOLDEN.name}: {len(arrays)} cases, {GOLDEN.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
