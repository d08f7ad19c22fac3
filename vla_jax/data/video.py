"""Frames of a video at given times. The only importer of PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from vla_jax.data.demonstrations import Damaged

_FAULTS = (av.FFmpegError, OSError, ValueError, EOFError, IndexError, MemoryError)


def frames(path: Path, times: np.ndarray, tolerance_s: float) -> Iterator[np.ndarray]:
    """For each of `times` f64[n], in seconds and rising, the frame u8[h w 3] RGB whose own time is nearest, the earlier one of two
    equally near, as LeRobot has it. One frame is held at a time.

    Raises: Damaged when the file cannot be decoded, or no frame is within the tolerance.
    """
    decoded = _decode(path, float(times[0]))
    try:
        here, frame = next(decoded, (None, None))
        after, following = next(decoded, (None, None))
        for wanted in times.tolist():
            while after is not None and abs(after - wanted) < abs(here - wanted):
                here, frame = after, following
                after, following = next(decoded, (None, None))
            if here is None or not abs(here - wanted) < tolerance_s:
                nearest = "none" if here is None else f"{here:.6g} s"
                raise Damaged("no frame at that time", f"{path.name}: wanted {wanted:.6g} s, the nearest frame is at {nearest}")
            yield frame.to_ndarray(format="rgb24")
    except _FAULTS as e:
        raise Damaged("unreadable video", f"{path.name}: {' '.join(str(e).split())[:200]}") from e
    finally:
        decoded.close()


def _decode(path: Path, start: float) -> Iterator[tuple[float, av.VideoFrame]]:
    """Every frame from the key frame before `start` on, with its time in seconds. Raises: _FAULTS."""
    with av.open(str(path)) as file:
        if not file.streams.video:
            raise ValueError("it has no video")
        stream = file.streams.video[0]
        stream.thread_type = "AUTO"
        if start > 0:
            file.seek(int(start / stream.time_base), stream=stream)  # to the key frame before it
        for frame in file.decode(stream):
            if frame.pts is None or frame.is_corrupt:
                raise ValueError("a frame is damaged")
            yield float(frame.pts * frame.time_base), frame
