"""Writes split_logits.npz: logits of transformers' own Llama and Mistral of random checkpoints.

Needs torch and transformers, which the project itself never installs. From the repository's root:

    PYTHON_WITH_TORCH -m tests.golden.make_split_logits
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.golden.cases import case_ids, select
from tests.golden.split_cases import CASES, GOLDEN, SEED
from tests.split_checkpoints import write_split_checkpoint


def compute_logits(folder: Path, length: int) -> np.ndarray:
    """Logits [n, vocab] of the class that transformers chooses, eager attention, float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor([case_ids(folder, length)])).logits[0].numpy()


def main() -> None:
    torch.set_num_threads(1)
    arrays = {}
    with tempfile.TemporaryDirectory() as scratch:
        for variant, lengths in CASES.items():
            folder = write_split_checkpoint(Path(scratch) / variant, variant, seed=SEED)
            for length in lengths:
                arrays[f"{variant}-{length}"] = select(compute_logits(folder, length))
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    np.savez_compressed(GOLDEN, versions=np.array(versions), **arrays)
    print(f"{GOLDEN.name}: {len(arrays)} cases, {GOLDEN.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
