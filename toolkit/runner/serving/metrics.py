"""Counters in the text format of Prometheus (exposition format 0.0.4)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

# A graphics card's token takes milliseconds, a long prompt on a small board minutes.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
PREFIX = "phiship"


class Counter:
    """Counts by the values of its labels; from any thread."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.text = f"{PREFIX}_{name}_total", text
        self._labels = tuple(labels)
        self._counts: dict[tuple[str, ...], int] = {} if labels else {(): 0}
        self._turn = threading.Lock()

    def add(self, count: int, *values: str) -> None:
        """Add to the count of these label values."""
        with self._turn:
            self._counts[values] = self._counts.get(values, 0) + count

    def show(self) -> Iterator[str]:
        """Yield the lines of this counter."""
        with self._turn:
            counts = sorted(self._counts.items())
        yield from _head(self.name, self.text, "counter")
        for values, count in counts:
            labels = {name: values[place] for place, name in enumerate(self._labels)}
            yield f"{self.name}{_label(labels)} {count}"


class Histogram:
    """Counts durations by what they are at most; from any thread."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = f"{PREFIX}_{name}_seconds", text
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum_s = 0.0
        self._turn = threading.Lock()

    def add(self, seconds: float) -> None:
        """Take note of one duration."""
        place = sum(seconds > bound for bound in SECONDS)
        with self._turn:
            self._counts[place] += 1
            self._sum_s += seconds

    def show(self) -> Iterator[str]:
        """Yield the lines of this histogram."""
        with self._turn:
            counts, sum_s = list(self._counts), self._sum_s
        yield from _head(self.name, self.text, "histogram")
        bounds, below = (*SECONDS, "+Inf"), 0
        for place, count in enumerate(counts):
            below += count
            yield f'{self.name}_bucket{{le="{bounds[place]}"}} {below}'
        yield f"{self.name}_sum {sum_s:.9g}"
        yield f"{self.name}_count {below}"


class Metrics:
    """All that is counted while a server runs."""

    def __init__(self) -> None:
        self.requests = Counter("requests", "Requests answered.", ("route", "status"))
        self.answers = Counter("answers", "Answers by how they ended.", ("end",))
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts taken up.")
        self.new_tokens = Counter("generated_tokens", "Tokens generated.")
        self.queued = Histogram("queue", "Time that requests waited for their turn.")
        self.first = Histogram("time_to_first_token", "From a request's turn to its first token.")
        self.decode = Histogram("time_per_token", "Mean of an answer's tokens after the first.")
        self.tokens_per_second = 0.0  # of the newest answer
        self.answer_s = 1.0  # of answers, the newest counting most

    def note_answer(self, end: str, seconds: float, tokens: int, decode_s: float) -> None:
        """Take note of an answer that is over, however it ended."""
        self.answers.add(1, end)
        self.answer_s = 0.7 * self.answer_s + 0.3 * seconds
        if tokens > 1 and decode_s > 0:
            self.tokens_per_second = (tokens - 1) / decode_s
            self.decode.add(decode_s / (tokens - 1))

    def show(self, gauges: Mapping[str, tuple[str, float]], about: Mapping[str, str]) -> str:
        """Return the page: all counters, `gauges` of name to (help, value), and labels `about`."""
        lines: list[str] = []
        counters: Iterable[Counter | Histogram] = (
            *(self.requests, self.answers, self.prompt_tokens, self.new_tokens),
            *(self.queued, self.first, self.decode),
        )
        for counter in counters:
            lines += counter.show()
        rate = ("Decoding rate of the newest answer.", self.tokens_per_second)
        for name, (text, value) in {"tokens_per_second": rate, **gauges}.items():
            lines += _head(f"{PREFIX}_{name}", text, "gauge")
            lines.append(f"{PREFIX}_{name} {value:.12g}")
        lines += _head(f"{PREFIX}_info", "What runs here.", "gauge")
        lines.append(f"{PREFIX}_info{_label(about)} 1")
        return "\n".join(lines) + "\n"


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _label(values: Mapping[str, str]) -> str:
    texts = [f'{name}="{_escape(value)}"' for name, value in values.items()]
    return f"{{{','.join(texts)}}}" if texts else ""


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
