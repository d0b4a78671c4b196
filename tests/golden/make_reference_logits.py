"""Writes reference_logits.npz and published_logits.npz: what transformers computes for the random
checkpoints, and for those with the published contexts and windows.

Needs torch and transformers, which the project itself never installs. From the repository's root:

    PYTHON_WITH_TORCH -m tests.golden.make_reference_logits

The versions used are stored in the files. Run it again when tests/checkpoints.py or the vocabulary
of examples/tiny-phi3 changes.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.checkpoints import VARIANTS, write_random_checkpoint
from tests.formats import published
from tests.golden.cases import CASES, GOLDEN, SEED, case_ids, select


def compute_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits [n, vocab] of transformers' own Phi3ForCausalLM, eager attention, float32."""
    model = transformers.Phi3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def record(folder: Path, name: str, lengths: tuple[int, ...]) -> dict[str, NDArray[np.float32]]:
    """The kept part of the logits after texts of these lengths."""
    return {
        f"{name}-{length}": select(compute_logits(folder, case_ids(folder, length)).numpy())
        for length in lengths
    }


def write(path: Path, arrays: dict[str, NDArray[np.float32]]) -> None:
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    np.savez_compressed(path, versions=np.array(versions), **arrays)  # type: ignore[arg-type]
    print(f"{path.name}: {len(arrays)} cases, {path.stat().st_size} bytes, {versions}")


def main() -> None:
    torch.set_num_threads(1)
    arrays: dict[str, NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for variant in VARIANTS:
            folder = write_random_checkpoint(Path(scratch) / variant, variant, seed=SEED)
            arrays |= record(folder, variant, CASES[variant])
        write(GOLDEN, arrays)
        arrays = {}
        for shape in published.SHAPES:
            folder = published.write_published(Path(scratch) / shape, shape)
            arrays |= record(folder, shape, published.LENGTHS[shape])
        write(published.GOLDEN, arrays)


if __name__ == "__main__":
    main()
