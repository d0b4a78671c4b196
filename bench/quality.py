"""Quality of one checkpoint in every format: ours against the vendors' defaults and their best.

    python -m bench.quality --checkpoint FOLDER --work FOLDER --llama-cpp FOLDER [ROW ...]

The checkpoint is one that answers the questions of examples/tiny-phi3: that one, or what
bench/train_outliers.py trains. Vendors' environments are those of `phiship vendor setup`;
--llama-cpp is a llama.cpp folder with llama-quantize and llama-imatrix in build/bin.

Every row is made, then measured in the artifact's own runtime on the same tokens: the evaluation
part of Python's manual (toolkit/quality/texts.py), against the float32 source. Whoever takes a
calibration text gets the calibration part. Results are collected in WORK/quality.jsonl, the last
one of each row counts; rows that are there already are left out unless named, and --table prints
what is there. A ROW is a part of its name, such as onnx-phiship.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bench.machine import describe_machine
from bench.quality_rows import OURS, ROWS, SHARED, Row
from toolkit import formats
from toolkit.checkpoint import Checkpoint
from toolkit.families import read_decoder
from toolkit.quality import chat as chats
from toolkit.quality import reference, tokens
from toolkit.quality.texts import Text, read_text
from toolkit.vendor import python_of
from toolkit.vendor.environment import locate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "RESULTS.md"
QUESTIONS = ROOT / "examples" / "tiny-phi3"
EVALUATION_TOKENS, EVALUATION_LENGTH = 16_384, 256
CALIBRATION_TOKENS, CALIBRATION_LENGTH = 8_192, 512
WHOLE_TOKENS = 1 << 20
OFFLINE = {"HF_HUB_OFFLINE": "1", "CI": "true", "PYTHONNOUSERSITE": "1"}


class RowError(Exception):
    """A row could not be made or measured; the text ends with the last lines of its log."""


@dataclass(frozen=True)
class Result:
    """One row, made and measured."""

    row: str
    date: str
    made_s: float
    measured: dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """Where everything is: checkpoint, work folder, llama.cpp."""

    checkpoint: Path
    work: Path
    llama_cpp: Path | None

    @property
    def problem(self) -> Path:
        return self.work / "problem"

    @property
    def results(self) -> Path:
        return self.work / "quality.jsonl"

    def folder(self, row: Row) -> Path:
        return self.work / "rows" / row.name

    def words(self, format_: str, out: Path, scratch: Path) -> dict[str, str]:
        """What the commands of a vendor's row are filled with."""
        environment = locate(formats.get_vendor(format_).VENDOR).folder
        return {
            "bench": str(ROOT / "bench"),
            "chats": str(self.problem / "chats"),
            "checkpoint": str(self.checkpoint),
            "home": str(self.problem / "home"),
            "ids": str(self.problem / "calibration.npy"),
            "llama_bin": f"{self.llama_cpp}/build/bin",
            "llama_cpp": str(self.llama_cpp),
            "out": str(out),
            "python": str(python_of(environment)),
            "scratch": str(scratch),
            "shared": str(self.work / "shared"),
            "text": str(self.problem / "calibration.txt"),
        }


def prepare(bench: Bench) -> None:
    """Write what all rows share: texts, the source's logits, questions; kept when it is there."""
    done = bench.problem / "digest.json"
    if done.is_file():
        return
    shutil.rmtree(bench.problem, ignore_errors=True)
    bench.problem.mkdir(parents=True)
    checkpoint = Checkpoint.open(bench.checkpoint)
    chat = chats.read_chat(checkpoint)
    evaluation = read_text(
        checkpoint, chat, "evaluation", tokens=EVALUATION_TOKENS, length=EVALUATION_LENGTH
    )
    calibration = read_text(
        checkpoint, chat, "calibration", tokens=CALIBRATION_TOKENS, length=CALIBRATION_LENGTH
    )
    whole = read_text(
        checkpoint, chat, "calibration", tokens=WHOLE_TOKENS, length=CALIBRATION_LENGTH
    )
    _write_source(bench, checkpoint, evaluation)
    _write_questions(bench, checkpoint)
    _write_calibration(bench, checkpoint, calibration, whole)
    facts = {
        one.name: {"sha256": one.digest, "tokens": one.count} for one in (evaluation, calibration)
    }
    done.write_text(json.dumps(facts), "utf-8")


def _write_source(bench: Bench, checkpoint: Checkpoint, evaluation: Text) -> None:
    decoder = read_decoder(checkpoint.config)
    logits = [reference.forward(checkpoint, decoder, ids) for ids in evaluation.sequences]
    ids = np.array(evaluation.sequences, np.int64)
    np.savez(bench.problem / "source.npz", ids=ids, logits=np.stack(logits))


