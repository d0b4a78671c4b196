"""Which views a checkpoint is read through."""

from toolkit.checkpoint import Checkpoint, fp8
from toolkit.checkpoint.safetensors import FP8
from toolkit.checkpoint.split import fuse, is_split


def present(stored: Checkpoint) -> Checkpoint:
    """A checkpoint as everything above reads it; errors as of the views."""
    if any(info.dtype == FP8 for info in stored.tensors.values()):
        stored = fp8.decode(stored)
    return fuse(stored) if is_split(stored.config) else stored
