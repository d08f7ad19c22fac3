"""Image bytes to pixels. JPEG by libjpeg-turbo, PNG by OpenCV; both release the interpreter lock."""

from __future__ import annotations

import zlib

import cv2
import numpy as np
import simplejpeg

from vla_jax.data import records
from vla_jax.data.rlds import Feature

cv2.setNumThreads(1)  # threads are ours: one per image
_MOST_PIXELS = 1 << 25  # that are decoded: 100 MB


class UndecodableImage(Exception):
    """The bytes are no image that can be decoded, or cannot be read. `cause` is a phrase to be counted by."""

    def __init__(self, detail: str, cause: str = "undecodable image"):
        super().__init__(detail)
        self.cause = cause


def decode(data: bytes | memoryview, feature: Feature | None = None, *, bgr: bool = False, into: np.ndarray | None = None) -> np.ndarray:
    """JPEG or PNG bytes -> u8[h w 3], RGB; or, where `feature` says that pixels are stored raw, those. bgr: whoever recorded
    it took red for blue, which is put right. into: u8[n] memory to use if it is of use (JPEG) and large enough.

    Raises: UndecodableImage.
    """
    if feature is not None and feature.kind == "tensor":
        image = _raw(data, feature)
        return np.ascontiguousarray(image[..., ::-1]) if bgr else image
    try:
        if data[:2] == b"\xff\xd8":
            order = "BGR" if bgr else "RGB"
            if into is not None:
                try:
                    return simplejpeg.decode_jpeg(data, order, buffer=into)
                except ValueError:  # damaged, or larger than its features say: without the buffer it is one or the other
                    pass
            _bounded(*simplejpeg.decode_jpeg_header(data)[:2])
            return simplejpeg.decode_jpeg(data, order)
        if data[:4] != b"\x89PNG":
            raise ValueError(f"{len(data)} bytes that are neither JPEG nor PNG")
        _bounded(int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big"))
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR if bgr else cv2.IMREAD_COLOR_RGB)
    except (ValueError, MemoryError, cv2.error) as e:
        raise UndecodableImage(str(e)) from e
    if image is None:
        raise UndecodableImage("a damaged PNG")
    return image


def _bounded(height: int, width: int) -> None:
    """A damaged header may announce a picture that fills the memory. Raises: ValueError."""
    if height * width > _MOST_PIXELS:
        raise ValueError(f"a picture of {height} x {width} pixels; {_MOST_PIXELS} at most are decoded")


def _raw(data: bytes, feature: Feature) -> np.ndarray:
    """Pixels stored as bytes, as zlib-compressed bytes or as the varints of an integer list (TFDS encodings bytes, zlib, none)."""
    size = int(np.prod(feature.shape))
    try:
        if feature.encoding == "zlib":
            data = records.inflated(data, size)
        elif feature.encoding != "bytes":
            raw = np.frombuffer(data, np.uint8)
            ends = raw < 0x80  # a value of 128 to 255 takes two bytes, 0x80 | low seven bits and then 1
            low = raw & 0x7F
            data = (low[ends] | 0) if ends.all() else _two_byte(low, ends)
        pixels = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
    except (zlib.error, ValueError) as e:
        raise UndecodableImage(f"raw image: {e}") from e
    if pixels.size != size:
        raise UndecodableImage(f"raw image of {pixels.size} numbers, not {'x'.join(map(str, feature.shape))}")
    return pixels.reshape(feature.shape)


def _two_byte(low: np.ndarray, ends: np.ndarray) -> np.ndarray:
    at = np.flatnonzero(ends)
    first = np.concatenate([[0], at[:-1] + 1])
    if ((at - first) > 1).any():
        raise ValueError("a number above 255")
    return np.where(at > first, low[first] | ((low[at] & 1) << 7), low[at]).astype(np.uint8)


def resize(image: np.ndarray, size: int, mode: str = "linear", out: np.ndarray | None = None) -> np.ndarray:
    """u8[h w 3] -> u8[size size 3], into `out` if given.

    linear: two by two neighbours, as OpenCV and the loaders of Octo's forks do; the fastest, aliases when shrinking much.
    antialias: a triangle filter as wide as the shrinking asks for (Pillow's BILINEAR, `tf.image.resize(antialias=True)`).
    """
    if image.shape[:2] == (size, size):
        made = image
    elif mode == "antialias":
        from PIL import Image

        made = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BILINEAR))
    else:
        return cv2.resize(image, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
    if out is None:
        return made
    np.copyto(out, made)
    return out
