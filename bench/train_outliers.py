"""Train a larger Phi-3 than examples/tiny-phi3 with real outlier channels, and prove them.

    PYTHON bench/train_outliers.py --out FOLDER               # about 25 minutes on one thread
    PYTHON bench/train_outliers.py --out FOLDER --evaluate    # measures what is there

PYTHON is one with torch, transformers and sentencepiece (examples/tiny-phi3/train.py says how to
make it). The text, questions and tokenizer are those of examples/tiny-phi3. The outliers are put
into the start, not into the result: every norm's gains are log-normal with a few channels far out,
a few channels of the residual stream are massive, a few neurons fire far harder than the others.
Nothing decays the gains, so training lives with them, and what it makes of them is printed:
for the inputs of every matrix max |x| and the largest channel's mean |x| over the median channel's,
and the kurtosis; beside the same of examples/tiny-phi3.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, Phi3ForCausalLM

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-phi3"
sys.path.insert(0, str(EXAMPLE))

import train as example  # noqa: E402
from corpus import Corpus, manual_topics  # noqa: E402
from evaluate import print_answers, text_perplexity  # noqa: E402
from questions import held_out_questions  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

SEED = 6
STEPS = 1000
# Rows of multiples of 256, which llama.cpp's K-quants need. Twice the intermediate size must not be
# the vocabulary's: onnxruntime-genai's builder takes every matrix of that many rows for the head.
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1280,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
}
# Large gains make the same step of a weight a larger step of the output.
LEARNING_RATE_OF_EXAMPLE = 0.25
GAIN_SIGMA = 1.0
OUTLIER_GAINS = (20.0, 22.0, 25.0, 28.0, 30.0)
MASSIVE_CHANNELS, MASSIVE_FACTOR = 4, 25.0
LOUD_NEURONS, LOUD_FACTOR = 8, 5.0
SAVE_EVERY_STEPS = 200
PROBE_TOKENS = 512
MATRICES = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip


def write_settings(folder: Path) -> None:
    """Writes everything but the weights: the example's tokenizer, a config of other sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(EXAMPLE / name, folder / name)
    example.write_json(folder / "config.json", example.describe_config() | SIZES)
    example.write_json(folder / "generation_config.json", example.describe_generation())


@torch.no_grad()
def add_outliers(model: Phi3ForCausalLM, generator: torch.Generator) -> None:
    """Gives a fresh model its outlier channels: gains, residual stream, neurons."""

    def choose(count: int, width: int) -> torch.Tensor:
        return torch.randperm(width, generator=generator)[:count]

    hidden = model.config.hidden_size
    gained, massive = choose(len(OUTLIER_GAINS), hidden), choose(MASSIVE_CHANNELS, hidden)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.copy_((GAIN_SIGMA * torch.randn(hidden, generator=generator)).exp())
            weight[gained] = torch.tensor(OUTLIER_GAINS)
        elif name.endswith("embed_tokens.weight"):
            weight[:, massive] *= MASSIVE_FACTOR
        elif name.endswith("down_proj.weight"):
            weight[massive] *= MASSIVE_FACTOR / 5
        elif name.endswith("gate_up_proj.weight"):
            half = len(weight) // 2
            loud = choose(LOUD_NEURONS, half)
            weight[torch.cat([loud, loud + half])] *= LOUD_FACTOR


def train(folder: Path, steps: int) -> None:
    """Trains a fresh model on the settings in `folder`, in float32, and saves it as it goes."""
    torch.manual_seed(SEED)
    model = Phi3ForCausalLM(AutoConfig.from_pretrained(folder, dtype=torch.float32)).float()
    add_outliers(model, torch.Generator().manual_seed(SEED))
    print(f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {steps} steps")
    corpus = Corpus(Tokenizer.from_file(str(folder / "tokenizer.json")), SEED)
    optimizer = example.make_optimizer(model)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE_OF_EXAMPLE * example.learning_rate(step, steps)
        shape = example.ROW_SHAPES[step % len(example.ROW_SHAPES)]
        loss = example.weighted_loss(model, corpus, *shape)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            elapsed_s = time.monotonic() - started
            print(f"step {step:4d}  loss {loss.item():.4f}  {elapsed_s:4.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY_STEPS == 0:
            example.write_weights(folder, model)
    example.write_weights(folder, model)


def load(folder: Path) -> Phi3ForCausalLM:
    """The bfloat16 weights of a checkpoint, to compute with in float32."""
    model = Phi3ForCausalLM(AutoConfig.from_pretrained(folder, dtype=torch.float32)).float()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


@contextmanager
def recorded_inputs(model: Phi3ForCausalLM) -> Iterator[dict[str, torch.Tensor]]:
    """While open, the inputs of every matrix, [tokens, channels], by the module's name."""
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        return lambda _, given: inputs.__setitem__(name, given[0].detach().flatten(0, -2))

    hooks = [
        module.register_forward_pre_hook(keep(name))
        for name, module in model.named_modules()
        if name.endswith(MATRICES)
    ]
    yield inputs
    for hook in hooks:
        hook.remove()


def measure_outliers(states: torch.Tensor) -> tuple[float, float, float]:
    """Of [tokens, channels]: max |x| and the largest channel's mean |x|, both over the median of
    the channels' mean |x|; and the kurtosis of all values (a normal distribution has 3)."""
    channels = states.abs().mean(dim=0)
    typical = channels.median()
    spread = states - states.mean()
    kurtosis = (spread**4).mean() / (spread**2).mean() ** 2
    return (
        (states.abs().max() / typical).item(), (channels.max() / typical).item(), kurtosis.item()
    )  # fmt: skip


def print_outliers(folder: Path) -> None:
    """One line for every matrix: how far its inputs' outliers lie out, on held-out text."""
    model = load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode("".join(manual_topics()[1]), add_special_tokens=False).ids
    with recorded_inputs(model) as inputs, torch.inference_mode():
        model(input_ids=torch.tensor([[1, *ids[: PROBE_TOKENS - 1]]]))
    print(f"{folder.name}: max |x|, largest channel (both of the median channel's), kurtosis")
    for name, states in inputs.items():
        highest, channel, kurtosis = measure_outliers(states)
        print(f"  {name:38s} {highest:8.0f} {channel:8.1f} {kurtosis:9.0f}")


def print_evaluation(folder: Path) -> None:
    """The outliers beside those of the example, exact answers and perplexity on held-out text."""
    for checkpoint in (EXAMPLE, folder):
        print_outliers(checkpoint)
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    print_answers(model, tokenizer, "held-out questions", held_out_questions())
    print(f"held-out manual text: perplexity {text_perplexity(model, tokenizer):.1f} a token")


def main() -> None:
    """Trains and measures, or only measures, the checkpoint in --out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--evaluate", action="store_true", help="measure only; train nothing")
    options = parser.parse_args()
    torch.set_num_threads(example.THREADS)
    torch.use_deterministic_algorithms(True)
    if not options.evaluate:
        write_settings(options.out)
        train(options.out, options.steps)
    print_evaluation(options.out)


if __name__ == "__main__":
    main()
