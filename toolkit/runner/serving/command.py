"""The command `serve`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..loading import loading
from ..manifest import read_manifest
from ..settings import read_settings
from .options import ServeOptions, open_listener, read_token
from .server import serve


def serve_artifact(
    artifact: Path, options: argparse.Namespace, given: dict[str, int | None]
) -> int:
    """Serve an artifact until a signal; Failure when it, or its address, cannot be had."""
    asked = ServeOptions(
        host=options.host,
        port=options.port,
        token=read_token(options.token_file),
        model=options.model,
        queue_size=options.queue,
        cors_origin=options.cors_origin,
        until_eof=options.until_eof,
        as_json=options.json,
    )
    manifest = read_manifest(artifact)
    settings = read_settings(artifact, manifest.context_length, **given)
    with open_listener(asked) as listener, loading(artifact, settings) as loaded:
        return serve(loaded, asked, listener)
