"""What all requests of a server share, and who may make them."""

from __future__ import annotations

import hashlib
import hmac
import time
from dataclasses import dataclass, field

from ..answer import count_context
from ..loading import Loaded
from ..memory import read_peak_memory_bytes
from .answers import Frame
from .api import Asked
from .bodies import Bodies
from .jobs import Line
from .metrics import Metrics
from .options import ServeOptions, is_loopback
from .refusal import Refusal
from .strict import show
from .wire import Head


@dataclass
class Service:
    """A model on offer; `connections` are open, `busy` of their requests are being answered.

    `bodies` are what all of them hold.
    """

    loaded: Loaded
    options: ServeOptions
    metrics: Metrics
    line: Line
    connections: int = 0
    busy: int = 0
    is_stopping: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Two servers of one fingerprint give the same answer to the same seed."""
        limits = self.options.limits
        # One body always fits, when there is no other.
        held_bytes = max(limits.held_bytes, limits.body_bytes)
        self.bodies = Bodies(held_bytes, limits.free_bytes, self.line.refuse_busy)
        digest = hashlib.sha256((self.loaded.artifact / "manifest.json").read_bytes())
        digest.update(f"{self.loaded.engine} {self.loaded.settings}".encode())
        self._fingerprint = f"fp_{digest.hexdigest()[:12]}"

    @property
    def model(self) -> str:
        """The name that requests may give."""
        return self.options.model or self.loaded.manifest.name

    @property
    def context_tokens(self) -> int:
        """What prompt and answer may have together."""
        return count_context(self.loaded)

    def make_frame(self, asked: Asked) -> Frame:
        """Return what the parts of one answer have in common."""
        return Frame(self.model, self._fingerprint, asked.is_chat, asked.includes_usage)

    def check_host(self, head: Head) -> None:
        """Raise Refusal for a name of another machine, where nothing but the address guards.

        A web page could give its own name this address, and speak to us through the browser of
        whoever opened it.
        """
        host = head.fields.get("host")
        if self.options.token is not None or host is None:
            return
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if not is_loopback(name.strip("[]")):
            raise Refusal(403, f"this server answers on localhost, not as {show(host)}")

    def check_token(self, head: Head) -> None:
        """Raise Refusal unless the request brings the token, if there is one."""
        if self.options.token is None:
            return
        scheme, _, token = head.fields.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(token.strip().encode(), self.options.token.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise Refusal(
                401,
                "the header Authorization has to be: Bearer, and the token of this server",
                code="invalid_api_key",
                headers=(("WWW-Authenticate", "Bearer"),),
            )

    def check_model(self, name: str) -> None:
        """Raise Refusal for another model, for whose answers these would be taken."""
        if name != self.model:
            message = f"the model {show(name)} is not here; this is {self.model}"
            raise Refusal(404, message, param="model", code="model_not_found")

    def tell_health(self) -> tuple[int, dict[str, str]]:
        """Return status and body of /health; anything but 200 means: ask another."""
        state = "stopping" if self.is_stopping else "failing" if self.line.is_broken else "ok"
        return (200 if state == "ok" else 503), {"status": state}

    def show_metrics(self) -> str:
        """Return the page of /metrics."""
        peak = float(read_peak_memory_bytes())
        gauges = {
            "queue_depth": ("Requests that wait for their turn.", float(self.line.depth)),
            "connections": ("Open connections.", float(self.connections)),
            "body_bytes": (
                "What requests under way hold, but for the first MiB of each.",
                float(self.bodies.held_bytes),
            ),
            "peak_memory_bytes": ("The most memory this process ever had.", peak),
            "load_seconds": ("What loading the model took.", self.loaded.load_seconds),
            "context_tokens": ("Room for prompt and answer.", float(self.context_tokens)),
        }
        about = {
            "model": self.model,
            "engine": self.loaded.engine,
            "provider": str(self.loaded.model.provider),
        }
        return self.metrics.show(gauges, about)
