"""Convert one checkpoint with phiship and with the vendor's tools, side by side, and compare.

    python bench/make_checkpoint.py --out ck --tokenizer FOLDER
    python bench/convert.py --checkpoint ck --work w --builder-python PYTHON --llama-cpp FOLDER

Both sides run in turn on the same machine as their users would run them: a whole process each,
from a checkpoint in the page cache to an artifact on the disk. Every run is appended to a JSON
lines file; the table is made of all runs in it (medians), so slow sides can be run once and fast
ones again (--only, --repeat), and --repeat 0 prints the table of what is there.

A third side, `copy`, reads the checkpoint and writes as many bytes with nothing between
(bench/read_write.py). Of phiship's time, `converting` is the part without sealing and without the
gate, from its own report.

--builder-python is a Python with onnxruntime-genai (0.18 or newer), torch and transformers;
--optimum-python one with optimum-intel and nncf; --mlx-python one with mlx-lm (default: this one);
--llama-cpp is a llama.cpp source folder in which build/bin/llama-quantize is built, and
--convert-python a Python that runs its convert_hf_to_gguf.py (default: --builder-python).
"""

import argparse
import datetime
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

from machine import describe_machine, describe_versions
from measure import CommandError, Cost, measure_bytes, measure_command, read_through

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
SIDES = ("phiship", "vendor", "copy")

# Commands; words in braces are filled in by `fill`.
_PHISHIP = (
    "{phiship} build {recipe} --checkpoint {checkpoint} --out {out} --no-check --workers {n} --json"
)
_COPY = "{python} {bench}/read_write.py {checkpoint} {out} {size} {n}"
_BUILDER = (
    "{builder_python} -m onnxruntime_genai.models.builder -i {checkpoint} -o {out} -p int4 -e cpu"
    " -c {scratch}/cache --extra_options block_size=32 accuracy_level=4"
)
_CONVERT_HF = (
    "{convert_python} {llama_cpp}/convert_hf_to_gguf.py {checkpoint}"
    " --outtype f16 --outfile {scratch}/f16.gguf"
)
_OPTIMUM = (
    "{optimum} export openvino --model {checkpoint} --task text-generation-with-past"
    " --weight-format int4 --group-size 128 --sym --ratio 1.0 {out}"
)
_MLX = (
    "{mlx_python} -m mlx_lm convert --hf-path {checkpoint} --mlx-path {out} --dtype bfloat16"
    " -q --q-bits 4 --q-group-size 64"
)
_QUANTIZE = "{llama_cpp}/build/bin/llama-quantize {scratch}/f16.gguf {out} {scheme} {n}"


@dataclass(frozen=True)
class Comparison:
    """The same artifact made twice."""

    recipe: str
    vendor: tuple[str, ...]
    scheme: str = ""

    def commands(self, side: str) -> tuple[str, ...]:
        return {"phiship": (_PHISHIP,), "vendor": self.vendor, "copy": (_COPY,)}[side]


COMPARISONS = {
    "onnx-int4": Comparison("phi-3-mini-4k-onnx-cpu-int4", (_BUILDER,)),
    "openvino-int4": Comparison("phi-3-mini-4k-openvino-int4", (_OPTIMUM,)),
    "mlx-4bit": Comparison("phi-3-mini-4k-mlx-4bit", (_MLX,)),
    "gguf-q4_0": Comparison("phi-3-mini-4k-gguf-q4_0", (_CONVERT_HF, _QUANTIZE), "Q4_0"),
    "gguf-q4_k_m": Comparison("phi-3-mini-4k-gguf-q4_k_m", (_CONVERT_HF, _QUANTIZE), "Q4_K_M"),
}


@dataclass(frozen=True)
class Run:
    """One side of a comparison, run once."""

    comparison: str
    side: str
    date: str
    steps: tuple[Cost, ...]
    artifact_bytes: int
    converting: tuple[float, float] | None = None  # wall and CPU seconds, phiship only

    @property
    def total(self) -> Cost:
        total = self.steps[0]
        for step in self.steps[1:]:
            total += step
        return total

    @property
    def scratch_bytes(self) -> int:
        """The most disk space taken beyond the finished artifact."""
        return max(0, self.total.folder_bytes - self.artifact_bytes)

    @classmethod
    def from_json(cls, line: str) -> "Run":
        fields = json.loads(line)
        converting = tuple(fields.get("converting") or ()) or None
        steps = tuple(Cost(**step) for step in fields["steps"])
        return cls(**{**fields, "steps": steps, "converting": converting})


