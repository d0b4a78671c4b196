"""Writes lora.npz: logits of transformers' Phi-3 with an adapter that PEFT has merged.

Needs torch, transformers and peft, which the project itself never installs. From the repository's
root:

    PYTHON_WITH_PEFT -m tests.golden.make_lora
"""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from tests.adapters import CASES, write_case
from tests.checkpoints import variant_config, weight_shapes, write_random_checkpoint
from tests.golden.cases import LORA_GOLDEN as GOLDEN
from tests.golden.cases import LORA_LENGTH as LENGTH
from tests.golden.cases import LORA_VARIANT as VARIANT
from tests.golden.cases import SEED, case_ids, select


def compute_logits(folder: Path, adapter: Path) -> np.ndarray:
    """Logits [n, vocab] of the merged model, eager attention, float32."""
    model = transformers.Phi3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.no_grad():
        return merged(torch.tensor([case_ids(folder, LENGTH)])).logits[0].numpy()


def main() -> None:
    torch.set_num_threads(1)
    arrays = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_random_checkpoint(Path(scratch) / VARIANT, VARIANT, seed=SEED)
        shapes = weight_shapes(variant_config(VARIANT))
        for case in CASES:
            adapter = write_case(Path(scratch) / case, case, shapes)
            arrays[case] = select(compute_logits(folder, adapter))
    modules = (peft, transformers, torch)
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    np.savez_compressed(GOLDEN, versions=np.array(versions), **arrays)
    print(f"{GOLDEN.name}: {len(arrays)} cases, {GOLDEN.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
