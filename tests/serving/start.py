"""Starts a server with limits of the test's choice, on a real model that may be made slow or fail.

    python -m tests.serving.start ARTIFACT '{"options": {...}, "limits": {...}, "delay_s": 0.01}'

The delay stands for a large model: tests can do things while an answer is on its way. `fail_after`
counts tokens, `fail_encoding` fails before; both stand for an engine that breaks.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from toolkit.runner.failure import Failure
from toolkit.runner.loading import loading
from toolkit.runner.manifest import read_manifest
from toolkit.runner.serving.options import Limits, ServeOptions, open_listener
from toolkit.runner.serving.server import serve
from toolkit.runner.settings import Settings


class Hampered:
    """A model that takes its time, or breaks."""

    def __init__(self, model: Any, asked: dict[str, Any]) -> None:
        self._model = model
        self._delay_s = asked.get("delay_s", 0.0)
        self._fail_after = asked.get("fail_after")
        self._fails_encoding = asked.get("fail_encoding", False)
        self.version, self.provider = model.version, model.provider

    def encode(self, text: str) -> list[int]:
        if self._fails_encoding:
            raise RuntimeError(f"cannot encode {text}")
        return list(self._model.encode(text))

    def generate(self, *arguments: Any, **seen: Any) -> Iterator[tuple[int, str]]:
        for count, item in enumerate(self._model.generate(*arguments, **seen)):
            if count == self._fail_after:
                raise RuntimeError("the engine broke")
            time.sleep(self._delay_s)
            yield item


def main(artifact: Path, asked: dict[str, Any]) -> int:
    options = ServeOptions(
        port=0,
        as_json=True,
        token=os.environ.get("TEST_TOKEN"),
        limits=Limits(**asked.get("limits", {})),
        **asked.get("options", {}),
    )
    manifest = read_manifest(artifact)
    # llama.cpp's threads wait for one another by spinning: on a machine with other work, two are
    # many times slower than one.
    threads = 1 if manifest.engine == "llama_cpp" else None
    settings = Settings(asked.get("context_tokens", manifest.context_length), threads)
    try:
        with open_listener(options) as listener, loading(artifact, settings) as loaded:
            hampered: Any = Hampered(loaded.model, asked)
            return serve(dataclasses.replace(loaded, model=hampered), options, listener)
    except Failure as failure:
        print(json.dumps({"error": failure.to_json()}))
        return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
