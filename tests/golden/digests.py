"""How make_*.py write what a vendor's tool gives for every variant and scheme."""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.checkpoints import VARIANTS, write_random_checkpoint


def write_digests(
    golden: Path,
    made_by: str,
    versions: Mapping[str, str],
    schemes: Iterable[str],
    digest: Callable[[Path, str, Path], Mapping[str, str]],
) -> None:
    """Write `golden`; `digest` takes a checkpoint, a scheme and a folder to work in."""
    digests: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for variant in VARIANTS:
            checkpoint = write_random_checkpoint(work / variant, variant)
            digests[variant] = {scheme: digest(checkpoint, scheme, work) for scheme in schemes}
            print(variant, flush=True)
    content = {"made_by": made_by, "versions": dict(versions), "digests": digests}
    golden.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
