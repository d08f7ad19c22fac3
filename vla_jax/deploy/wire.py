"""msgpack with numpy arrays in it, as openpi's client and server write it, byte for byte. Nothing that is read can run code.

An array is the map {"__ndarray__": true, "data": its bytes in C order, "dtype": "<f4", "shape": [..]} and a numpy scalar
{"__npgeneric__": true, "data": number, "dtype": ..}, the keys as msgpack's bytes. Only numbers and booleans are arrays here.
"""

from __future__ import annotations

import math
import re

import msgpack
import numpy as np

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_LONGEST, _ITEMS = 4096, 1 << 16  # of one list or map; of all together: a list of a million empty ones takes 60 times its bytes
_MOST_DIMS = 8


class Malformed(ValueError):
    """Bytes that are no message; what is wrong with them, without them."""


def pack(message) -> bytes:
    """Dicts, lists, text (half a character becomes ?), bytes, numbers, arrays. Raises: TypeError for another type, ValueError for an array that holds no numbers."""
    return msgpack.packb(message, default=_written, unicode_errors="replace")


def unpack(data: bytes):
    """The inverse; arrays are views of `data` that cannot be written to. Raises: Malformed."""
    left = _ITEMS

    def counted(items):
        nonlocal left
        left -= len(items) + 1
        if left < 0:
            raise Malformed(f"the message holds more than {_ITEMS} items: send numbers as arrays")
        return items

    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda found: _read(counted(found)),
            list_hook=counted,
            ext_hook=_no_extension,
            max_array_len=_LONGEST,
            max_map_len=_LONGEST,
            max_ext_len=0,
        )
    except Malformed:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException) as e:
        raise Malformed(f"no msgpack: {type(e).__name__}: {str(e)[:200]}") from None


def _written(x):
    if isinstance(x, np.ndarray | np.generic) and x.dtype.kind not in "biufU":
        raise ValueError(f"an array of {x.dtype} holds no numbers")
    if isinstance(x, np.ndarray):
        if x.dtype.kind == "U":
            raise ValueError("send text as text or lists of it, not as an array")
        return {b"__ndarray__": True, b"data": x.tobytes(), b"dtype": x.dtype.str, b"shape": x.shape}
    if isinstance(x, np.generic):
        return {b"__npgeneric__": True, b"data": x.item(), b"dtype": x.dtype.str}
    raise TypeError(f"{type(x).__name__} cannot be sent: dicts, lists, text, bytes, numbers and numpy arrays can")


def _read(found: dict):
    if b"__ndarray__" in found:
        return _array(found)
    if b"__npgeneric__" in found:
        value, dtype = found.get(b"data"), found.get(b"dtype")
        if isinstance(value, str):  # numpy's own kind of text
            return value
        if not isinstance(value, int | float):
            raise Malformed(f"a numpy scalar holds {type(value).__name__}")
        return _dtype(dtype).type(value)
    return found


def _array(found: dict) -> np.ndarray:
    data, shape, dtype = found.get(b"data"), found.get(b"shape"), _dtype(found.get(b"dtype"))
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > _MOST_DIMS:
        raise Malformed(f"an array needs data as bytes and a shape of at most {_MOST_DIMS} sizes")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise Malformed("an array's shape holds what is no size")
    if (want := math.prod(shape) * dtype.itemsize) != len(data):
        raise Malformed(f"an array of {dtype} {shape} has {want} bytes, {len(data)} came"[:300])
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(name) -> np.dtype:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise Malformed(f"dtype {str(name)[:40]!r} is none of numbers: bool, int, uint and float of numpy are")
    return np.dtype(name)


def _no_extension(code: int, _: bytes):
    raise Malformed(f"msgpack extension {code} is not used here")