def run_side(name: str, side: str, options: argparse.Namespace) -> Run:
    """Warm the page cache, run the commands of one side, and measure them."""
    folder = options.work / f"{name}-{side}"
    shutil.rmtree(folder, ignore_errors=True)
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    out = folder / "artifact"
    read_through(options.checkpoint)
    os.sync()
    environment = {"TMPDIR": str(scratch), "HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1"}
    steps = tuple(
        measure_command(
            fill(template, name, options, out, scratch),
            log=options.work / f"{name}-{side}-{number}.log",
            folder=folder,
            environment=environment,
        )
        for number, template in enumerate(COMPARISONS[name].commands(side), 1)
    )
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    converting = (
        read_converting(options.work / f"{name}-phiship-1.log") if side == SIDES[0] else None
    )
    run = Run(name, side, now, steps, measure_bytes(out), converting)
    shutil.rmtree(scratch if options.keep else folder)
    return run


def read_converting(log: Path) -> tuple[float, float]:
    """Wall and CPU seconds of phiship's step `convert`, from its JSON events."""
    lines = log.read_text("utf-8").splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    step = next(event for event in events if event.get("name") == "convert")
    found = re.search(r"([\d.]+) s of CPU", step["measured"])
    return step["seconds"], float(found[1]) if found else 0.0


def fill(
    template: str, name: str, options: argparse.Namespace, out: Path, scratch: Path
) -> list[str]:
    """Return the words of a command; values with spaces stay one word."""
    optimum = Path(options.optimum_python or sys.executable).with_name("optimum-cli")
    values = {
        "bench": RESULTS.parent,
        "mlx_python": options.mlx_python,
        "optimum": optimum,
        "python": sys.executable,
        "size": options.sizes.get(name, 0),
        "builder_python": options.builder_python,
        "checkpoint": options.checkpoint,
        "convert_python": options.convert_python or options.builder_python,
        "llama_cpp": options.llama_cpp,
        "n": options.workers,
        "out": out,
        "phiship": options.phiship,
        "recipe": COMPARISONS[name].recipe,
        "scheme": COMPARISONS[name].scheme,
        "scratch": scratch,
    }
    return [word.format_map(values) for word in template.split()]


def run_all(options: argparse.Namespace) -> int:
    """Run the chosen sides in turn (A B A B), collect the runs, and return how many failed."""
    sides = [side for side in SIDES if side in (options.only or SIDES)]
    order = product(options.comparisons, range(options.repeat), sides)
    return sum(not _try_side(name, side, options) for name, _, side in order)


def _try_side(name: str, side: str, options: argparse.Namespace) -> bool:
    """Run one side and append it to the JSON lines file; a failure is printed, not raised."""
    try:
        run = run_side(name, side, options)
    except CommandError as error:
        print(f"{name} {side}: {error}", file=sys.stderr)
        return False
    if side == SIDES[0]:
        options.sizes[name] = run.artifact_bytes
    with options.json.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(run)) + "\n")
    print(f"{name} {side}: {run.total.wall_s:.1f} s wall, {run.total.cpu_s:.1f} s CPU", flush=True)
    return True


def read_runs(path: Path) -> list[Run]:
    """Return every collected run; SystemExit when there is none."""
    if not path.is_file():
        sys.exit(f"{path}: no runs collected yet")
    return [Run.from_json(line) for line in path.read_text("utf-8").splitlines()]


HEADER = (
    "side",
    "runs",
    "wall s",
    "CPU s",
    "largest process MB",
    "all processes MB",
    "scratch disk GB",
    "artifact GB",
    "other work",
)


def render_table(runs: list[Run]) -> str:
    """Return a Markdown table: for every comparison both sides (medians) and their ratio."""
    lines = ["| artifact | " + " | ".join(HEADER) + " |", "|---" * (len(HEADER) + 1) + "|"]
    for name in COMPARISONS:
        rows = {side: _median_row(runs, name, side) for side in SIDES}
        for side, row in rows.items():
            if row:
                lines.append(f"| {name} | {side} | {_render_row(row)} |")
        if converting := [
            run.converting for run in runs if run.comparison == name and run.converting
        ]:
            wall_s, cpu_s = (median(column) for column in zip(*converting, strict=True))
            blanks = " | " * 5
            lines.append(
                f"| {name} | phiship: converting | {len(converting)} | {wall_s:.1f} | {cpu_s:.1f} |"
                f"{blanks}|"
            )
        if rows["phiship"] and rows["vendor"]:
            pairs = zip(rows["vendor"][1:6], rows["phiship"][1:6], strict=True)
            ratios = " | ".join(f"{v / p:.1f}" if v < 1e4 * p else "-" for v, p in pairs)
            lines.append(f"| {name} | vendor / phiship | | {ratios} | | |")
    return "\n".join(lines)


def _median_row(runs: list[Run], name: str, side: str) -> list[float]:
    """Return the numbers behind a row of the table; empty when that side was not run."""
    chosen = [run for run in runs if (run.comparison, run.side) == (name, side)]
    if not chosen:
        return []
    columns = zip(*(_measures(run) for run in chosen), strict=True)
    return [float(len(chosen)), *(median(column) for column in columns)]


