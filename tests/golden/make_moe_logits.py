"""Writes moe_logits.npz: what transformers computes for the random Phi-3.5-MoE checkpoint.

Needs torch and transformers, which the project itself never installs. From the repository's root:

    PYTHON_WITH_TORCH -m tests.golden.make_moe_logits

The versions used are stored in the file. Run it again when tests/moe_checkpoints.py or the
vocabulary of examples/tiny-phi3 changes.

transformers 5.23 never takes Phimoe's long factors: its rotary embedding switches to long_mscale,
but asks for frequencies without saying how long the sequence is. The published code takes both
(Phi3LongRoPEScaledRotaryEmbedding of modeling_phimoe.py), so beyond the switch transformers is
given the long factors as its short ones.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.golden.cases import case_ids, select
from tests.golden.moe_cases import CASES, GOLDEN, LEAST_GAP, SEED, smallest_gap
from tests.moe_checkpoints import write_moe_checkpoint


def main() -> None:
    torch.set_num_threads(1)
    arrays, routed = {}, []
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_moe_checkpoint(Path(scratch), seed=SEED)
        model = transformers.PhimoeForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for layer in model.model.layers:
            layer.mlp.router.register_forward_hook(
                lambda _module, _inputs, outputs: routed.append(outputs[0].numpy())
            )
        for length in CASES:
            ids = torch.tensor([case_ids(folder, length)])
            rope = model.config.rope_parameters
            if length > rope["original_max_position_embeddings"]:
                rope["short_factor"] = rope["long_factor"]
            with torch.no_grad():
                arrays[f"moe-{length}"] = select(model(ids).logits[0].numpy())
    gap = min(map(smallest_gap, routed))
    assert gap > LEAST_GAP, f"take another seed: two experts are within {gap}"
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    np.savez_compressed(GOLDEN, versions=np.array(versions), **arrays)
    print(f"{GOLDEN.name}: {len(arrays)} cases, {GOLDEN.stat().st_size} bytes, {versions}")
    print(f"the smallest gap of {sum(map(len, routed))} routings is {gap:.2g}")


if __name__ == "__main__":
    main()
