"""Children of the agent and of this machine's commands: none outlives what asked for it."""

import os
import sys
import time
from pathlib import Path

import pytest

from toolkit.runner.agent.child import run_child
from toolkit.runner.agent.server import open_server
from toolkit.runner.failure import Failure

TALK = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, BrokenPipeError])
def test_child_ends_when_nobody_listens(interruption: type[BaseException]) -> None:
    """Ctrl-C does not reach it: it is in a group of its own."""
    found = []

    def take_line(line: bytes) -> None:
        found.append(int(line))
        raise interruption

    with pytest.raises(interruption):
        run_child([sys.executable, "-c", TALK], b"", 600, take_line)
    assert not is_alive(found[0])


def test_time_of_a_child_is_limited() -> None:
    started_s = time.monotonic()
    done = run_child([sys.executable, "-c", TALK], b"", 0.5)
    assert (done["timeout_s"], done["code"]) == (0.5, None)
    assert time.monotonic() - started_s < 300


def test_large_output_on_both_sides_blocks_nobody() -> None:
    program = "import sys; sys.stderr.write('e' * 3_000_000); print('o' * 3_000_000)"
    done = run_child([sys.executable, "-c", program], b"i" * 3_000_000, 60)
    assert (done["code"], len(done["stdout"]), len(done["stderr"])) == (0, 3_000_001, 2000)


def test_server_that_says_other_things_first() -> None:
    program = "print(7); print('[]'); print('hello'); import sys; sys.exit('no model')"
    with pytest.raises(Failure, match="exit code 1: no model"):
        open_server([sys.executable, "-c", program])
