"""How far artifacts are from their source, and on which text they can be compared."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from toolkit.artifact import Manifest
from toolkit.check import LONG_ROPE_MARK
from toolkit.quality.details import Details
from toolkit.quality.probe import MOST_LENGTH
from toolkit.weights import RUNTIME as WEIGHTS_ALONE

GATE_TEXT = "the gate's own text"
LONG_ROPE = ", read with LongRoPE's long factors"
# What was read, and how many tokens of it were compared; 0 where that is not known.
Key = tuple[str, int]
NOTHING: Key = ("", 0)


@dataclass(frozen=True)
class Measured:
    """An artifact beside its source on one text; `errors` are standard errors, where known.

    The gate's text has no digest, and the number of its tokens is not known.
    """

    text: str
    digest: str
    tokens: int | None
    runtime: str
    values: dict[str, float]
    errors: dict[str, float]

    @property
    def key(self) -> Key:
        """Equal for measurements that can be compared."""
        return (self.digest or self.text, self.tokens or 0)

    @property
    def where(self) -> str:
        """What it was measured on, for a note."""
        return f"{self.tokens:,} tokens of {self.text}" if self.tokens else self.text

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


def read_gate(manifest: Manifest) -> Measured | None:
    """What the gate found when the artifact was built; None when it was not checked."""
    values = {measure.name: measure.value for measure in manifest.quality.measures}
    if "mean KL" not in values:
        return None
    errors = {one.name: one.error for one in manifest.quality.measures if one.error is not None}
    return Measured(_name_gate(manifest), "", None, manifest.quality.runtime, values, errors)


def _name_gate(manifest: Manifest) -> str:
    """The gate's text, with what makes it another one for this artifact."""
    name = GATE_TEXT
    context = min(manifest.context_length, manifest.valid_context[1] + 1)
    if context <= MOST_LENGTH:  # one place stays free
        name += f", cut for a context of {context} tokens"
    if manifest.plan.get("rope_factors") == "long":  # the source, too, was read with them
        name += LONG_ROPE
    return name


def read_details(details: Details) -> Measured:
    """What `check --details` found."""
    is_long = details.text_digest.endswith(LONG_ROPE_MARK)
    text = details.text + (LONG_ROPE if is_long else "")
    return Measured(
        text, details.text_digest, len(details.ids), details.runtime, details.summary,
        details.errors,
    )  # fmt: skip


def choose_text(artifacts: Sequence[Sequence[Measured]]) -> Key:
    """The text to compare by: of details that two artifacts have, or the only one; else any.

    Among those the one that most were measured on; of equals the longest.
    """
    counts = Counter(key for found in artifacts for key in {one.key for one in found})
    enough = min(2, len(artifacts))
    of_details = {one.key for found in artifacts for one in found if one.digest}
    return choose_key(
        [key for key in counts.elements() if key in of_details and counts[key] >= enough]
        or counts.elements()
    )


def choose_key(keys: Iterable[Key]) -> Key:
    """The key that is there most often; of equals that of the most tokens."""
    counts = Counter(keys)
    return max(
        counts, key=lambda key: (counts[key], key[1], key[0] == GATE_TEXT, key), default=NOTHING
    )
