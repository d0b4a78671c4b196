"""Measure one artifact in its own runtime, in a process of its own: one line of JSON.

    python -m bench.quality_measure FORMAT FOLDER PROBLEM

PROBLEM is a folder of bench/quality.py: source.npz has the evaluation text's ids [texts, n] and the
source's logits [texts, n, vocab], questions.json ids of prompts and of their only right answers.
"""

import json
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import formats
from toolkit.formats import Session
from toolkit.quality.measures import compare_logits, join

ANSWER_TOKENS = 90
TIMED_ONE_IN = 12
WEIGHTS = ("model.onnx*", "openvino_model.bin", "*.safetensors", "*.gguf")
STATUS = Path("/proc/self/status")


def measure_answers(session: Session, problem: Path) -> dict[str, Any]:
    """Questions whose greedy answer is exactly right: every token of it, and a stop behind it.

    The right answer is read in one go, and every position must foresee what follows, which is what
    greedy generation needs to write it.
    """
    questions = json.loads((problem / "questions.json").read_text("utf-8"))
    right = 0
    for question in questions:
        prompt, answer = question["ids"], question["answer_ids"]
        chosen = session.logits(prompt + answer)[len(prompt) - 1 :].argmax(axis=-1).tolist()
        right += chosen[:-1] == answer and session.stops(chosen[-1])
    return {"right": right, "asked": len(questions)}


def measure_generation(session: Session, problem: Path) -> dict[str, Any]:
    """Tokens/s of some short answers, each with the reading of its prompt; memory in bytes."""
    questions = json.loads((problem / "questions.json").read_text("utf-8"))[::TIMED_ONE_IN]
    session.generate(questions[0]["ids"], 2)  # loads the weights
    started_s = time.perf_counter()
    tokens = sum(len(session.generate(one["ids"], ANSWER_TOKENS)) for one in questions)
    taken_s = time.perf_counter() - started_s
    return {"tokens_per_s": tokens / taken_s, "memory_bytes": read_peak()}


def measure_logits(session: Session, problem: Path) -> dict[str, Any]:
    """Divergence from the source, agreement and perplexities over all texts."""
    source = np.load(problem / "source.npz")
    pairs = zip(source["ids"].tolist(), source["logits"], strict=True)
    found = join([compare_logits(logits, session.logits(ids), ids) for ids, logits in pairs])
    numbers = found.summarize()
    return {
        "mean_kl": numbers["mean KL"].value,
        "kl_error": numbers["mean KL"].error,
        "top1": numbers["top-1 agreement"].value,
        "perplexity_ratio": numbers["perplexity ratio"].value,
    }


def measure_bytes(folder: Path) -> int:
    """Bytes of the files that hold weights and graph."""
    files = {path for pattern in WEIGHTS for path in folder.glob(pattern)}
    return sum(path.stat().st_size for path in files)


def read_peak() -> int:
    """Peak resident memory of this process in bytes (Linux, macOS)."""
    if STATUS.exists():  # getrusage counts the parent's memory too, from before the exec
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text("utf-8"))
        return int(found[1]) << 10 if found else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print the measures as JSON, the last line of what is printed."""
    name, folder, problem = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    session = formats.get(name).open_session(folder)
    # First, before the source's logits are there, which are no part of running it.
    measured = measure_generation(session, problem)
    measured |= measure_answers(session, problem) | measure_logits(session, problem)
    session.close()
    measured |= {"runtime": session.runtime, "weights_bytes": measure_bytes(folder)}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
