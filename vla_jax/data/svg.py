"""Small drawings for HTML pages, as text: histograms, lines and pictures. Whatever numbers come, the text is well formed."""

from __future__ import annotations

import base64
import html
import math

import cv2
import numpy as np

BLUE, PALE, GREY, RED = "#2f6db3", "#e3edf8", "#b6bcc4", "#c4501b"


def number(x: float) -> str:
    """Four digits at most; never the text of a NaN."""
    if not math.isfinite(x):
        return "-"
    return f"{x:.0f}" if abs(x) >= 9999.5 else "0" if x == 0 else f"{x:.4g}"


def _p(x: float) -> str:
    return f"{np.clip(np.nan_to_num(x), -9999, 9999):.1f}".removesuffix(".0")


def _open(width: int, height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{html.escape(label)}">'


def _text(x: float, y: float, said: str, anchor: str = "start", colour: str = "#6b7480") -> str:
    return f'<text x="{_p(x)}" y="{_p(y)}" text-anchor="{anchor}" fill="{colour}">{html.escape(said)}</text>'


def histogram(counts, low: float, high: float, *, marks=(), width: int = 140, height: int = 76, label: str = "") -> str:
    """Bars over low..high; marks: numbers shown as red lines, those outside at the edge."""
    counts, floor = np.asarray(counts, np.float64), height - 14
    most, step = max(counts.max(initial=0), 1), width / max(len(counts), 1)
    out = [_open(width, height, f"{label} histogram from {number(low)} to {number(high)}")]
    # a bar that holds anything is seen
    tall = np.where(counts > 0, np.maximum(counts / most * (floor - 3), 1.2), 0)
    bars = "".join(f"M{_p(i * step)} {floor}v{_p(-t)}h{_p(max(step - 0.4, 0.6))}v{_p(t)}z" for i, t in enumerate(tall) if t)
    out.append(f'<path d="{bars}" fill="{BLUE}"/><path d="M0 {floor}.5H{width}" stroke="{GREY}"/>')
    for x in marks:
        at = np.clip((x - low) / max(high - low, 1e-12), 0, 1) * (width - 1) + 0.5
        out.append(f'<path d="M{_p(at)} 0V{floor}" stroke="{RED}" stroke-dasharray="3 2"/>')
    out += [_text(0, height - 2, number(low)), _text(width, height - 2, number(high), "end"), "</svg>"]
    return "".join(out)


def whole_numbers(values, *, most_bins: int = 64) -> tuple[np.ndarray, float, float]:
    """(counts, low, high) for `histogram`: bins as wide as a whole number of values."""
    values = np.asarray(values, np.int64)
    if not len(values):
        return np.zeros(1, np.int64), 0.0, 1.0
    low, span = int(values.min()), int(np.ptp(values)) + 1
    wide = -(-span // most_bins)
    bins = max(-(-span // wide), 8)
    return np.bincount((values - low) // wide, minlength=bins), float(low), float(low + bins * wide)


def line(
    values, mask, *, band: tuple[float, float], limits: tuple[float, float], width: int = 140, height: int = 84, label: str = ""
) -> str:
    """Values over their steps, those whose mask is False in grey; band: shaded, limits: the least that the y axis spans."""
    values, mask = np.nan_to_num(np.asarray(values, np.float64)), np.asarray(mask, bool)
    low, high = min(limits[0], values.min()), max(limits[1], values.max())
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    y = lambda v: height - 15 - (np.clip(v, low, high) - low) / (high - low) * (height - 30)  # what is written stands above and below
    x = 3 + np.arange(len(values)) * (width - 6) / max(len(values) - 1, 1)
    out = [_open(width, height, f"{label} over {len(values)} steps")]
    top, bottom = float(y(band[1])), float(y(band[0]))
    out.append(f'<rect x="0" y="{_p(top)}" width="{width}" height="{_p(max(bottom - top, 0.5))}" fill="{PALE}"/>')
    if low < 0 < high:
        out.append(f'<path d="M0 {_p(float(y(0.0)))}H{width}" stroke="{GREY}" stroke-dasharray="2 3"/>')
    real = int(mask.sum())  # a chunk is real up to the episode's end
    spans = ((max(real - 1, 0), len(values), GREY), (0, real, BLUE))
    for first, end, colour in spans:
        points = " ".join(f"{_p(a)},{_p(b)}" for a, b in zip(x[first:end], y(values[first:end])))
        if end - first > 1:
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    for a, b, m in zip(x, y(values), mask) if len(values) <= 30 else ():
        out.append(f'<circle cx="{_p(a)}" cy="{_p(b)}" r="2" fill="{BLUE if m else GREY}"/>')
    out += [_text(0, 9, number(high)), _text(0, height - 2, number(low)), "</svg>"]
    return "".join(out)


def picture(image: np.ndarray, *, most: int = 128, label: str = "", quality: int = 84) -> str:
    """u8[h w 3] -> an <img> no larger than `most` pixels, holding itself as JPEG."""
    h, w = image.shape[:2]
    shrink = min(1.0, most / max(h, w))
    size = max(1, round(w * shrink)), max(1, round(h * shrink))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if shrink < 1 else image
    _, data = cv2.imencode(".jpg", cv2.cvtColor(np.ascontiguousarray(small), cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])
    shown = f' style="width:{round(most * w / max(h, w))}px"' if shrink == 1 and max(h, w) < most else ""
    code = base64.b64encode(data.tobytes()).decode()
    return f'<img alt="{html.escape(label)}" width="{size[0]}" height="{size[1]}"{shown} src="data:image/jpeg;base64,{code}">'