def _write_questions(bench: Bench, checkpoint: Checkpoint) -> None:
    """The held-out questions, as a device asks them."""
    sys.path.insert(0, str(QUESTIONS))
    from questions import held_out_questions  # type: ignore[import-not-found]

    tokenizer, chat = tokens.read_tokenizer(checkpoint), chats.read_chat(checkpoint)
    start = [] if chat.bos_id is None else [chat.bos_id]
    asked = [
        {
            "ids": start
            + tokens.encode(tokenizer, chats.render(chat, [("user", question.prompt)])),
            "answer_ids": tokens.encode(tokenizer, question.answer),
        }
        for question in held_out_questions()
    ]
    (bench.problem / "questions.json").write_text(json.dumps(asked), "utf-8")


def _write_calibration(bench: Bench, checkpoint: Checkpoint, text: Text, whole: Text) -> None:
    """The calibration text as ids, as plain text, and where mlx-lm's tools look for theirs."""
    tokenizer = tokens.read_tokenizer(checkpoint)

    def decode(ids: tuple[int, ...]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    np.save(bench.problem / "calibration.npy", np.array(text.sequences, np.int64))
    plain = "".join(map(decode, text.sequences))
    (bench.problem / "calibration.txt").write_text(plain, "utf-8")
    cache = bench.problem / "home" / ".cache" / "mlx-lm"
    cache.mkdir(parents=True)
    (cache / "calibration_v5.txt").write_text(plain, "utf-8")
    folder = bench.problem / "chats"
    folder.mkdir()
    lines = [json.dumps({"text": decode(ids)}) + "\n" for ids in whole.sequences]
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def make(row: Row, bench: Bench) -> float:
    """Make a row's artifact anew in its folder; returns the seconds it took."""
    folder = bench.folder(row)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = datetime.datetime.now()
    if row.who == OURS:
        _run(_our_command(row, bench, folder), folder / "make.log", {})
        (folder / "out" / "model").rename(folder / "artifact")
    else:
        for name in row.shared:
            _make_shared(name, bench)
        words = bench.words(row.format, folder / "artifact", folder / "scratch")
        if row.format == "gguf":
            (folder / "artifact").mkdir()  # llama-quantize makes none
        variables = {key: value.format_map(words) for key, value in row.variables.items()}
        _run(_fill(row.command, words), folder / "make.log", OFFLINE | variables)
    return (datetime.datetime.now() - start).total_seconds()


def _our_command(row: Row, bench: Bench, folder: Path) -> list[str]:
    recipe = {
        "format": row.format,
        "model": "tiny-phi3",
        "title": row.method,
        "quantization": dict(row.quantization),
    }
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return [
        sys.executable, "-m", "toolkit", "build", str(path), "--checkpoint", str(bench.checkpoint),
        "--out", str(folder / "out"), "--no-check",
    ]  # fmt: skip


def _make_shared(name: str, bench: Bench) -> None:
    """Make what several rows start from, unless it is there."""
    place = bench.work / "shared" / name
    if place.exists():
        return
    place.parent.mkdir(exist_ok=True)
    format_, command = SHARED[name]
    words = bench.words(format_, place, place.parent / f"{name}.scratch")
    try:
        _run(_fill(command, words), place.parent / f"{name}.log", OFFLINE)
    except RowError:
        shutil.rmtree(place, ignore_errors=True)
        raise


def measure(row: Row, bench: Bench) -> dict[str, Any]:
    """Measure a row's artifact in a process of its own."""
    folder = bench.folder(row)
    log = folder / "measure.log"
    words = [
        sys.executable, "-m", "bench.quality_measure",
        row.format, str(folder / "artifact"), str(bench.problem),
    ]  # fmt: skip
    _run(words, log, {})
    measured: dict[str, Any] = json.loads(log.read_text("utf-8").splitlines()[-1])
    return measured


def _fill(command: str, words: Mapping[str, str]) -> list[str]:
    return [word.format_map(words) for word in command.split()]


def _run(argv: list[str], log: Path, variables: Mapping[str, str]) -> None:
    """Run to the end, everything it prints in `log`; RowError when it fails."""
    with log.open("wb") as output:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT,
            env={**os.environ, **variables},
        )  # fmt: skip
    if done.returncode:
        tail = log.read_text("utf-8", errors="replace").splitlines()[-8:]
        raise RowError(f"{argv[0]} ended with {done.returncode}:\n" + "\n".join(tail))


