"""Trains the tiny Phi-3 beside this file, writes it as a Hugging Face checkpoint, measures it.

Only this script and what it imports need torch, transformers and sentencepiece; nothing else in
the project does. Make an environment of its own for them, then train (or only measure again):

    python -m venv .venv-train
    .venv-train/bin/pip install torch transformers sentencepiece protobuf
    .venv-train/bin/python examples/tiny-phi3/train.py
    .venv-train/bin/python examples/tiny-phi3/train.py --evaluate

The seeds are fixed and everything runs on one CPU thread, so a second run with the same versions
on the same kind of processor gives the same weights; other versions give slightly different ones.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus, tokenizer_sentences
from evaluate import print_evaluation
from safetensors.torch import save_file
from tokenizer import CONTEXT_TOKENS, added_token_id, write_json, write_tokenizer
from tokenizers import Tokenizer
from transformers import AutoConfig, Phi3ForCausalLM

SEED = 3
THREADS = 1
STEPS = 3000
WARMUP_STEPS = 100
PEAK_LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.1
# Short and long rows in turn: answers at the start of the context, and anywhere within it.
ROW_SHAPES = ((8, 128), (8, 128), (8, 128), (2, CONTEXT_TOKENS))
STOP_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|end|>")


def describe_config() -> dict[str, Any]:
    """The content of config.json: the keys and spellings of Phi-3-mini-4k, small sizes."""
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": added_token_id("<|endoftext|>"),
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": CONTEXT_TOKENS,
        "model_type": "phi3",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": CONTEXT_TOKENS,
        "pad_token_id": added_token_id("<|endoftext|>"),
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.2",
        "use_cache": True,
        "vocab_size": 2048,
    }


def describe_generation() -> dict[str, Any]:
    """The content of generation_config.json: several stop ids, as Phi-3-mini has."""
    return {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": [added_token_id(token) for token in STOP_TOKENS],
        "pad_token_id": added_token_id("<|endoftext|>"),
        "transformers_version": "4.40.2",
    }


def write_settings(folder: Path) -> None:
    """Writes everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, tokenizer_sentences())
    write_json(folder / "config.json", describe_config())
    write_json(folder / "generation_config.json", describe_generation())


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to a fiftieth of the peak."""
    remaining = max(0.02, 1 - step / steps)
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * remaining


def make_optimizer(model: Phi3ForCausalLM) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves the norms' gains alone."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": gains, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))


def weighted_loss(model: Phi3ForCausalLM, corpus: Corpus, rows: int, length: int) -> torch.Tensor:
    """Mean cross-entropy of the next token over one fresh batch, by the tokens' weights."""
    batch = [corpus.row(length + 1) for _ in range(rows)]
    ids = torch.tensor([row.ids for row in batch])
    weights = torch.tensor([row.weights for row in batch])[:, 1:]
    logits = model(input_ids=ids[:, :-1]).logits.float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


def train(folder: Path, steps: int) -> Phi3ForCausalLM:
    """Trains a fresh model on the tokenizer and config already in `folder`; float32."""
    torch.manual_seed(SEED)
    model = Phi3ForCausalLM(AutoConfig.from_pretrained(folder, dtype=torch.float32)).float()
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {steps} steps")
    corpus = Corpus(Tokenizer.from_file(str(folder / "tokenizer.json")), SEED)
    optimizer = make_optimizer(model)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = weighted_loss(model, corpus, *ROW_SHAPES[step % len(ROW_SHAPES)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            elapsed_s = time.monotonic() - started
            print(f"step {step:4d}  loss {loss.item():.4f}  {elapsed_s:4.0f} s", flush=True)
    return model


def write_weights(folder: Path, model: Phi3ForCausalLM) -> None:
    """Writes model.safetensors: bfloat16, the names transformers gives, no tied tensors."""
    tensors = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Trains and measures, or only measures, the checkpoint in --out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--evaluate", action="store_true", help="measure only; train nothing")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    if not options.evaluate:
        write_settings(options.out)
        write_weights(options.out, train(options.out, options.steps))
    print_evaluation(options.out)


if __name__ == "__main__":
    main()
