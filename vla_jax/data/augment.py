"""Random crop and colour jitter, a pure function of the run's seed and the sample's number.

All pictures of a sample (cameras and earlier steps) are changed alike, so that what moves between them is motion; cameras on
a wrist keep their whole frame, since where the gripper stands in it means something.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

from vla_jax.config import Augment
from vla_jax.data import images, mixture

_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # the first row is luma
_RGB = np.linalg.inv(_YIQ)


@dataclasses.dataclass(frozen=True)
class Change:
    """crop: (top, left, height, width) as fractions of the picture; colour: f64[3 4], rgb' = colour @ (r, g, b, 1) in 0..255,
    or None to leave colours alone."""

    crop: tuple[float, float, float, float]
    colour: np.ndarray | None

    def numbers(self) -> np.ndarray:
        """f32[16]: crop and colour, as the device takes them."""
        colour = np.eye(3, 4) if self.colour is None else self.colour
        return np.concatenate([self.crop, colour.reshape(-1)]).astype(np.float32)


IDENTITY = Change((0.0, 0.0, 1.0, 1.0), None)


@dataclasses.dataclass(frozen=True)
class Augmenter:
    settings: Augment
    seed: int

    @property
    def active(self) -> bool:
        s = self.settings
        return s.crop < 1 or max(s.brightness, s.contrast, s.saturation, s.hue) > 0

    def changes(self, sample_ids: np.ndarray) -> list[Change]:
        """What happens to the pictures of each sample."""
        s, u = self.settings, _uniform(self.seed, sample_ids, 7)
        side = np.sqrt(s.crop + (1 - s.crop) * u[:, 0])
        crops = np.stack([u[:, 1] * (1 - side), u[:, 2] * (1 - side), side, side], axis=1).tolist()
        colours = self._colours(*(2 * u[:, 3:] - 1).T) if max(s.brightness, s.contrast, s.saturation, s.hue) else [None] * len(crops)
        return [Change(tuple(crop), colour) for crop, colour in zip(crops, colours)]

    def of_view(self, change: Change, view: str) -> Change:
        """The same for one view: cameras on a wrist or a finger are not cropped unless asked for."""
        if view.startswith(("wrist", "finger")) and not self.settings.crop_wrist:
            return Change(IDENTITY.crop, change.colour)
        return change

    def _colours(self, brightness, contrast, saturation, hue) -> np.ndarray:
        """Brightness, contrast (about middle grey), saturation (about luma) and hue (a turn of the YIQ plane) are affine in RGB:
        f64[n 3 4]. Each argument is f64[n] in -1..1 and is multiplied by its setting."""
        s, n = self.settings, len(brightness)
        gain, shift = 1 + s.contrast * contrast, 255 * s.brightness * brightness
        keep, turn = 1 + s.saturation * saturation, 2 * np.pi * s.hue * hue
        spin = np.zeros((n, 3, 3))
        spin[:, 0, 0], spin[:, 1, 1], spin[:, 2, 2] = 1, np.cos(turn), np.cos(turn)
        spin[:, 2, 1], spin[:, 1, 2] = np.sin(turn), -np.sin(turn)
        linear = _RGB @ spin @ _YIQ @ (keep[:, None, None] * np.eye(3) + (1 - keep)[:, None, None] * _YIQ[0])
        offset = linear.sum(axis=2) * (gain * shift + 127.5 * (1 - gain))[:, None]
        return np.concatenate([linear * gain[:, None, None], offset[..., None]], axis=2)


def _uniform(seed: int, sample_ids: np.ndarray, n: int) -> np.ndarray:
    """f64[samples n] in [0, 1)."""
    return mixture.mix_keys(seed, mixture.AUGMENT, np.asarray(sample_ids)[:, None], np.arange(n)).astype(np.float64) / 2.0**64


def apply(image: np.ndarray, change: Change, size: int, resize: str, out: np.ndarray | None = None) -> np.ndarray:
    """u8[h w 3] -> u8[size size 3]: crop (to whole pixels), resize, colour."""
    h, w = image.shape[:2]
    top, left, height, width = change.crop
    tall, wide = max(round(height * h), 1), max(round(width * w), 1)
    y, x = min(round(top * h), h - tall), min(round(left * w), w - wide)
    part = image[y : y + tall, x : x + wide]
    if change.colour is None:
        return images.resize(part, size, resize, out)
    return cv2.transform(images.resize(part, size, resize), change.colour, dst=out)
