"""The runner as one zipapp; the same sources give the same bytes, whatever the host."""

import functools
import hashlib
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import toolkit.runner

PACKAGE = "phiship_runner"
LIMIT_BYTES = 200_000
# The earliest time a zip file can say.
EPOCH = (1980, 1, 1, 0, 0, 0)
ENTRY = f"import sys\n\nfrom {PACKAGE}.cli import main\n\nsys.exit(main(sys.argv[1:]))\n"


@dataclass(frozen=True)
class Runner:
    """The zipapp that is pushed to devices, and its sha256."""

    content: bytes
    sha256: str


@functools.cache
def pack_runner() -> Runner:
    """Pack toolkit.runner; its own imports are relative, so it runs under another name."""
    folder = Path(toolkit.runner.__file__).parent
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        _add(archive, "__main__.py", ENTRY.encode())
        for path in sorted(folder.rglob("*.py")):
            _add(archive, f"{PACKAGE}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    content = packed.getvalue()
    return Runner(content, hashlib.sha256(content).hexdigest())


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    """Add a file without time; deflate at a fixed level."""
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.external_attr = 0o644 << 16
    # Line ends as in the repository, also where git checks out others.
    content = content.replace(b"\r\n", b"\n")
    archive.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=9)
