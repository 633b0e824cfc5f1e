"""Pictures of the reports as ``data:`` addresses."""

from __future__ import annotations

import base64
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_SHORTEST_SIDE = 96  # pixels; smaller images are enlarged without smoothing, so that each pixel can be seen


def picture_uri(image: UInt8[np.ndarray, "height width channels"]) -> str:
    """An image as an address: large ones as WebP, small ones as PNG, enlarged by a whole factor."""
    picture = Image.fromarray(image)
    buffer = io.BytesIO()
    if min(picture.size) >= _SHORTEST_SIDE:
        picture.save(buffer, "WEBP", quality=90)
        return data_uri("image/webp", buffer.getvalue())
    factor = -(-_SHORTEST_SIDE // min(picture.size))
    size = (picture.width * factor, picture.height * factor)
    picture.resize(size, Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    return data_uri("image/png", buffer.getvalue())


def data_uri(kind: str, data: bytes) -> str:
    """Content as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
