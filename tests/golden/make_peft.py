"""Writes peft.npz: logits of transformers' Llama with adapters of tests/peft_adapters.py.

PEFT has merged them, but where merging is not what was trained (Case.is_unmerged). Needs torch,
transformers and peft, which the project itself never installs. From the repository's root:

    PYTHON_WITH_PEFT -m tests.golden.make_peft
"""

import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

from tests.golden.cases import PEFT_GOLDEN as GOLDEN
from tests.golden.cases import peft_ids, select
from tests.peft_adapters import CASES, MORE_TOKENS, write_base, write_case


def compute_logits(folder: Path, adapter: Path, case: str) -> np.ndarray:
    """Logits [n, vocab] of the model with the adapter, eager attention, float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if CASES[case].is_resized:
        model.resize_token_embeddings(model.config.vocab_size + MORE_TOKENS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys")
        warnings.filterwarnings("error", message=".*unexpected keys")
        loaded = peft.PeftModel.from_pretrained(model, adapter).eval()
    if not CASES[case].is_unmerged:
        loaded = loaded.merge_and_unload()
    with torch.no_grad():
        return loaded(input_ids=torch.tensor([peft_ids(case)])).logits[0].numpy()


def main() -> None:
    torch.set_num_threads(1)
    arrays = {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            folder = write_base(Path(scratch) / f"{case}-base", case)
            adapter = write_case(Path(scratch) / case, case, base_model_name_or_path=str(folder))
            arrays[case] = select(compute_logits(folder, adapter, case))
    modules = (peft, transformers, torch)
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
    np.savez_compressed(GOLDEN, versions=np.array(versions), **arrays)
    print(f"{GOLDEN.name}: {len(arrays)} cases, {GOLDEN.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
