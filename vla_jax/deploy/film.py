"""Pictures of an episode -> a video file: mp4 with PyAV where it is installed (extra `sim`), else an animated WebP."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LEAST = 192  # pixels of the shorter side: smaller pictures are enlarged by a whole factor


def write(frames: Sequence[np.ndarray], stem: Path, *, fps: float) -> Path:
    """u8[h w 3] RGB each -> STEM.mp4 or STEM.webp, whose folder is made. Raises: ValueError without frames."""
    if not len(frames):
        raise ValueError("a video needs a frame")
    stem.parent.mkdir(parents=True, exist_ok=True)
    factor = -(-LEAST // min(frames[0].shape[:2]))
    shown = [_even(np.repeat(np.repeat(f, factor, 0), factor, 1)) for f in frames]
    return _mp4(shown, Path(f"{stem}.mp4"), fps) if importlib.util.find_spec("av") else _webp(shown, Path(f"{stem}.webp"), fps)


def _even(frame: np.ndarray) -> np.ndarray:
    """H.264 halves the colour planes: an odd last row or column is left out."""
    return np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])


def _mp4(frames: list[np.ndarray], file: Path, fps: float) -> Path:
    from fractions import Fraction

    import av

    with av.open(str(file), "w", options={"movflags": "faststart"}) as box:
        stream = box.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "23", "preset": "veryfast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"  # the only one that every browser plays
        for frame in frames:
            box.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        box.mux(stream.encode())
    return file


def _webp(frames: list[np.ndarray], file: Path, fps: float) -> Path:
    from PIL import Image

    first, *rest = map(Image.fromarray, frames)
    first.save(file, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, quality=70, method=2)
    return file