def run_all(bench: Bench, chosen: list[Row]) -> int:
    """Make and measure rows one after the other; returns how many failed."""
    failed = 0
    for row in chosen:
        try:
            made_s = make(row, bench)
            result = Result(
                row.name, datetime.date.today().isoformat(), made_s, measure(row, bench)
            )
        except RowError as error:
            print(f"{row.name}: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        with bench.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        found = result.measured
        print(
            f"{row.name}: KL {found['mean_kl']:.5f}, {found['right']} of {found['asked']} right, "
            f"made in {made_s:.0f} s",
            flush=True,
        )
    return failed


def read_results(path: Path) -> dict[str, Result]:
    """The last result of every row, by the row's name."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    results = [Result(**json.loads(line)) for line in lines]
    return {result.row: result for result in results}


HEADER = (
    "format", "who", "method", "weights MB", "mean KL", "of the vendor's default", "top-1",
    "perplexity", "exact answers", "tokens/s", "memory MB",
)  # fmt: skip


def render_table(results: Mapping[str, Result]) -> str:
    """A Markdown table of all rows that were measured, in the order of ROWS."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
    lines += [_render_row(row, results) for row in ROWS if row.name in results]
    return "\n".join(lines)


def _render_row(row: Row, results: Mapping[str, Result]) -> str:
    found = results[row.name].measured
    base = find_default(row)
    ratio = ""
    if base is not None and base is not row and base.name in results:
        ratio = f"x {found['mean_kl'] / results[base.name].measured['mean_kl']:.2f}"
    cells = (
        row.format,
        row.who,
        row.method,
        f"{found['weights_bytes'] / 1e6:.2f}",
        f"{found['mean_kl']:.5f} ± {found['kl_error']:.5f}",
        ratio,
        f"{found['top1']:.1%}",
        f"x {found['perplexity_ratio']:.4f}",
        f"{found['right']} of {found['asked']}",
        f"{found['tokens_per_s']:.0f}",
        f"{found['memory_bytes'] / 1e6:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def find_default(row: Row) -> Row | None:
    """The vendor's default that a row is held against: of its format, for GGUF of its scheme."""
    scheme = row.method.lower().split()[0]
    for other in ROWS:
        is_same = row.format != "gguf" or other.method.lower().startswith(scheme)
        if other.default and other.format == row.format and is_same:
            return other
    return None


NOTES = """\
Every artifact runs in its own runtime on the CPU. KL is that of the next-token distributions,
source (float32) to artifact, in nats a token, ± its standard error; top-1 the share of positions
with the same most likely token; perplexity that of the text, of the source's. MB are powers of ten.
tokens/s are of short answers with their prompts, memory is the process with Python and the runtime:
at this size neither says anything about a real model."""


def render_report(bench: Bench) -> str:
    """A section for RESULTS.md: date, machine, versions, texts, table."""
    results = read_results(bench.results)
    facts = json.loads((bench.problem / "digest.json").read_text("utf-8"))
    texts = "; ".join(
        f"{name}, {fact['tokens']:,} tokens, sha256 {fact['sha256'][:12]}"
        for name, fact in facts.items()
    )
    dates = sorted({result.date for result in results.values()})
    runtimes = sorted({result.measured["runtime"] for result in results.values()})
    return "\n\n".join(
        [
            f"## Quality: {bench.checkpoint.name}, {' to '.join(dict.fromkeys(dates))}",
            f"Machine: {describe_machine()}.",
            f"Versions: {'; '.join([*runtimes, *_vendor_versions()])}.",
            f"Texts: {texts}.",
            render_table(results),
            NOTES,
        ]
    )


def _vendor_versions() -> list[str]:
    versions = []
    for name in formats.names_with_vendor():
        vendor = formats.get_vendor(name).VENDOR
        found = locate(vendor).versions
        versions += [f"{key} {found[key]}" for key in vendor.packages if key in found]
    return list(dict.fromkeys(versions))


def parse_options() -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="parts of rows' names; default: all not there yet")
    add("--checkpoint", type=Path, required=True)
    add("--work", type=Path, required=True, help="folder for artifacts, logs and results")
    add("--llama-cpp", type=Path, help="llama.cpp folder with llama-quantize and llama-imatrix")
    add("--table", action="store_true", help="print the table of what is there; make nothing")
    add("--record", action="store_true", help="append the table to bench/RESULTS.md")
    return parser.parse_args()


def choose_rows(words: list[str], known: Mapping[str, Result]) -> list[Row]:
    """The rows that are named, or all that have no result yet; SystemExit when none is."""
    if not words:
        return [row for row in ROWS if row.name not in known]
    chosen = [row for row in ROWS if any(word in row.name for word in words)]
    if not chosen:
        sys.exit(f"no such row; there are {', '.join(row.name for row in ROWS)}")
    return chosen


def main() -> None:
    """Make, measure and print the table; exit with 1 when a row failed."""
    options = parse_options()
    bench = Bench(options.checkpoint.resolve(), options.work.resolve(), options.llama_cpp)
    bench.work.mkdir(parents=True, exist_ok=True)
    prepare(bench)
    failed = 0
    if not options.table:
        failed = run_all(bench, choose_rows(options.rows, read_results(bench.results)))
    report = render_report(bench)
    print(report)
    if options.record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n" + report + "\n")
    if failed:
        sys.exit(f"{failed} rows failed")


if __name__ == "__main__":
    main()
