"""What a report says: the artifacts of one model, with all that is known about each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import artifact
from toolkit.artifact import Manifest
from toolkit.errors import SettingsError
from toolkit.measuring.result import Result
from toolkit.quality.details import Details, TensorError
from toolkit.reporting.data import Built, Data, Origin
from toolkit.reporting.front import find_front
from toolkit.weights import RUNTIME as WEIGHTS_ALONE

GATE_TEXT = "the gate's own text"


@dataclass(frozen=True)
class Measured:
    """An artifact beside its source on one text; `errors` are standard errors, where known."""

    text: str
    digest: str
    tokens: int | None
    runtime: str
    values: dict[str, float]
    errors: dict[str, float]

    @property
    def mean_kl(self) -> float:
        """Mean divergence in nats per token."""
        return self.values["mean KL"]

    @property
    def is_weights_alone(self) -> bool:
        """True when the source's forward pass read the artifact's weights, not its runtime."""
        return self.runtime == WEIGHTS_ALONE

    @property
    def mean_kl_error(self) -> float | None:
        """Standard error of `mean_kl`."""
        return self.errors.get("mean KL")


@dataclass(frozen=True)
class Entry:
    """An artifact; `label` is its name without what all names here begin with."""

    label: str
    manifest: Manifest
    measured: tuple[Measured, ...]
    details: tuple[Details, ...]

    def on(self, digest: str) -> Measured | None:
        """What was measured on a text, rather in its runtime than by its weights alone."""
        found = [one for one in self.measured if one.digest == digest]
        return min(found, key=lambda one: one.is_weights_alone, default=None)

    @property
    def tensors(self) -> list[TensorError]:
        """Its matrices, as far as it is known what each costs."""
        found = next((one.tensors for one in self.details if one.tensors), ())
        return [tensor for tensor in found if tensor.kl is not None]


@dataclass(frozen=True)
class Content:
    """Everything of one model; `digest` is that of the text by which artifacts are compared."""

    entries: tuple[Entry, ...]
    digest: str
    benches: tuple[Result, ...]
    built: tuple[Built, ...]
    origins: tuple[Origin, ...]
    left_out: tuple[str, ...]

    @property
    def plotted(self) -> list[tuple[Entry, Measured]]:
        """Artifacts that were measured on the text."""
        found = [(entry, entry.on(self.digest)) for entry in self.entries]
        return [(entry, measured) for entry, measured in found if measured]

    @property
    def front(self) -> list[Entry]:
        """Artifacts of the Pareto front, the smallest first."""
        points = [(e.manifest.size_bytes, m.mean_kl) for e, m in self.plotted]
        return [self.plotted[place][0] for place in find_front(points)]


def collect(folders: Sequence[Path], data: Data) -> Content:
    """Read the artifacts and sort the data to them.

    ArtifactError when a folder is not sealed; SettingsError when models differ or names do not.
    """
    manifests = [artifact.read_manifest(folder) for folder in folders]
    _require_one_model(folders, manifests)
    _require_names(folders, manifests)
    digests = {
        manifest.name: artifact.hash_file(folder / artifact.MANIFEST)
        for folder, manifest in zip(folders, manifests, strict=True)
    }
    labels = shorten(list(digests))
    details = [one for one in data.details if digests.get(one.artifact) == one.manifest_digest]
    entries = tuple(
        _make_entry(label, manifest, [one for one in details if one.artifact == manifest.name])
        for label, manifest in zip(labels, manifests, strict=True)
    )
    benches = tuple(one for one in data.benches if one.name in digests)
    left_out = _list_left_out(data, digests)
    return Content(entries, _choose_text(entries), benches, data.built, data.origins, left_out)


def _list_left_out(data: Data, digests: dict[str, str]) -> tuple[str, ...]:
    """What the files hold of artifacts that are not on the page."""
    missing = [f"details of {one.artifact}" for one in data.details if one.artifact not in digests]
    other = [
        f"details of an earlier build of {one.artifact}"
        for one in data.details
        if digests.get(one.artifact, one.manifest_digest) != one.manifest_digest
    ]
    benches = [f"bench of {one.name}" for one in data.benches if one.name not in digests]
    return tuple(dict.fromkeys([*missing, *other, *benches]))


def shorten(names: Sequence[str]) -> list[str]:
    """Names without the words, up to a dash, that all begin with; none becomes empty."""
    words = [name.split("-") for name in names]
    shared = 0
    while len(names) > 1 and all(len(w) > shared + 1 for w in words):
        if len({w[shared] for w in words}) > 1:
            break
        shared += 1
    return ["-".join(w[shared:]) or name for w, name in zip(words, names, strict=True)]


def _require_one_model(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.source.digest != manifests[0].source.digest:
            raise SettingsError(
                f"a report is about one model: {folders[0]} was made from "
                f"{_say_source(manifests[0])}, {folder} from {_say_source(manifest)}",
                advice="call phiship report once for each",
            )


def _say_source(manifest: Manifest) -> str:
    source = manifest.source
    return f"{source.model}@{source.revision[:12]} (digest {source.digest[:12]})"


def _require_names(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Details and benches name artifacts, so no two may have the same name."""
    seen: dict[str, Path] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest.name in seen:
            raise SettingsError(
                f"{seen[manifest.name]} and {folder} are both named {manifest.name}",
                advice="give each name once: benches and details say the name, not the folder",
            )
        seen[manifest.name] = folder


def _make_entry(label: str, manifest: Manifest, details: Sequence[Details]) -> Entry:
    measured = [_read_details(one) for one in details if "mean KL" in one.summary]
    of_gate = _read_gate(manifest)
    return Entry(label, manifest, tuple(measured + ([of_gate] if of_gate else [])), tuple(details))


def _read_gate(manifest: Manifest) -> Measured | None:
    values = {measure.name: measure.value for measure in manifest.quality.measures}
    if "mean KL" not in values:
        return None
    errors = {one.name: one.error for one in manifest.quality.measures if one.error is not None}
    return Measured(GATE_TEXT, "", None, manifest.quality.runtime, values, errors)


def _read_details(details: Details) -> Measured:
    return Measured(
        details.text, details.text_digest, len(details.ids), details.runtime, details.summary,
        details.errors,
    )  # fmt: skip


def _choose_text(entries: Sequence[Entry]) -> str:
    """The text that most artifacts were measured on; of equals the longest."""
    counts = Counter(
        digest for entry in entries for digest in {one.digest for one in entry.measured}
    )
    lengths = {one.digest: one.tokens or 0 for entry in entries for one in entry.measured}
    return max(counts, key=lambda digest: (counts[digest], lengths[digest], digest), default="")
