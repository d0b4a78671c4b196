"""What `bench` found on one machine, as the runner says it and as result files hold it."""

from pathlib import Path

import msgspec

from toolkit.errors import RunnerError, SettingsError

SCHEMA = 1


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Repeated measurements of one thing."""

    median: float
    least: float
    most: float


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One answer; `tokens_per_second` counts from its first token, None when that was the last."""

    first_token_seconds: float
    prompt_tokens_per_second: float
    tokens_per_second: float | None
    new_tokens: int
    reused_tokens: int | None = None


class Length(msgspec.Struct, frozen=True, kw_only=True):
    """All answers after prompts of one length, and the most memory once there was the first."""

    prompt_tokens: int
    first_token_seconds: Spread
    prompt_tokens_per_second: Spread
    tokens_per_second: Spread | None
    peak_memory_bytes: int
    runs: tuple[Run, ...]


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """A length that was not measured."""

    prompt_tokens: int
    reason: str


class State(msgspec.Struct, frozen=True, kw_only=True):
    """How hot and how fast a machine is at a moment; None for what it does not tell."""

    temperature_celsius: float | None
    throttled_now: tuple[str, ...] | None
    throttled_before: tuple[str, ...] | None
    clock_hertz: int | None


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where it was measured."""

    system: str
    machine: str
    board: str
    processor: str
    cpu_count: int | None
    memory_total_bytes: int | None
    python: str

    @property
    def title(self) -> str:
        """The board's own name; without one the processor's."""
        return self.board or self.processor or f"{self.system} {self.machine}"


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a question, and the likeliest token after each prefix of a fixed text."""

    text: str
    next_ids: tuple[int, ...]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One bench; `settings` hold None for what was left to the engine."""

    schema: int
    name: str
    engine: str
    provider: str
    settings: dict[str, int | None]
    started: str
    machine: Machine
    before: State
    after: State
    new_tokens: int
    load_seconds: float
    loaded_memory_bytes: int
    peak_memory_bytes: int
    available_memory_bytes: int | None
    lengths: tuple[Length, ...]
    skipped: tuple[Skipped, ...]
    judged: Judged | None = None
    place: str = ""

    @property
    def title(self) -> str:
        """What was measured and where, for a legend."""
        return f"{self.name}, {self.machine.title}"


def read_result(path: Path) -> Result:
    """Read a file of `bench --out`; SettingsError when it is none."""
    try:
        result = msgspec.json.decode(path.read_bytes(), type=Result)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise SettingsError(
            f"{path}: no result of a bench: {error}",
            advice="write one with: phiship bench ARTIFACT --out FILE.json",
        ) from None
    if result.schema != SCHEMA:
        raise SettingsError(f"{path}: schema {result.schema}; this phiship reads {SCHEMA}")
    return result


def convert_result(found: dict[str, object], place: str) -> Result:
    """Read what a runner printed; RunnerError when it is of another version."""
    try:
        return msgspec.convert({**found, "place": place}, Result)
    except msgspec.ValidationError as error:
        raise RunnerError(
            f"{place}: its runner's bench is of another version: {error}",
            advice="deploy the artifact again",
        ) from None
