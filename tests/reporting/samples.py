"""Manifests, details, benches and costs as phiship's commands write them, made by hand."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from toolkit.artifact import (
    SCHEMA,
    Chat,
    File,
    Limits,
    Manifest,
    Measure,
    Quality,
    Runtime,
    Source,
    hash_file,
    write_manifest,
)
from toolkit.measuring import result
from toolkit.measuring.result import Length, Machine, Result, Run, Spread, State
from toolkit.quality.details import SCHEMA as DETAILS_SCHEMA
from toolkit.quality.details import Details, Range, TensorError

MODEL = Source(model="tiny-phi3", revision="local", digest="de57" * 16)
TEXT = "Python 3.11 manual, evaluation part"
WORDS = ("The", " capital", " of", " France", " is", " Paris", ".", "\n", "\n\n", "  if", " x")
# Everything that could leave its place in HTML, SVG, Markdown or a line of text.
HOSTILE = (
    "</title><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }}", "&amp;",
    "$x^2$ | `a` *b* [c](d)", "\x00\x07\x1b[31m", "\ud83d", "\ufffe", "\u202eevil\u2066",
    "שלום", "مرحبا", "a\nb\tc\r", "-->", "]]>", "", "\u2028", "😀",
)  # fmt: skip


def seal(
    folder: Path,
    name: str,
    *,
    kind: str = "gguf",
    size_bytes: int = 2_260_000,
    kl: float | None = 0.0094,
    source: Source = MODEL,
    plan: dict[str, object] | None = None,
    context: int = 512,
) -> Path:
    """Write a sealed artifact's manifest; its files are not there."""
    measures = {"mean KL": kl, "top-1 agreement": 0.92, "source perplexity": 230.0}
    found = tuple(
        Measure(name=key, value=value, limit=None, ok=True)
        for key, value in {**measures, "artifact perplexity": 236.5}.items()
        if value is not None and kl is not None
    )
    manifest = Manifest(
        schema=SCHEMA,
        name=name,
        format=kind,
        plan_digest="4a07" * 16,
        plan={"quantization": {"precision": "q4_0"}} if plan is None else plan,
        source=source,
        tools={"phiship": "0.1.0", "python": "3.11.7"},
        runtime=Runtime(
            engine="llama_cpp", provider="cpu", package="xllamacpp", version="1", main_file="m"
        ),
        context_length=context,
        valid_context=(1, context),
        device_memory_bytes=1,
        chat=Chat(turns={}, generation="", stop_ids=(), stop_texts=()),
        limits=Limits(),
        smoke=None,
        quality=Quality(checked=kl is not None, runtime="xllamacpp 1, cpu", measures=found),
        files=(File(path="model", size_bytes=size_bytes, sha256="0" * 64),),
    )
    path = folder / "artifacts" / str(len(list(folder.glob("artifacts/*"))))
    path.mkdir(parents=True)
    write_manifest(path, manifest)
    return path


def make_details(
    artifact: Path,
    *,
    mean_kl: float = 0.006,
    texts: Sequence[str] | None = None,
    sequences: Sequence[int] | None = None,
    layers: int = 2,
    **changes: Any,
) -> Details:
    """What `check --details` found about a sealed artifact: numbers by chance, always the same."""
    manifest = msgspec.json.decode((artifact / "manifest.json").read_bytes(), type=Manifest)
    chance = random.Random(manifest.name)
    texts = list(texts or [chance.choice(WORDS) for _ in range(240)])
    sequences = tuple(sequences or [len(texts)])
    ends = {sum(sequences[: number + 1]) - 1 for number in range(len(sequences))}
    kl = tuple(mean_kl * chance.lognormvariate(-0.5, 1) for _ in texts)
    details = Details(
        schema=DETAILS_SCHEMA,
        artifact=manifest.name,
        format=manifest.format,
        size_bytes=manifest.size_bytes,
        manifest_digest=hash_file(artifact / "manifest.json"),
        plan_digest=manifest.plan_digest,
        runtime=manifest.quality.runtime,
        text=TEXT,
        text_digest="32b1" * 16,
        sequences=sequences,
        summary={
            "mean KL": mean_kl, "top-1 agreement": 0.931, "source perplexity": 65.8,
            "artifact perplexity": 66.2,
        },
        errors={"mean KL": mean_kl / 30, "top-1 agreement": 0.006},
        ids=tuple(range(len(texts))),
        texts=tuple(texts),
        kl=kl,
        delta_p=tuple(
            None if n in ends else chance.uniform(-3, 3) for n in range(len(texts))
        ),
        same_top=tuple(chance.random() < 0.9 for _ in texts),
        ranges=(
            Range(first=0, last=255, tokens=256, mean_kl=mean_kl, kl_error=mean_kl / 30, top1=0.93,
                  claimed=True, agrees=True),
        ),
        tensors=make_tensors(layers, mean_kl, chance),
    )  # fmt: skip
    return msgspec.structs.replace(details, **changes)


