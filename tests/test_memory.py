"""Memory that is used again is never used twice at once."""

import numpy as np
import odd_rlds

from vla_jax.data import augment, build, pack, sample


def test_an_array_comes_back_only_when_nobody_holds_it():
    memory = pack.Memory(most=3)
    a = memory.empty((2, 3))
    place = a.ctypes.data
    b = memory.empty((2, 3))
    assert b.ctypes.data != place
    view = a[1:, 1:]
    del a
    c = memory.empty((2, 3))
    assert c.ctypes.data != place
    del view
    assert memory.empty((3, 2)).ctypes.data == place and memory.empty((4, 4)).shape == (4, 4)


def test_jax_keeps_what_it_took():
    """A batch on the device stays what it was when its numpy memory is asked for again."""
    import jax

    memory = pack.Memory()
    kept = []
    for i in range(8):
        x = memory.empty((256, 1024))
        x[...] = i
        kept.append(jax.device_put(x))
        del x
    assert [int(np.asarray(k).min()) for k in kept] == [int(np.asarray(k).max()) for k in kept] == list(range(8))


def test_pictures_do_not_share_a_threads_memory(tmp_path):
    """Every kind of picture, at its own size and at another, with and without memory of the caller's."""
    odd_rlds.record(tmp_path)
    ix = build.ensure(odd_rlds.card(), str(tmp_path), str(tmp_path / "ix"))
    for view in ix.views:
        for size in (12, 9):
            first, second = (sample.picture(ix, frame, view) for frame in (0, 8))
            alone = sample.pixels(ix, first, size=size, resize="linear").copy()
            held = sample.pixels(ix, first, size=size, resize="linear")
            sample.pixels(ix, second, size=size, resize="linear")
            out = np.zeros((size, size, 3), np.uint8)
            sample.pixels(ix, first, size=size, resize="linear", out=out)
            assert np.array_equal(held, alone) and np.array_equal(out, alone)
            for change in (augment.IDENTITY, augment.Change((0.1, 0.1, 0.8, 0.8), None)):
                changed = sample.pixels(ix, first, size=size, resize="linear", change=change)
                before = changed.copy()
                sample.pixels(ix, second, size=size, resize="linear")
                assert np.array_equal(changed, before)
