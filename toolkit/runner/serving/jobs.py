"""One model, one answer at a time: those who come meanwhile wait in a line with an end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import threading
import time
import traceback
from collections import deque

from ..answer import (
    Answer,
    Question,
    check_length,
    count_context,
    encode_pictures,
    encode_text,
    stream_answer,
)
from ..chat import render_chat
from ..failure import Failure
from ..images import Pixels, prepare, read_image
from ..loading import Loaded
from .api import Asked
from .metrics import Metrics
from .refusal import Gone, Refusal, refuse

RETRY_S = (1, 60)  # as OpenAI's clients take them
FAILURES = 3  # in a row, and the engine counts as broken


class Job:
    """A request's way through the line; made and taken from in the event loop's thread."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.answer = Answer()
        self.prompt_tokens = 0
        self.is_cancelled = False
        self.submitted_s = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | Exception | None] = asyncio.Queue()

    async def take(self) -> str | None:
        """Return the next text, None after the last; the first is empty, and says: it is my turn.

        Refusal when the engine or the request fails, Gone or Refusal as `cancel` was told.
        """
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def put(self, event: str | Exception | None) -> None:
        """Hand over text, None for the end, or why there is none; from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Line:
    """Those who wait, and the thread that answers them in turn."""

    def __init__(
        self, loaded: Loaded, metrics: Metrics, queue_size: int, answer_tokens: int
    ) -> None:
        self._loaded = loaded
        self._metrics = metrics
        self._queue_size = queue_size
        self._answer_tokens = answer_tokens
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._is_closed = False
        self._failures = 0
        self._changed = threading.Condition()
        # A daemon: an engine that never returns must not keep the process.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many wait, without the one being answered."""
        return len(self._waiting)

    @property
    def is_broken(self) -> bool:
        """Whether the engine failed so often in a row that the next answer will hardly come."""
        return self._failures >= FAILURES

    def submit(self, asked: Asked) -> Job:
        """Stand in line; Refusal 429 when it is full."""
        with self._changed:
            is_busy = self._running is not None or bool(self._waiting)
            if is_busy and len(self._waiting) >= self._queue_size:
                what = f"{len(self._waiting)} requests wait already"
                raise self.refuse_busy(what, "queue_full")
            job = Job(asked)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job, reason: Refusal | Gone) -> None:
        """End a job wherever it is; its taker gets `reason` at once."""
        job.is_cancelled = True
        job.put(reason)
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def clear(self, reason: Refusal) -> None:
        """End all jobs that wait for their turn."""
        for job in list(self._waiting):
            self.cancel(job, reason)

    def cancel_running(self, reason: Refusal) -> None:
        """End the job that is being answered, if there is one."""
        job = self._running
        if job:
            self.cancel(job, reason)

    def close(self, timeout_s: float) -> bool:
        """End the thread; False when the engine does not return in time."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def refuse_busy(self, what: str, code: str) -> Refusal:
        """Return a 429 that says when to come again: when those in line have their answers."""
        wait_s = self._metrics.answer_s * (len(self._waiting) + 1)
        seconds = min(max(math.ceil(wait_s), RETRY_S[0]), RETRY_S[1])
        return Refusal(
            429,
            f"{what}; try again in {seconds} s",
            code=code,
            headers=(("Retry-After", str(seconds)),),
        )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    return
                self._running = job = self._waiting.popleft()
            event = self._try(job)
            with self._changed:
                self._running = None
            job.put(event)

    def _try(self, job: Job) -> Refusal | None:
        """Answer a job; whatever fails becomes an event, and the thread lives on."""
        started_s = time.monotonic()
        self._metrics.queued.add(started_s - job.submitted_s)
        end = "failed"
        event: Refusal | None = None
        try:
            self._answer(job)
            end = "cancelled" if job.is_cancelled else job.answer.stop_reason
            self._failures = 0
        except Refusal as refusal:
            end, event = "refused", refusal
        except Exception as error:
            # Encoding sees the prompt, and may quote it; from there on there are only token ids.
            _log(error, str(error)[:500] if job.prompt_tokens else "(what it says is left out)")
            self._failures += 1
            event = Refusal(500, "the engine failed; the log says how", code="engine_failed")
        seconds, answer = time.monotonic() - started_s, job.answer
        self._metrics.note_answer(end, seconds, len(answer.token_ids), answer.decode_seconds)
        return event

    def _answer(self, job: Job) -> None:
        if job.is_cancelled:
            return
        try:
            prompt_ids, pixels = self._read(job.asked)
        except Failure as failure:
            if failure.kind == "runtime":  # Pillow is missing; the engine is well
                raise Refusal(501, str(failure), code="no_pictures_here") from None
            if failure.kind == "context":
                raise _refuse_length(failure, job.asked) from None
            if failure.kind != "request":
                raise
            raise refuse(str(failure), job.asked.prompt_field) from None
        if not prompt_ids:
            raise refuse("the prompt is empty", job.asked.prompt_field)
        max_tokens = self._bound_answer(len(prompt_ids), job.asked)
        job.prompt_tokens = len(prompt_ids)
        self._metrics.prompt_tokens.add(job.prompt_tokens)
        job.put("")
        asked = job.asked
        question = Question(
            prompt_ids, max_tokens, asked.sampling, asked.stops, not asked.is_chat, pixels
        )
        counted = 0
        with contextlib.closing(stream_answer(self._loaded, question, job.answer)) as stream:
            for piece in stream:
                counted = self._count(job.answer, counted)
                if job.is_cancelled:
                    return
                if piece:
                    job.put(piece)
        self._count(job.answer, counted)

    def _read(self, asked: Asked) -> tuple[list[int], Pixels | None]:
        """Return the prompt's ids, and its pictures; Failure `request` for what cannot be read."""
        manifest, text = self._loaded.manifest, asked.text
        if asked.is_chat:
            text = render_chat(manifest.chat, asked.messages)
        if not asked.pictures or manifest.vision is None:
            return encode_text(self._loaded, text), None
        # One at a time: decoded, a picture takes much more than its crops.
        pictures = (
            read_image(one if isinstance(one, bytes) else one.read(), f"picture {number}")
            for number, one in enumerate(asked.pictures, 1)
        )
        pixels = prepare(pictures, manifest.vision, count_context(self._loaded))
        return encode_pictures(self._loaded, text, pixels.counts), pixels

    def _count(self, answer: Answer, counted: int) -> int:
        new = len(answer.token_ids)
        if new and not counted:
            self._metrics.first.add(answer.first_token_seconds)
        self._metrics.new_tokens.add(new - counted)
        return new

    def _bound_answer(self, prompt_tokens: int, asked: Asked) -> int:
        """Return how many tokens the answer may have; Refusal when they do not fit."""
        rest = count_context(self._loaded) - prompt_tokens
        new_tokens = asked.max_tokens or max(1, min(rest, self._answer_tokens))
        try:
            check_length(self._loaded, prompt_tokens, new_tokens)
        except Failure as failure:
            raise _refuse_length(failure, asked) from None
        return new_tokens


def _refuse_length(failure: Failure, asked: Asked) -> Refusal:
    message, code = f"{failure}; {failure.advice}", "context_length_exceeded"
    return refuse(message, asked.prompt_field, code)


def _log(error: Exception, message: str) -> None:
    frames = "".join(traceback.format_tb(error.__traceback__))
    print(
        f"engine failed: {type(error).__name__}: {message}\n{frames}", file=sys.stderr, flush=True
    )
