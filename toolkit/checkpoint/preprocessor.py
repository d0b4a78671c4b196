"""A vision checkpoint's preprocessor_config.json: how pictures become crops."""

from pathlib import Path

from toolkit.checkpoint.config import Config, read_json
from toolkit.errors import CheckpointError
from toolkit.vision import Preprocessing

PREPROCESSOR_FILE = "preprocessor_config.json"
CHANNELS = 3
MOST_CROPS = 64  # a picture of 9,500 tokens; the published models say 4 and 16


def read_preprocessing(path: Path) -> Preprocessing:
    """Read crops, mean and deviation; CheckpointError when the file is missing or says otherwise.

    Source: Phi3VImageProcessor of the published remote code.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing: a vision checkpoint says there how pictures are cut into crops",
            advice="copy it from the model that this checkpoint was made from",
        )
    config = Config(str(path), read_json(path))
    crops = config.integer("num_crops")
    if crops > MOST_CROPS:
        raise config.error("num_crops", crops, f"1 to {MOST_CROPS}")
    mean, std = (config.numbers(key, CHANNELS) for key in ("image_mean", "image_std"))
    return Preprocessing(crops, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
