"""Bytes of files below one folder, wherever it is: a local path by `pread`, a URL (gs://, s3://, file://) by
TensorStore's key-value store. Everything that reads a dataset goes through here."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from vla_jax.types import UserError

_OPEN_FILES = 256  # handles kept open at once; a dataset may have thousands of shards
_REQUESTS = 4096  # concurrent requests that TensorStore is allowed; data.read_ahead decides how many there are


class Unreadable(Exception):
    """A file that is gone, too short, or whose store does not answer."""


class Store:
    """Read-only files below a folder or URL. Safe for any number of threads; open handles are shared.

    latency_s: every read takes so much longer: how a slow store would feel, for measurements.
    """

    def __init__(self, place: str | Path, *, latency_s: float = 0.0):
        """Raises: UserError when the URL cannot be opened."""
        self.url, self._latency_s = str(place).rstrip("/") or "/", latency_s
        self.path = None if "://" in self.url else Path(self.url).expanduser()
        self._kv = None if self.path else _open(self.url)
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return self.url

    def read(self, name: str, offset: int = 0, length: int | None = None, *, into: memoryview | None = None) -> bytes | memoryview:
        """`length` bytes from `offset` (to the end if None), where it can be done in the memory of `into` (at least `length` long):
        fresh memory for every picture costs more than the read. Raises: Unreadable."""
        if self._latency_s:
            time.sleep(self._latency_s)
        if self._kv is not None:
            asked = self._kv.read(name, byte_range=slice(offset, None if length is None else offset + length))
            return self._whole(self._answer(name, asked), name, offset, length)
        return self._whole(self._read_local(name, offset, length, into), name, offset, length)

    @property
    def far(self) -> bool:
        """Whether a read is answered late enough that it should be started ahead."""
        return self._kv is not None or self._latency_s > 0

    def start(self, name: str, offset: int, length: int) -> Callable[[], bytes]:
        """Asks for the bytes that `read` gives and returns at once; what is returned waits for them. No thread is spent on a
        request that is under way. Raises, when called: Unreadable."""
        if self._kv is not None:
            asked = self._kv.read(name, byte_range=slice(offset, offset + length))
            return lambda: self._whole(self._answer(name, asked), name, offset, length)
        due = time.monotonic() + self._latency_s

        def wait() -> bytes:
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            return self._whole(self._read_local(name, offset, length, None), name, offset, length)

        return wait

    def identity(self, name: str) -> str | None:
        """What changes when the file does: its size (local) or its store's generation; None when it is gone."""
        return self.identities([name])[name]

    def identities(self, names: list[str]) -> dict[str, str | None]:
        """`identity` of many files, asked for at once."""
        if self._kv is None:
            return {name: str(size) if (size := self.size(name)) is not None else None for name in names}
        asked = {name: self._kv.read(name, byte_range=slice(0, 1)) for name in names}
        out: dict[str, str | None] = {}
        for name, future in asked.items():
            try:
                found = future.result()
                out[name] = found.stamp.generation.hex() if found.state == "value" else None
            except Exception as e:  # an empty object has no first byte
                if "OUT_OF_RANGE" not in str(e):
                    raise UserError(f"{self.url}/{name} cannot be asked for: {' '.join(str(e).split())[:300]}") from e
                out[name] = "empty"
        return out

    def size(self, name: str) -> int | None:
        """Bytes of a local file; None where a store does not say, or there is no file."""
        try:
            found = (self.path / name).stat() if self.path else None
            return found.st_size if found and stat.S_ISREG(found.st_mode) else None
        except OSError:
            return None

    def names(self) -> list[str]:
        """What lies directly in the folder, sorted; [] when there is no such folder."""
        if self.path:
            return sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        try:
            keys = self._kv.list().result()
        except Exception as e:  # NotImplementedError where a store has no listing, as http(s) has none
            raise UserError(
                f"{self.url} cannot be listed: {' '.join(str(e).split())[:300]}. Use a local folder, gs://, s3:// or file://."
            ) from e
        return sorted({k.decode().lstrip("/").split("/")[0] for k in keys})

    def child(self, *parts: str) -> Store:
        return Store("/".join([self.url, *parts]), latency_s=self._latency_s)

    def close(self) -> None:
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def _read_local(self, name: str, offset: int, length: int | None, into: memoryview | None) -> bytes | memoryview:
        handle, keep = self._handles.get(name), True
        try:
            if handle is None:
                with self._lock:
                    handle = self._handles.get(name)
                    if handle is None:
                        handle = os.open(self.path / name, os.O_RDONLY)
                        keep = len(self._handles) < _OPEN_FILES
                        if keep:
                            self._handles[name] = handle
            try:
                if into is not None:
                    return into[: os.preadv(handle, [into[:length]], offset)]
                return os.pread(handle, os.fstat(handle).st_size - offset if length is None else length, offset)
            finally:
                if not keep:
                    os.close(handle)
        except (OSError, ValueError) as e:
            raise Unreadable(f"{self.url}/{name}: {getattr(e, 'strerror', None) or e}") from e

    def _whole(self, data, name: str, offset: int, length: int | None):
        if length is not None and len(data) != length:
            raise Unreadable(f"{self.url}/{name} ends before byte {offset + length}")
        return data

    def _answer(self, name: str, asked) -> bytes:
        try:
            found = asked.result()
        except Exception as e:  # TensorStore raises ValueError, OSError or RuntimeError by the store's answer
            raise Unreadable(f"{self.url}/{name}: {' '.join(str(e).split())[:200]}") from e
        if found.state != "value":
            raise Unreadable(f"{self.url}/{name} is not there")
        return found.value


def _open(url: str):
    import tensorstore as ts

    limit = {"limit": _REQUESTS}
    context = ts.Context({f"{kind}_request_concurrency": limit for kind in ("gcs", "s3")} | {"file_io_concurrency": limit})
    try:
        return ts.KvStore.open(url + "/", context=context).result()
    except Exception as e:
        raise UserError(f"{url} cannot be opened: {' '.join(str(e).split())[:300]}. Use a local folder, gs://, s3:// or file://.") from e
