"""What `phiship check --details FILE` writes and `phiship report` reads: one JSON object."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from toolkit.artifact import Manifest
from toolkit.errors import BuildError, SettingsError
from toolkit.fileio import write_whole
from toolkit.quality.measures import PERCENT, Comparison
from toolkit.quality.texts import Text

SCHEMA = 1


class Range(msgspec.Struct, frozen=True, kw_only=True):
    """Agreement after `first` to `last` tokens, both included.

    `claimed` says whether the manifest's valid context covers it, `agrees` what was measured. One
    of too few tokens to say is not `judged`; nothing speaks against it, so it `agrees`.
    """

    first: int
    last: int
    tokens: int
    mean_kl: float
    kl_error: float
    top1: float
    claimed: bool
    agrees: bool
    judged: bool = True


class TensorError(msgspec.Struct, frozen=True, kw_only=True):
    """How far one matrix is from the source's; `kl` is what it alone costs, in nats per token."""

    name: str
    kind: str
    layer: int | None
    bits: float | None
    relative_error: float
    kl: float | None


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """An artifact beside its source on one text.

    `summary` is every measure by name (KL in nats, Δp in percent points), `errors` the standard
    errors of those that have one. What follows is per token of all sequences, one behind the other;
    `sequences` are their lengths. `kl` and `same_top` concern what the models foresee after the
    token, `delta_p` the token that really follows, in percent points, null at the end of a
    sequence. `text_digest` is that of these sequences as Text's, with a mark behind it where the
    source had factors of RoPE that it has not by itself. `ranges` is empty when the text reaches no
    length at which the architecture changes. `manifest_digest` is the hex sha256 of manifest.json.
    """

    schema: int
    artifact: str
    format: str
    size_bytes: int
    manifest_digest: str
    plan_digest: str
    runtime: str
    text: str
    text_digest: str
    sequences: tuple[int, ...]
    summary: dict[str, float]
    errors: dict[str, float]
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    kl: tuple[float, ...]
    delta_p: tuple[float | None, ...]
    same_top: tuple[bool, ...]
    ranges: tuple[Range, ...] = ()
    tensors: tuple[TensorError, ...] = ()


def make_details(
    manifest: Manifest,
    manifest_digest: str,
    runtime: str,
    text: Text,
    found: Comparison,
    texts: Sequence[Sequence[str]],
    ranges: tuple[Range, ...],
) -> Details:
    """Put together what was found; `texts` has the text of every token of every sequence."""
    summary = found.summarize()
    source, artifact = np.exp(-found.losses)
    changes = (PERCENT * (artifact - source)).tolist()
    return Details(
        schema=SCHEMA,
        artifact=manifest.name,
        format=manifest.format,
        size_bytes=manifest.size_bytes,
        manifest_digest=manifest_digest,
        plan_digest=manifest.plan_digest,
        runtime=runtime,
        text=text.name,
        text_digest=text.digest,
        sequences=tuple(map(len, texts)),
        summary={name: one.value for name, one in summary.items()},
        errors={name: one.error for name, one in summary.items() if one.error is not None},
        ids=tuple(found.ids.tolist()),
        texts=tuple(itertools.chain.from_iterable(texts)),
        kl=tuple(found.kl.tolist()),
        delta_p=tuple(None if math.isnan(change) else change for change in changes),
        same_top=tuple(found.same_top.tolist()),
        ranges=ranges,
    )


def write_details(path: Path, details: Details) -> None:
    """Write the file, all of it or nothing; SettingsError when it cannot be."""
    content = msgspec.json.encode(details).decode() + "\n"
    try:
        if path.exists() and not path.is_file():  # a pipe, a terminal: nothing to replace
            path.write_text(content, "utf-8")
        else:
            write_whole(content, path.resolve())  # what a link leads to, not the link
    except BuildError as error:
        raise SettingsError(f"--details {error}") from error
    except OSError as error:
        raise SettingsError(f"--details {path}: cannot be written: {error.strerror}") from error


def read_details(path: Path, manifest_digest: str, text_digest: str) -> Details | None:
    """What was written before of the same artifact on the same text; None when nothing was."""
    try:
        if not path.is_file():  # a pipe has nothing to read
            return None
        details = msgspec.json.decode(path.read_bytes(), type=Details)
    except (OSError, msgspec.DecodeError):
        return None
    known = (details.manifest_digest, details.text_digest)
    return details if known == (manifest_digest, text_digest) else None
