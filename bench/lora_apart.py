"""One ONNX int4 model three ways: without an adapter, with one merged in, with one apart.

    python bench/make_checkpoint.py --out ck --tokenizer examples/tiny-phi3 --layers 2
    python -m bench.lora_apart --checkpoint ck --work w --rank 16

The adapter is random, of every linear layer. Sizes are those of files; memory is the peak of a
build without its gate; rates are of one thread, by its processor's time, which other programs on
the machine change least: a prompt, and greedy tokens behind it, by the runner's engine, the sides
in turn, each in a process of its own; the fastest run counts.
"""

import argparse
import json
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

from bench.measure import measure_bytes, measure_command
from tests.adapters import make_adapter, write_adapter
from toolkit.artifact import read_manifest
from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.lora import read_adapter

SIDES = {"none": (), "merged": ("--adapter",), "apart": ("--adapter", "--adapter-apart")}


def make(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int) -> None:
    """Write an adapter of every linear layer."""
    write_adapter(folder, make_adapter(shapes, {"": rank}), "bf16", r=rank)


def build(side: str, options: argparse.Namespace, adapter: Path) -> str:
    """Build one side; its row as far as it goes."""
    out, words = options.work / side, list(SIDES[side])
    if words:
        words.insert(1, str(adapter))
    command = [sys.executable, "-m", "toolkit", "build", options.recipe, "--checkpoint",
               str(options.checkpoint), "--out", str(out), "--no-check", *words]  # fmt: skip
    command += ["--context", "1024", "--workers", "2"]
    log = options.work / f"{side}.log"
    cost = measure_command(command, log=log, folder=out, environment={})
    size = measure_bytes(out / options.recipe)
    return f"| {side} | {size / 1e6:.1f} MB | {cost.largest_process_bytes / 1e6:.0f} MB | "


def measure_rates(artifact: Path, prompt: int, tokens: int) -> tuple[float, float]:
    """Tokens of a prompt, and of an answer to it, by a second of one thread."""
    from toolkit.runner.engines.onnxruntime_genai import load
    from toolkit.runner.settings import Settings

    properties = read_manifest(artifact).runtime.properties
    model = load(artifact, "model.onnx", "cpu", Settings(1024, threads=1), **properties)
    ids = [5 + (7 * place * place) % 1900 for place in range(prompt)]
    for _ in model.generate(ids[:8], 2):  # warm
        pass
    start = time.process_time()
    times = [time.process_time() for _ in model.generate(ids[::-1], tokens)]
    return prompt / (times[0] - start), (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    """Build, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--recipe", default="phi-3-mini-4k-onnx-cpu-int4")
    parser.add_argument("--rates", type=Path, help=argparse.SUPPRESS)  # the process of one side
    options = parser.parse_args()
    if options.rates:
        print(json.dumps(measure_rates(options.rates, 64, 24)))
        return
    options.work.mkdir(parents=True, exist_ok=True)
    shapes = {n: info.shape for n, info in Checkpoint.open(options.checkpoint).tensors.items()}
    folder = options.work / "adapter"
    if not folder.exists():
        # Elsewhere, for what this process holds counts in the peak of those that it starts.
        maker = get_context("spawn").Process(target=make, args=(folder, shapes, options.rank))
        maker.start()
        maker.join()
    adapter = read_adapter(folder, shapes, str(options.checkpoint))
    print(f"rank {options.rank}: {adapter.weights / 1e6:.1f} million weights\n")
    rows = {side: build(side, options, folder) for side in SIDES}
    rates: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for _ in range(options.repeat):
        for side, found in rates.items():
            again = ("--rates", str(options.work / side / options.recipe))
            command = [sys.executable, "-m", "bench.lora_apart", *sys.argv[1:], *again]
            done = subprocess.run(command, check=True, capture_output=True)
            found.append(json.loads(done.stdout))
    print("| adapter | artifact | build, peak | prompt | answer |\n|---|---|---|---|---|")
    for side, row in rows.items():
        first, later = (max(one[place] for one in rates[side]) for place in (0, 1))
        print(f"{row}{first:.0f} tokens/s | {later:.1f} tokens/s |")


if __name__ == "__main__":
    main()
