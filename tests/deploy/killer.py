"""A Python that kills itself with SIGKILL before its Nth change of the device's files.

    python killer.py STATE -B -c CODE ROOT ...

STATE is a JSON file {"kill_at": N or null}; what was changed is listed in STATE.log, a line each.
It stands where a device's `python` is named, so the agent inside it is the real one.
"""

import json
import os
import signal
import sys
from pathlib import Path

# Where in an event's arguments the changed path stands, and the folder it is relative to.
PLACES = {
    "os.rename": (1, 3), "os.symlink": (1, 2), "os.remove": (0, 1), "os.mkdir": (0, 2),
    "os.rmdir": (0, 1), "os.chmod": (0, 2), "open": (0, None),
}  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

state, code, arguments = sys.argv[1], sys.argv[4], sys.argv[5:]
root = str(Path(arguments[0]).expanduser().absolute())
kill_at = json.loads(Path(state).read_text())["kill_at"]
log = Path(state + ".log").open("w")  # noqa: SIM115
count = 0


def find_path(event: str, given: tuple[object, ...]) -> str:
    """Return the path that an event changes; empty when it changes none."""
    if event not in PLACES or (event == "open" and not int(str(given[2] or 0)) & WRITING):
        return ""
    place, folder = PLACES[event]
    path = os.fsdecode(str(given[place]))
    if folder is not None and given[folder] != -1:
        path = os.readlink(f"/proc/self/fd/{given[folder]}") + "/" + path  # noqa: PTH115
    return os.path.abspath(path)  # noqa: PTH100 (links stay links)


def watch(event: str, given: tuple[object, ...]) -> None:
    """Count a change of a file below the root, or die before it."""
    global count
    path = find_path(event, given)
    if not path.startswith(root):
        return
    count += 1
    log.write(f"{event} {path}\n")
    log.flush()
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(watch)
sys.argv = ["-c", *arguments]
exec(code)
