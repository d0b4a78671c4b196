"""Which views a checkpoint is read through."""

from toolkit.checkpoint import Checkpoint
from toolkit.checkpoint.split import fuse, is_split


def present(stored: Checkpoint) -> Checkpoint:
    """A checkpoint as everything above reads it; errors as of the views."""
    return fuse(stored) if is_split(stored.config) else stored
