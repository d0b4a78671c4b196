"""The command `serve`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..loading import loading
from ..manifest import read_manifest
from ..settings import read_settings
from .options import Limits, ServeOptions, open_listener, read_token
from .pictures import BODY_BYTES
from .server import serve

# A token of text, escaped as JSON allows; longer bodies would hardly fit the context.
TOKEN_BYTES = 32
LEAST_BODY_BYTES = 1 << 20


def serve_artifact(
    artifact: Path, options: argparse.Namespace, given: dict[str, int | None]
) -> int:
    """Serve an artifact until a signal; Failure when it, or its address, cannot be had."""
    manifest = read_manifest(artifact)
    settings = read_settings(artifact, manifest.context_length, **given)
    least_bytes = BODY_BYTES if manifest.vision else LEAST_BODY_BYTES
    asked = ServeOptions(
        host=options.host,
        port=options.port,
        token=read_token(options.token_file),
        model=options.model,
        queue_size=options.queue,
        cors_origin=options.cors_origin,
        until_eof=options.until_eof,
        as_json=options.json,
        image_folder=options.image_folder,
        limits=Limits(body_bytes=max(least_bytes, TOKEN_BYTES * settings.context_tokens)),
    )
    with open_listener(asked) as listener, loading(artifact, settings) as loaded:
        return serve(loaded, asked, listener)
