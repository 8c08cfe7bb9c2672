"""The format of `/v1/embeddings`."""

from __future__ import annotations

import base64
import math
from array import array

from dynserve.sse import to_json
from dynserve.wire.requests import RenderOptions


def embedding_item(render: RenderOptions, vector: bytes) -> bytes:
    """Returns one item. `vector`: float32 of norm 1; a shortened vector is scaled to norm 1 again, as OpenAI does."""
    values = array("f", vector)
    if 0 < render.dimensions < len(values):
        values = values[: render.dimensions]
        length = math.sqrt(math.fsum(v * v for v in values))
        values = array("f", (v / length for v in values)) if length else values
    shown = base64.b64encode(values.tobytes()).decode() if render.base64 else values.tolist()
    return to_json({"object": "embedding", "index": render.index, "embedding": shown})
