"""Records of a shard (TFRecord or ArrayRecord) and the tf.train.Example in each, without TensorFlow.

Values are not copied out of a record: the parser says where they lie, so that a frame can later be fetched by one ranged read.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import google_crc32c
import numpy as np

from vla_jax.data.store import Store, Unreadable
from vla_jax.types import UserError

_LARGEST = 1 << 31  # bytes; protobuf allows no message above 2 GiB, so a longer record is a broken length


class CorruptRecord(Exception):
    """A record that cannot be used. `cause` is one of a few phrases, to be counted by."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause} ({detail})" if detail else cause)
        self.cause = cause


def check_readable(store: Store, names: list[str]) -> None:
    """Raises: UserError when shards are of a kind that cannot be read from where they are, or with what is installed."""
    if any(".array_record" in name for name in names):
        try:
            import array_record.python.array_record_module  # noqa: F401
        except ImportError as e:
            raise UserError("ArrayRecord files need the package array-record: pip install 'vla-jax[rlds]'") from e
        if store.path is None:
            raise UserError(f"{store}: ArrayRecord is read from local disks only; copy the dataset, or use its TFRecord form")


def read_all(store: Store, name: str, expected: int) -> Iterator[tuple[int, bytes, int] | CorruptRecord]:
    """Every record of a shard: (where: byte offset of the payload in a TFRecord file, record number in an ArrayRecord file;
    payload; its masked checksum), or a CorruptRecord in its place. `expected` is how many the dataset says there are."""
    if name.split(".")[-1].startswith("array_record"):
        yield from _array_records(store, name)
    else:
        yield from _tfrecords(store, name, expected)


def _tfrecords(store: Store, name: str, expected: int):
    at, size, number = 0, store.size(name), 0
    if store.path and size is None:
        yield CorruptRecord("unreadable shard", f"{store}/{name} is no file, or cannot be read")
        return
    while number < expected or (at < size if size is not None else _more(store, name, at)):
        if at == size and number < expected:
            return  # whole, with fewer records than announced
        try:
            head = store.read(name, at, 12) if size is None or size - at >= 12 else b""
            if len(head) < 12:
                raise Unreadable("")
        except Unreadable:
            yield CorruptRecord("truncated record", f"{name}: no whole header at byte {at}")
            return
        if (length := _length(head)) is None:  # where the next record begins is not known any more
            yield CorruptRecord("length checksum mismatch", f"{name} at byte {at}")
            return
        try:
            if size is not None and at + 16 + length > size:
                raise Unreadable(f"{length} bytes announced, {size - at - 16} present")
            body = store.read(name, at + 12, length + 4)
        except Unreadable as e:
            yield CorruptRecord("truncated record", f"{name} at byte {at}: {e}")
            return
        payload, (stored,) = body[:length], struct.unpack("<I", body[length:])
        if stored != masked_crc(payload):
            yield CorruptRecord("payload checksum mismatch", f"{name} at byte {at}")
        else:
            yield at + 12, payload, stored
        at, number = at + 16 + length, number + 1


def checksums_at(store: Store, places: list[tuple[str, int]]) -> list[int | None]:
    """The stored checksum of each TFRecord whose payload begins there (file, byte); None where no record does. All are asked for at
    once: a far store answers in the time of two reads."""
    lengths = [_length(head) if head else None for head in _all(store, [(name, at - 12, 12) for name, at in places])]
    ends = [(name, at + length, 4) for (name, at), length in zip(places, lengths) if length is not None]
    found = iter(_all(store, ends))
    said = [next(found) if length is not None else None for length in lengths]
    return [struct.unpack("<I", end)[0] if end else None for end in said]


def _all(store: Store, spans: list[tuple[str, int, int]]) -> list[bytes | None]:
    asked, out = [store.start(*span) for span in spans], []
    for wait in asked:
        try:
            out.append(wait())
        except Unreadable:
            out.append(None)
    return out


def _length(head: bytes) -> int | None:
    """That of the record with this header of 12 bytes; None when it is no header."""
    (length,), (check,) = struct.unpack("<Q", head[:8]), struct.unpack("<I", head[8:])
    return length if check == masked_crc(head[:8]) and length <= _LARGEST else None


def inflated(data: bytes | memoryview, size: int) -> bytes:
    """zlib-compressed bytes, of which there should be `size`: never more than one more is made, so that a small record cannot fill
    the memory. Raises: zlib.error."""
    return zlib.decompressobj().decompress(data, size + 1)


def _more(store: Store, name: str, at: int) -> bool:
    """Whether there is a byte behind the announced records, where the store does not say how long the file is."""
    try:
        return len(store.read(name, at, 1)) == 1
    except Unreadable:
        return False


def _array_records(store: Store, name: str):
    try:
        reader = open_array_record(store, name)
        count = reader.num_records()
    except Unreadable as e:
        yield CorruptRecord("truncated record", str(e))
        return
    for i in range(count):
        try:
            payload = reader.read([i])[0]
        except (RuntimeError, ValueError, IndexError) as e:
            yield CorruptRecord("payload checksum mismatch", f"{name} record {i}: {e}")
            continue
        yield i, payload, masked_crc(payload)


