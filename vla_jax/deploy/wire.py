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
_MOST_DIMS, _DEEPEST = 8, 32
_PLAIN = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}  # bytes behind those of numbers
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}  # bytes of the size of bytes and text
_HOLDING = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}  # bytes of the length of lists and maps, items for each of it


class Malformed(ValueError):
    """Bytes that are no message; what is wrong with them, without them."""


def pack(message) -> bytes:
    """Dicts, lists, text (half a character becomes ?), bytes, numbers, arrays. Raises: TypeError for another type, ValueError for an array that holds no numbers."""
    return msgpack.packb(message, default=_written, unicode_errors="replace")


def unpack(data: bytes):
    """The inverse; arrays are views of `data` that cannot be written to. Raises: Malformed."""
    items(data)
    try:
        return msgpack.unpackb(
            data,
            object_hook=_read,
            ext_hook=_no_extension,
            max_array_len=_LONGEST,
            max_map_len=_LONGEST,
            max_ext_len=0,
        )
    except Malformed:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError, msgpack.UnpackException) as e:
        raise Malformed(f"no msgpack: {type(e).__name__}: {str(e)[:200]}") from None


def items(data: bytes) -> int:
    """How many values a message holds, with keys, lists and maps; up to where it is cut short or no msgpack. Made before any of them is, since
    msgpack tells of a list only when it ends. Raises: Malformed for too many, or too many lists within lists."""
    at, found, open_ = 0, 0, [1]  # how many values each list and map that has begun still lacks
    while open_:
        if not open_[-1]:
            open_.pop()
            continue
        if at >= len(data):
            break
        open_[-1] -= 1
        found += 1
        kind, at, holds = data[at], at + 1, 0
        if kind in _SIZED:
            size = _SIZED[kind]
            at += size + int.from_bytes(data[at : at + size])
        elif 0xA0 <= kind <= 0xBF:  # short text
            at += kind & 0x1F
        elif 0x80 <= kind <= 0x9F:  # short maps and lists
            holds = (kind & 0x0F) * (2 if kind < 0x90 else 1)
        elif kind in _HOLDING:
            size, each = _HOLDING[kind]
            holds, at = int.from_bytes(data[at : at + size]) * each, at + size
        elif kind in _PLAIN:
            at += _PLAIN[kind]
        elif kind == 0xC1 or 0xC7 <= kind <= 0xD8:  # not used, and extensions: msgpack ends here, too
            break
        if holds:
            open_.append(holds)
        if found > _ITEMS:
            raise Malformed(f"the message holds more than {_ITEMS} items: send numbers as arrays")
        if len(open_) > _DEEPEST:
            raise Malformed(f"the message has more than {_DEEPEST} lists and maps within each other")
    return found


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
