"""Image bytes to pixels. JPEG by libjpeg-turbo, the rest by OpenCV; both release the interpreter lock."""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg

cv2.setNumThreads(1)  # threads are ours: one per image


class UndecodableImage(Exception):
    """The bytes are no image that can be decoded."""


def decode(data: bytes) -> np.ndarray:
    """JPEG or PNG bytes -> u8[h w 3], RGB. Raises: UndecodableImage."""
    try:
        if data[:2] == b"\xff\xd8":
            return simplejpeg.decode_jpeg(data, "RGB")
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except (ValueError, cv2.error) as e:
        raise UndecodableImage(str(e)) from e
    if image is None:
        raise UndecodableImage(f"{len(data)} bytes that are neither JPEG nor PNG")
    return image


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """u8[h w 3] -> u8[size size 3]: area average when shrinking (no aliasing), linear when growing."""
    h, w = image.shape[:2]
    if (h, w) == (size, size):
        return image
    shrinks = h > size or w > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
