"""Resizing and augmentation against TensorFlow, Pillow and plain numpy."""

import colorsys
import subprocess
import sys

import cv2
import numpy as np
import pytest

from vla_jax.config import Augment
from vla_jax.data import augment, images
from vla_jax.data.augment import Augmenter, Change

FULL = Augment(crop=0.7, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05)


def change(number, settings=FULL, *, seed=3, view="base") -> Change:
    a = Augmenter(settings, seed)
    return a.of_view(a.changes(np.array([number]))[0], view)


@pytest.fixture(scope="module")
def picture():
    """A photograph's spectrum, with fine detail that aliases."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth.astype(int) + rng.integers(-40, 41, smooth.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("mode", "antialias"), [("linear", False), ("antialias", True)])
@pytest.mark.parametrize("size", [64, 224, 320])
def test_resize_equals_tensorflow(picture, mode, antialias, size):
    """Both filters are those of tf.image.resize; fixed-point arithmetic and rounding leave one level, two for the
    antialiased one, which rounds after each axis."""
    tf = pytest.importorskip("tensorflow")
    want = tf.image.resize(picture, (size, size), "bilinear", antialias=antialias).numpy()
    got = images.resize(picture, size, mode).astype(float)
    assert np.abs(got - want).max() <= (2 if antialias else 1)
    out = np.zeros((size, size, 3), np.uint8)
    assert np.array_equal(images.resize(picture, size, mode, out), got) and np.array_equal(out, got)


def test_modes_differ_where_it_matters(picture):
    """On noise, shrinking four times: without antialiasing its spread stays, with it a quarter is left."""
    noise = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    spread = {mode: images.resize(noise, 64, mode).std() for mode in ("linear", "antialias")}
    assert spread["antialias"] < 0.5 * spread["linear"]
    assert np.array_equal(images.resize(noise, 256), noise)


def test_a_sample_is_changed_alike_in_all_views_and_always_the_same():
    same = lambda x, y: x.crop == y.crop and np.array_equal(x.colour, y.colour)
    base, again, side, wrist = (change(17, view=v) for v in ("base", "base", "side", "wrist"))
    assert same(base, again) and same(base, side)
    assert wrist.crop == (0, 0, 1, 1) and np.array_equal(wrist.colour, base.colour)
    assert not same(base, change(18)) and not same(base, change(17, seed=4))
    assert change(17, Augment(crop=0.7, crop_wrist=True), view="wrist").crop == base.crop
    many = Augmenter(FULL, 3).changes(np.arange(30))
    assert all(same(many[n], change(n)) for n in range(30))


def test_the_same_in_another_process():
    """A peer's augmentation depends on PYTHONHASHSEED."""
    code = (
        "from vla_jax.config import Augment\nfrom vla_jax.data.augment import Augmenter\n"
        "print([c.numbers().tolist() for c in Augmenter(Augment(crop=0.7, hue=0.1), 3).changes([17])])"
    )
    said = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, text=True, check=True).stdout
        for s in ("1", "2")
    }
    assert said == {f"{[change(17, Augment(crop=0.7, hue=0.1)).numbers().tolist()]}\n"}


def test_crops_cover_what_they_should():
    crops = np.array([c.crop for c in Augmenter(FULL, 0).changes(np.arange(2000))])
    area = crops[:, 2] * crops[:, 3]
    assert area.min() >= 0.7 and area.max() <= 1 and abs(area.mean() - 0.85) < 0.01
    assert (crops[:, :2] >= 0).all() and (crops[:, :2] + crops[:, 2:] <= 1 + 1e-12).all()
    assert np.allclose(crops[:, 2], crops[:, 3])


def test_colours_equal_a_plain_loop(picture):
    """Brightness, contrast, saturation and hue one after another in float; hue by colorsys' YIQ."""
    settings, small = Augment(brightness=0.1, contrast=0.3, saturation=0.4, hue=0.1), picture[::20, ::20]
    for n in range(10):
        _, _, _, b, c, s, h = augment._uniform(5, [n], 7)[0] * 2 - 1
        want = np.zeros(small.shape)
        for i, row in enumerate(small / 255.0):
            for j, rgb in enumerate(row):
                rgb = (rgb + 0.1 * b - 0.5) * (1 + 0.3 * c) + 0.5
                luma = rgb @ [0.299, 0.587, 0.114]
                y, *iq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]]) @ (
                    luma + (rgb - luma) * (1 + 0.4 * s)
                )
                turn = np.exp(1j * 2 * np.pi * 0.1 * h) * complex(*iq)
                want[i, j] = np.linalg.solve(
                    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], [y, turn.real, turn.imag]
                )
        whole = change(n, settings, seed=5, view="wrist")
        got = augment.apply(np.ascontiguousarray(cv2.resize(small, (24, 24), interpolation=cv2.INTER_NEAREST)), whole, 24, "linear")
        want = cv2.resize(want, (24, 24), interpolation=cv2.INTER_NEAREST)
        assert np.abs(got - np.clip(want * 255, 0, 255)).max() <= 1
    grey = np.full((4, 4, 3), 90, np.uint8)  # hue and saturation leave grey as it is
    kept = augment.apply(grey, change(3, Augment(saturation=1, hue=0.5), seed=0), 4, "linear")
    assert np.abs(kept.astype(int) - 90).max() <= 1
    assert colorsys.rgb_to_yiq(1, 0, 0)[0] == pytest.approx(0.3, abs=0.01)


def test_crop_is_the_part_that_it_says(picture):
    out = augment.apply(picture, Change((0.25, 0.5, 0.5, 0.25), None), 40, "linear")
    assert np.array_equal(out, images.resize(picture[60:180, 160:240], 40))
    tiny = augment.apply(picture[:1, :1], Change((0.9, 0.9, 0.05, 0.05), None), 4, "linear")
    assert (tiny == picture[0, 0]).all()


def test_device_and_host_agree(picture):
    """The device crops the resized picture to fractions of a pixel, the host the recorded one to whole pixels: on a smooth
    picture (whose slope is below three levels a pixel) that is a few levels, on average less than one."""
    from vla_jax.data import feed

    smooth = cv2.GaussianBlur(cv2.resize(picture, (224, 224)), (0, 0), 12)
    changes = Augmenter(FULL, 1).changes(np.arange(6))
    device = np.asarray(feed.augment(np.tile(smooth, (2, 3, 1, 1, 1)), np.stack([c.numbers() for c in changes]).reshape(2, 3, 16)))
    for got, how in zip(device.reshape(6, 224, 224, 3), changes):
        want = augment.apply(smooth, how, 224, "linear")
        assert np.abs(got.astype(int) - want).mean() < 1 and np.abs(got.astype(int) - want).max() <= 5
    still = np.asarray(feed.augment(smooth[None, None], augment.IDENTITY.numbers()[None, None]))[0, 0]
    assert np.array_equal(still, smooth)
