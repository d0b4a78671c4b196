"""The networks of an OpenVINO artifact that sees, run by OpenVINO itself, step by step.

openvino-genai's VLMPipeline takes them too, but prepares pictures otherwise than the source: here
ids and pixels are the source's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .images import Pixels

LANGUAGE = "openvino_language_model"
TEXT = "openvino_text_embeddings_model"
TOWER = "openvino_vision_embeddings_model"
PROJECTOR = "openvino_vision_projection_model"
KV_CACHE = "KV_CACHE_PRECISION"
AT_ONCE = 512  # tokens of a prompt: logits come for each of them, 128 KB with 32,064 tokens


class Sight:
    """The networks, loaded on one device; `properties` are OpenVINO's."""

    def __init__(self, openvino: Any, folder: Path, device: str, properties: Mapping[str, str]):
        core = openvino.Core()

        def load(name: str) -> Any:
            own = dict(properties)
            if name != LANGUAGE:
                own.pop(KV_CACHE, None)  # they have none
            return core.compile_model(folder / f"{name}.xml", device, own).create_infer_request()

        self._language, self._text = load(LANGUAGE), load(TEXT)
        self._tower, self._projector = load(TOWER), load(PROJECTOR)
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._separators = fields["sub_GN"][0][0][0], fields["glb_GN"][0][0]

    def forget(self) -> None:
        """Drop the cache: what comes next is a new text."""
        self._language.reset_state()

    def embed(self, ids: Sequence[int], pixels: Pixels | None = None) -> Any:
        """Rows that ids stand for, those below 0 the pictures' in order: float32 [n, hidden]."""
        import numpy as np

        tokens = np.maximum(np.array([list(ids)], np.int64), 0)
        rows = np.array(self._text.infer({"input_ids": tokens})["inputs_embeds"][0])
        if pixels is not None:
            rows[np.array(ids) < 0] = self.look(pixels)
        return rows

    def extend(self, rows: Any, before: int) -> Any:
        """float32 logits [n, vocabulary] of rows [n, hidden] behind `before` others."""
        import numpy as np

        count = before + len(rows)
        found = self._language.infer(
            {
                "inputs_embeds": rows[None],
                "attention_mask": np.ones((1, count), np.int64),
                "position_ids": np.arange(before, count, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        return np.array(found["logits"][0])

    def write(
        self, ids: Sequence[int], pixels: Pixels | None, switch: int | None,
        choose: Callable[[Any], int],
    ) -> Generator[int, None, None]:  # fmt: skip
        """Yield token ids behind ids, for ever, as `choose` takes them from logits [vocabulary].

        At `switch`, LongRoPE's, all is computed anew in one piece, as its source does: cached keys
        are of the short factors, and all must be of the long ones from there on.
        """
        import numpy as np

        self.forget()
        rows, before = self.embed(ids, pixels), 0
        while True:
            if switch is not None and before <= switch < len(rows):
                self.forget()
                before, step = 0, len(rows)
            else:
                step = AT_ONCE
            for start in range(before, len(rows), step):
                logits = self.extend(rows[start : start + step], start)
            before = len(rows)
            token = choose(logits[-1])
            yield token
            rows = np.concatenate([rows, self.embed([token])])

    def look(self, pixels: Pixels) -> Any:
        """What stands in the place of token embeddings: float32 [tokens of pictures, hidden]."""
        import numpy as np

        size = pixels.values.shape[-1]
        rows = []
        for values, (height, width) in zip(pixels.values, pixels.sizes // size, strict=True):
            crops, row_end, picture_end = self._project(values[: 1 + height * width])
            rows += [
                _lay_out(crops[1:], int(height), int(width), row_end),
                picture_end[None],
                _lay_out(crops[:1], 1, 1, row_end),
            ]
        return np.concatenate(rows)

    def _project(self, crops: Any) -> tuple[Any, Any, Any]:
        """Tokens of crops [n, side, side, hidden], and the projected separators.

        The projector reorders what the pipeline lays out wrongly; a picture of one crop it leaves
        as it is. So two crops go in as one such picture, the second as its global crop.
        """
        import numpy as np

        merged = [_merge(self._tower.infer({"pixel_values": c[None]}), np) for c in crops]
        side = len(merged[0])
        row, picture = (np.array(one, np.float32) for one in self._separators)
        found: list[Any] = []
        ends = row, picture
        for place in range(0, len(merged), 2):
            pair = merged[place], merged[min(place + 1, len(merged) - 1)]
            upper, lower = (_end_lines(one, row) for one in pair)
            lines = np.concatenate([upper, picture[None], lower])
            out = np.array(self._projector.infer({"input": lines[None]})["last_hidden_state"][0])
            ends = out[side], out[len(upper)]
            parts = out[: len(upper)], out[len(upper) + 1 :]
            found += [part.reshape(side, side + 1, -1)[:, :side] for part in parts]
        return np.stack(found[: len(merged)]), *ends


def _merge(found: Any, np: Any) -> Any:
    """A crop's patches, four side by side to a token: [side, side, merged width]."""
    patches = found["last_hidden_state"][0]
    side, width = int(len(patches) ** 0.5) // 2, patches.shape[-1]
    tokens = patches.reshape(side, 2, side, 2, width).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tokens.reshape(side, side, 4 * width))


def _end_lines(tokens: Any, end: Any) -> Any:
    """Lines of tokens [rows, columns, width] one behind the other, each with `end` behind it."""
    import numpy as np

    ends = np.broadcast_to(end, (len(tokens), 1, len(end)))
    return np.concatenate([tokens, ends], axis=1).reshape(-1, len(end))


def _lay_out(crops: Any, height: int, width: int, end: Any) -> Any:
    """Crops [height * width, side, side, hidden] as lines over the whole picture."""
    side, hidden = crops.shape[1], crops.shape[-1]
    grid = crops.reshape(height, width, side, side, hidden).transpose(0, 2, 1, 3, 4)
    return _end_lines(grid.reshape(height * side, width * side, hidden), end)
