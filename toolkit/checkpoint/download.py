"""Large files of a hub, by ranges of plain HTTP: bytes that are on the disk are not sent again.

huggingface_hub 2 starts a file anew after an interruption, which for weights can mean gigabytes.
Here a file grows as `<sha256>.incomplete` in the hub's own cache and gets its name once its sha256
is right; after that huggingface_hub finds it there.
"""

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.artifact import hash_file
from toolkit.checkpoint.hub_errors import is_network_error
from toolkit.errors import CheckpointError
from toolkit.progress import Advance

FETCHERS = 4
ATTEMPTS_WITHOUT_PROGRESS = 5
READ_TIMEOUT_S = 20.0
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
# How long a fetcher that waits for the network may hold up the end of all of them.
FAREWELL_S = 1.0


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub: where it is, what it is, and where it goes. `lock` is the hub's own."""

    url: str
    size_bytes: int
    sha256: str
    path: Path
    lock: Path

    @property
    def partial(self) -> Path:
        """Where the file grows."""
        return self.path.with_name(f"{self.sha256}.incomplete")

    @property
    def missing_bytes(self) -> int:
        """What is still to be sent."""
        return 0 if self.path.exists() else max(0, self.size_bytes - self.present_bytes)

    @property
    def present_bytes(self) -> int:
        """What an interrupted download left."""
        return self.partial.stat().st_size if self.partial.exists() else 0


def fetch(files: Sequence[RemoteFile], headers: Mapping[str, str], advance: Advance) -> None:
    """Fetch every file, several at a time; `advance` is told the bytes, in the caller's thread.

    Raises what the first failing file raised. Whatever ends it, finished parts stay on the disk.
    """
    waiting = iter(files)
    answers: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set() and (file := next(waiting, None)):
                _fetch_file(file, headers, answers.put, stop)
            answers.put(None)
        except BaseException as error:
            answers.put(error)

    # Daemons: one that waits for the network must not keep the process from ending.
    threads = [threading.Thread(target=work, daemon=True) for _ in files[:FETCHERS]]
    try:
        for thread in threads:
            thread.start()
        _follow(answers, len(threads), advance)
    finally:
        stop.set()
        until_s = time.monotonic() + FAREWELL_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))


def _follow(
    answers: "queue.SimpleQueue[int | BaseException | None]", running: int, advance: Advance
) -> None:
    while running:
        try:
            # Without a timeout Windows would not notice Ctrl-C.
            answer = answers.get(timeout=1)
        except queue.Empty:
            continue
        if isinstance(answer, BaseException):
            raise answer
        if answer is None:
            running -= 1
        else:
            advance(answer)


def _fetch_file(
    file: RemoteFile,
    headers: Mapping[str, str],
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Bring one file to its end, through as many connections as it takes."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    file.lock.parent.mkdir(parents=True, exist_ok=True)
    file.path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(file.lock):
        failures = 0
        while file.missing_bytes and not stop.is_set():
            before_bytes = file.present_bytes
            try:
                _fetch_rest(file, headers, advance, stop)
            except Exception as error:
                failures = 1 if file.present_bytes > before_bytes else failures + 1
                if failures >= ATTEMPTS_WITHOUT_PROGRESS or not _is_transient(error):
                    raise
                stop.wait(min(2.0 ** (failures - 1), 10.0))
        if not stop.is_set() and not file.path.exists():
            _finish(file)


def _fetch_rest(
    file: RemoteFile,
    headers: Mapping[str, str],
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    from huggingface_hub import get_session, hf_raise_for_status

    start = file.present_bytes
    # Compression would make ranges count something else.
    wanted = {**headers, "Range": f"bytes={start}-", "Accept-Encoding": "identity"}
    session = get_session()
    with session.stream("GET", file.url, headers=wanted, timeout=READ_TIMEOUT_S) as response:
        hf_raise_for_status(response)
        is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if not is_rest:
            advance(-start)
        with file.partial.open("ab" if is_rest else "wb", buffering=0) as stream:
            for chunk in response.iter_bytes():
                if stop.is_set():
                    return
                stream.write(chunk)
                advance(len(chunk))


def _is_transient(error: Exception) -> bool:
    """True for what another try may mend: a cut or slow connection, a busy server."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUS
    return is_network_error(error)


def _finish(file: RemoteFile) -> None:
    if hash_file(file.partial) != file.sha256:
        file.partial.unlink()
        raise CheckpointError(
            f"{file.url}: what was received has another sha256 than {file.sha256}",
            advice="it was removed; run the same command again",
        )
    file.partial.replace(file.path)