def _measures(run: Run) -> tuple[float, ...]:
    total = run.total
    return (
        total.wall_s,
        total.cpu_s,
        total.largest_process_bytes,
        total.tree_bytes,
        run.scratch_bytes,
        run.artifact_bytes,
        total.others_cpu_s / (total.wall_s * (os.cpu_count() or 1)),
    )


def _render_row(row: list[float]) -> str:
    runs, wall_s, cpu_s, process_bytes, tree_bytes, scratch_bytes, artifact_bytes, others = row
    return (
        f"{runs:.0f} | {wall_s:.1f} | {cpu_s:.1f} | {process_bytes / 1e6:,.0f} |"
        f" {tree_bytes / 1e6:,.0f} | {scratch_bytes / 1e9:.2f} | {artifact_bytes / 1e9:.3f} |"
        f" {others:.0%}"
    )


NOTES = """\
Whole processes, children included, measured from outside. MB and GB are powers of ten. CPU is
user + system. Memory is peak resident, mapped files included. Scratch is disk space taken at the
peak beyond the finished artifact. The checkpoint was read once before every run, so it came from
the page cache as far as memory allowed. Other work: the part of all cores that was busy with
something else meanwhile."""


def render_report(runs: list[Run], options: argparse.Namespace) -> str:
    """Return a section for RESULTS.md: date, machine, versions, table and how it was measured."""
    dates = sorted({run.date[:10] for run in runs})
    size_gb = measure_bytes(options.checkpoint) / 1e9
    return "\n\n".join(
        [
            f"## Conversion, {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}",
            f"Machine: {describe_machine()}.",
            f"Versions: {describe_versions(options)}.",
            f"Checkpoint: {size_gb:.2f} GB from bench/make_checkpoint.py.",
            render_table(runs),
            NOTES,
        ]
    )


def parse_options() -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("comparisons", nargs="*", default=list(COMPARISONS), metavar="COMPARISON")
    add("--checkpoint", type=Path, required=True, help="from bench/make_checkpoint.py, or real")
    add("--work", type=Path, required=True, help="folder for artifacts, scratch files and logs")
    add("--builder-python", help="Python with onnxruntime-genai's model builder")
    add("--optimum-python", help="Python with optimum-intel and nncf")
    add("--mlx-python", default=sys.executable, help="Python with mlx-lm (default: this one)")
    add("--convert-python", help="Python for convert_hf_to_gguf.py (default: the builder's)")
    add("--llama-cpp", type=Path, help="llama.cpp folder with build/bin/llama-quantize")
    add("--phiship", default=str(Path(sys.executable).with_name("phiship")))
    add("--only", action="append", choices=SIDES, help="run this side alone; may be repeated")
    add("--repeat", type=int, default=1, help="runs of each side; 0 prints the table alone")
    add("--workers", type=int, default=2, help="processes or threads of both sides")
    add("--json", type=Path, help="where runs are collected (default: WORK/convert.jsonl)")
    add("--keep", action="store_true", help="keep the artifacts in WORK")
    add("--record", action="store_true", help="append the table to bench/RESULTS.md")
    options = parser.parse_args()
    unknown = set(options.comparisons) - set(COMPARISONS)
    if unknown:
        parser.error(f"unknown comparison {sorted(unknown)[0]}; allowed {', '.join(COMPARISONS)}")
    _check_tools(parser, options)
    options.checkpoint, options.work = options.checkpoint.resolve(), options.work.resolve()
    options.json = options.json or options.work / "convert.jsonl"
    options.sizes = {}
    return options


def _check_tools(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse before the first run what would fail in the last one."""
    sides = options.only or SIDES
    if options.repeat and "copy" in sides and "phiship" not in sides:
        parser.error("--only copy writes as much as phiship did: it needs --only phiship too")
    if options.repeat == 0 or "vendor" not in sides:
        return
    needs_builder = {"onnx-int4", "gguf-q4_0", "gguf-q4_k_m"} & set(options.comparisons)
    if needs_builder and not options.builder_python:
        parser.error("--builder-python is missing")
    if "openvino-int4" in options.comparisons and not options.optimum_python:
        parser.error("--optimum-python is missing")
    if any(name.startswith("gguf") for name in options.comparisons):
        if not options.llama_cpp:
            parser.error("--llama-cpp is missing")
        if not (options.llama_cpp / "build" / "bin" / "llama-quantize").is_file():
            parser.error(f"{options.llama_cpp}/build/bin/llama-quantize is not built")


def main() -> None:
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        failed = run_all(options)
    except KeyboardInterrupt:
        sys.exit("stopped; finished runs are kept")
    report = render_report(read_runs(options.json), options)
    print(report)
    if failed:
        sys.exit(f"{failed} runs failed; nothing is recorded")
    if options.record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n" + report + "\n")


if __name__ == "__main__":
    main()