def make_tensors(layers: int, kl: float, chance: random.Random) -> tuple[TensorError, ...]:
    """Every matrix of a model of so many layers."""
    found = [("embedding", None), ("head", None)]
    found += [(k, n) for n in range(layers) for k in ("qkv", "attention_out", "gate_up", "down")]
    return tuple(
        TensorError(
            name=f"model.{layer}.{kind}.weight", kind=kind, layer=layer, bits=4.5,
            relative_error=0.007, kl=kl * chance.lognormvariate(-3, 1.5),
        )
        for kind, layer in found
    )  # fmt: skip


def write(details: Details, folder: Path) -> Path:
    """Write details as a file; by json, which also writes lone surrogates."""
    path = folder / f"details-{len(list(folder.glob('details-*')))}.json"
    path.write_text(json.dumps(msgspec.to_builtins(details)))
    return path


def make_bench(name: str, *, board: str = "Raspberry Pi 5", rate: float = 8.5) -> Result:
    """What `bench` found of an artifact on a board."""
    state = State(
        temperature_celsius=50.0, throttled_now=(), throttled_before=(), clock_hertz=2_400_000_000
    )
    return Result(
        schema=result.SCHEMA,
        name=name,
        engine="xllamacpp 1",
        provider="cpu",
        settings={},
        started="2026-11-21T12:00:00Z",
        machine=Machine(
            system="Linux", machine="aarch64", board=board, processor="A76", cpu_count=4,
            memory_total_bytes=8_000_000_000, python="3.11.2",
        ),
        before=state,
        after=state,
        new_tokens=16,
        load_seconds=1.5,
        loaded_memory_bytes=40_000_000,
        peak_memory_bytes=54_000_000,
        available_memory_bytes=None,
        lengths=tuple(make_length(count, rate) for count in (16, 64)),
        skipped=(),
    )  # fmt: skip


def make_length(prompt_tokens: int, rate: float) -> Length:
    """One length of a bench."""
    spread = Spread(median=rate, least=rate * 0.9, most=rate * 1.1)
    run = Run(
        first_token_seconds=0.5, prompt_tokens_per_second=rate * 4, tokens_per_second=rate,
        new_tokens=16,
    )  # fmt: skip
    return Length(
        prompt_tokens=prompt_tokens,
        first_token_seconds=Spread(median=0.5, least=0.4, most=0.6),
        prompt_tokens_per_second=Spread(median=rate * 4, least=rate * 3, most=rate * 5),
        tokens_per_second=spread,
        peak_memory_bytes=54_000_000,
        runs=(run,),
    )


def write_events(path: Path, *events: dict[str, Any]) -> Path:
    """Write events as --json prints them."""
    path.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))
    return path


def make_costs(**changes: Any) -> list[dict[str, Any]]:
    """The events of a parity: ours took 12 s and 128 MB, the vendor's ten times as much."""
    side = {
        "event": "engine", "size_bytes": 2_500_000, "kl_to_source": 0.016, "top1": 0.92,
        "token_mismatches": 0, **changes,
    }  # fmt: skip
    ours = {"wall_s": 12.0, "cpu_s": 14.0, "peak_memory_bytes": 128_000_000}
    theirs = {"wall_s": 120.0, "cpu_s": 150.0, "peak_memory_bytes": 24_000_000_000}
    return [
        {"event": "waiting", "label": "x"},
        {**side, "name": "native", **ours},
        {**side, "name": "vendor", **theirs},
        {"event": "logits", "kl": 0.001, "top1": 0.99},
    ]


def write_all(folder: Path, hostile: Sequence[str] = ()) -> tuple[list[Path], list[Path]]:
    """Artifacts of every format with all data there can be; also under hostile names."""
    kinds = {"onnx": 3_300_000, "gguf": 2_260_000, "openvino": 2_980_000, "mlx": 2_200_000}
    artifacts = [
        seal(folder, f"tiny-{kind}-{bits}", kind=kind, size_bytes=size * bits // 4)
        for kind, size in kinds.items()
        for bits in (4, 8)
    ]
    texts = ["The", " capital", *hostile, *WORDS * 20]
    artifacts += [seal(folder, f"tiny-{text}", kind="gguf") for text in hostile]
    details = [make_details(path, mean_kl=0.03 / (n + 1) ** 2, texts=texts)
               for n, path in enumerate(artifacts)]  # fmt: skip
    details[10:] = [msgspec.structs.replace(one, tensors=()) for one in details[10:]]
    files = [write(one, folder) for one in details]
    events = [
        {"event": "bench", **msgspec.to_builtins(make_bench(one.artifact, board=board))}
        for one in details[:4]
        for board in ("Raspberry Pi 5", "Jetson Orin Nano")
    ]
    files.append(write_events(folder / "bench.jsonl", *events))
    return artifacts, [*files, write_events(folder / "tiny-onnx-4.jsonl", *make_costs())]
