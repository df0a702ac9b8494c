"""Small pictures inside the page."""

from __future__ import annotations

import base64
import io

from PIL import Image

from ssl_pipeline.data.evaluation import EvaluationSet
from ssl_pipeline.data.shards.open import ShardIndex

SIDE = 72  # pixels


def thumbnail(index: ShardIndex, sample: int) -> str:
    """The centre of an image as the address of a JPEG that the page holds itself; DataError if it cannot be decoded."""
    image_CHW, _, _ = EvaluationSet(index, SIDE)[sample]
    file = io.BytesIO()
    Image.fromarray(image_CHW.permute(1, 2, 0).numpy()).save(file, format="jpeg", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