def open_array_record(store: Store, name: str):
    """A reader of an ArrayRecord file on a local disk. Raises: Unreadable."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        return ArrayRecordReader(str(store.path / name))
    except (RuntimeError, ValueError, OSError) as e:
        raise Unreadable(f"{store}/{name}: {' '.join(str(e).split())[:200]}") from e


def masked_crc(data: bytes) -> int:
    """CRC32C as TFRecord files store it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class Example:
    """The named features of one serialised tf.train.Example; values are decoded when they are asked for."""

    def __init__(self, payload: bytes, wanted: frozenset[str]):
        """Raises: CorruptRecord when the bytes are no Example."""
        self.payload, self._where = payload, {}
        try:
            for field, start, end in _fields(payload, 0, len(payload)):
                if field == 1:
                    for entry, s, e in _fields(payload, start, end):
                        if entry == 1:
                            self._entry(s, e, wanted)
        except (IndexError, ValueError, UnicodeDecodeError) as e:
            raise CorruptRecord("no tf.train.Example", str(e)) from e

    def _entry(self, start: int, end: int, wanted: frozenset[str]) -> None:
        name, span = "", (start, start)
        for field, s, e in _fields(self.payload, start, end):
            if field == 1:
                name = self.payload[s:e].decode()
            elif field == 2:
                span = (s, e)
        if name in wanted:
            for kind, s, e in _fields(self.payload, *span):
                self._where[name] = kind, s, e

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def spans(self, name: str) -> np.ndarray:
        """i64[n 2]: offset in the payload and length of each value of a bytes list. Raises: CorruptRecord."""
        kind, at, end = self._where.get(name, (1, 0, 0))
        buf, out = self.payload, []
        if kind != 1:
            raise CorruptRecord("field of another type", f"{name} holds numbers")
        try:
            while at < end:
                if buf[at] != 0x0A:
                    raise ValueError(f"tag {buf[at]} in a bytes list")
                size, at = _varint(buf, at + 1, end)
                if at + size > end:
                    raise ValueError("a value passes its list's end")
                out.append((at, size))
                at += size
        except (IndexError, ValueError) as e:
            raise CorruptRecord("no tf.train.Example", f"{name}: {e}") from e
        return np.array(out, np.int64).reshape(-1, 2)

    def numbers(self, name: str) -> np.ndarray:
        """f32[n] of a float list, i64[n] of an integer list. Raises: CorruptRecord."""
        kind, start, end = self._where.get(name, (2, 0, 0))
        if kind == 1:
            raise CorruptRecord("field of another type", f"{name} holds bytes")
        try:
            parts = [self.payload[s:e] for field, s, e in _fields(self.payload, start, end) if field == 1]
            if kind == 2:
                return np.concatenate([np.frombuffer(p, "<f4") for p in parts]) if parts else np.zeros(0, np.float32)
            return np.concatenate([varints(p) for p in parts]) if parts else np.zeros(0, np.int64)
        except (IndexError, ValueError) as e:
            raise CorruptRecord("no tf.train.Example", f"{name}: {e}") from e

    def number_spans(self, name: str, per: int) -> np.ndarray:
        """i64[n 2]: where each run of `per` packed integers lies in the payload (an image stored raw). Raises: CorruptRecord."""
        kind, start, end = self._where.get(name, (3, 0, 0))
        try:
            found = [(s, e) for field, s, e in _fields(self.payload, start, end) if field == 1]
        except ValueError as e:
            raise CorruptRecord("no tf.train.Example", f"{name}: {e}") from e
        if kind != 3 or len(found) > 1:
            raise CorruptRecord("field of another type", f"{name} is no packed list of integers")
        if not found:
            return np.zeros((0, 2), np.int64)
        raw = np.frombuffer(self.payload, np.uint8)[found[0][0] : found[0][1]]
        ends = np.flatnonzero(raw < 0x80)[per - 1 :: per] + 1
        starts = np.concatenate([[0], ends[:-1]]) if ends.size else ends
        return np.stack([starts + found[0][0], ends - starts], axis=1).astype(np.int64)

    def texts(self, name: str) -> list[str]:
        """Values of a bytes list as text; what is not UTF-8 is replaced."""
        return [self.payload[a : a + n].decode("utf-8", "replace").strip() for a, n in self.spans(name).tolist()]

    def is_bytes(self, name: str) -> bool:
        return self._where.get(name, (1,))[0] == 1


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of every field of a message; of a varint field the span of its bytes."""
    while at < end:
        tag, at = _varint(data, at, end)
        wire = tag & 7
        if wire == 2:
            size, at = _varint(data, at, end)
        elif wire == 5:
            size = 4
        elif wire == 1:
            size = 8
        elif wire == 0:
            size = _varint(data, at, end)[1] - at
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > end:
            raise ValueError(f"field of {size} bytes passes its message's end")
        yield tag >> 3, at, at + size
        at += size


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise ValueError("unterminated varint")
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7


def varints(packed: bytes) -> np.ndarray:
    """Packed varints -> i64[n], vectorised over their bytes. Raises: ValueError when the last one has no end."""
    raw = np.frombuffer(packed, np.uint8)
    if not raw.size or raw.max() < 0x80:  # flags and small numbers: one byte each
        return raw.astype(np.int64)
    last = np.flatnonzero(raw < 0x80)
    if not last.size or last[-1] != raw.size - 1:
        raise ValueError("unterminated varint")
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() > 9:
        raise ValueError("varint of more than ten bytes")
    place = np.arange(raw.size) - np.repeat(first, last - first + 1)
    return np.add.reduceat((raw & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64), first).astype(np.int64)
