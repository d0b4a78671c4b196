"""What a report says: the artifacts of one model, with all that is known about each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit import artifact
from toolkit.artifact import Manifest
from toolkit.errors import SettingsError
from toolkit.measuring.result import Result
from toolkit.quality.details import Details, TensorError
from toolkit.reporting.data import Built, Data, Origin
from toolkit.reporting.front import find_front
from toolkit.reporting.measured import (
    Key,
    Measured,
    choose_key,
    choose_text,
    read_details,
    read_gate,
)


@dataclass(frozen=True)
class Entry:
    """An artifact; `label` is its name without what all names here begin with.

    `details` of the text that artifacts are compared by come first.
    """

    label: str
    manifest: Manifest
    measured: tuple[Measured, ...]
    details: tuple[Details, ...]

    def on(self, key: Key) -> Measured | None:
        """What was measured on a text, rather in its runtime than by its weights alone."""
        found = [one for one in self.measured if one.key == key]
        return min(found, key=lambda one: one.is_weights_alone, default=None)

    def list_tensors(self, key: Key) -> list[TensorError]:
        """Its matrices with what each costs on a text, as far as that is known."""
        found = (_list_costs(one) for one in self.details if read_details(one).key == key)
        return next((tensors for tensors in found if tensors), [])


@dataclass(frozen=True)
class Heated:
    """An artifact with what its matrices cost; `tensors` is not empty."""

    entry: Entry
    tensors: Sequence[TensorError]


@dataclass(frozen=True)
class Content:
    """Everything of one model; `key` is that of the text by which artifacts are compared.

    `heat_key` is that of matrices: the same, as far as any were measured on it. `left_out` is what
    files hold of artifacts that are not here, `outdated` of other builds of those that are.
    """

    entries: tuple[Entry, ...]
    key: Key
    heat_key: Key
    benches: tuple[Result, ...]
    built: tuple[Built, ...]
    origins: tuple[Origin, ...]
    left_out: tuple[str, ...]
    outdated: tuple[str, ...]

    @property
    def plotted(self) -> list[tuple[Entry, Measured]]:
        """Artifacts that were measured on the text."""
        found = [(entry, entry.on(self.key)) for entry in self.entries]
        return [(entry, measured) for entry, measured in found if measured]

    @property
    def front(self) -> list[Entry]:
        """Artifacts of the Pareto front, the smallest first."""
        points = [(e.manifest.size_bytes, m.mean_kl) for e, m in self.plotted]
        return [self.plotted[place][0] for place in find_front(points)]

    @property
    def unmeasured(self) -> list[str]:
        """Names of artifacts that lack details; by the gate's text, of those never measured."""
        return [e.manifest.name for e in self._apart if not self._list_elsewhere(e)]

    @property
    def elsewhere(self) -> list[str]:
        """Artifacts that were measured on something else, with what that is."""
        return [
            f"{entry.manifest.name} ({self._list_elsewhere(entry)[0].where})"
            for entry in self._apart
            if self._list_elsewhere(entry)
        ]

    @property
    def _apart(self) -> list[Entry]:
        return [entry for entry in self.entries if not entry.on(self.key)]

    def _list_elsewhere(self, entry: Entry) -> list[Measured]:
        """What counts as another measurement: where details are compared, only details."""
        is_gate = not any(measured.digest for _, measured in self.plotted)
        return [one for one in entry.measured if is_gate or one.digest]

    @property
    def heated(self) -> list[Heated]:
        """Artifacts whose matrices were measured on one text."""
        found = [Heated(entry, entry.list_tensors(self.heat_key)) for entry in self.entries]
        return [one for one in found if one.tensors]

    @property
    def heat_text(self) -> str:
        """The text of the matrices, where it is another one than that of the artifacts."""
        if self.heat_key == self.key:
            return ""
        found = (one for entry in self.entries for one in map(read_details, entry.details))
        return next((one.where for one in found if one.key == self.heat_key), "")

    @property
    def unheated(self) -> list[str]:
        """Artifacts whose matrices were measured on another text, with that text."""
        return [
            f"{entry.manifest.name} ({read_details(one).where})"
            for entry in self.entries
            if not entry.list_tensors(self.heat_key)
            for one in entry.details
            if _list_costs(one)
        ]


def _list_costs(details: Details) -> list[TensorError]:
    return [tensor for tensor in details.tensors if tensor.kl is not None]


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
    key = choose_text([entry.measured for entry in entries])
    return Content(
        entries=tuple(_sort_details(entry, key) for entry in entries),
        key=key,
        heat_key=_choose_heat(entries, key),
        benches=tuple(one for one in data.benches if one.name in digests),
        built=data.built,
        origins=data.origins,
        left_out=_list_left_out(data, digests),
        outdated=_list_outdated(data, digests),
    )


def _sort_details(entry: Entry, key: Key) -> Entry:
    """Those of the text first, of those the ones of the runtime."""
    found = [(read_details(one), one) for one in entry.details]
    found.sort(key=lambda pair: (pair[0].key != key, pair[0].is_weights_alone))
    return replace(entry, details=tuple(one for _, one in found))


def _choose_heat(entries: Sequence[Entry], key: Key) -> Key:
    """The artifacts' text if any matrices were measured on it, else that of most matrices."""
    keys = [
        found
        for entry in entries
        for found in {read_details(one).key for one in entry.details if _list_costs(one)}
    ]
    return key if key in keys or not keys else choose_key(keys)


def _list_left_out(data: Data, digests: dict[str, str]) -> tuple[str, ...]:
    """What the files hold of artifacts that are not on the page."""
    details = [f"details of {one.artifact}" for one in data.details if one.artifact not in digests]
    benches = [f"bench of {one.name}" for one in data.benches if one.name not in digests]
    return tuple(dict.fromkeys([*details, *benches]))


def _list_outdated(data: Data, digests: dict[str, str]) -> tuple[str, ...]:
    """What they hold of other builds of its artifacts; benches do not say their build."""
    return tuple(
        dict.fromkeys(
            f"details of {one.artifact}"
            for one in data.details
            if digests.get(one.artifact, one.manifest_digest) != one.manifest_digest
        )
    )


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
    measured = [read_details(one) for one in details if "mean KL" in one.summary]
    of_gate = read_gate(manifest)
    return Entry(label, manifest, tuple(measured + ([of_gate] if of_gate else [])), tuple(details))
