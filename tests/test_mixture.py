import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.data.mixture import BLOCK, Sampler, _permute, mix_keys


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**60))
def test_permute_is_a_permutation(size, key):
    out = _permute(np.arange(size), np.full(size, size), mix_keys(key))
    assert sorted(out.tolist()) == list(range(size))


def test_draw_is_pure_and_order_free():
    s = Sampler.make(7, (100, 37, 1000), (1, 2, 0.5))
    n = np.arange(3 * BLOCK)
    whole = s.draw(n)
    for k in (0, 5, BLOCK - 1, BLOCK, 2 * BLOCK + 77):
        assert [int(x) for x in s.draw(np.array(k))] == [int(x[k]) for x in whole]
    shuffled = np.random.default_rng(0).permutation(n)
    assert all(np.array_equal(a, b[shuffled]) for a, b in zip(s.draw(shuffled), whole))


def test_every_frame_once_an_epoch_in_order_of_epochs():
    s = Sampler.make(3, (100, 37, 1000), (1, 2, 0.5))
    dataset, epoch, frame = s.draw(np.arange(2 * BLOCK))
    for d, size in enumerate(s.sizes):
        mine, when = frame[dataset == d], epoch[dataset == d]
        assert (np.diff(when) >= 0).all()
        for e in range(3):
            assert sorted(mine[when == e].tolist()) == list(range(size)) or e == when.max()
        assert not np.array_equal(mine[:size], mine[size : 2 * size])


def test_shares_follow_the_weights():
    s = Sampler.make(0, (10, 10, 10), (1, 2, 5))
    dataset, _, _ = s.draw(np.arange(4 * BLOCK))
    np.testing.assert_allclose(np.bincount(dataset) / (4 * BLOCK), np.array([1, 2, 5]) / 8, atol=1 / BLOCK)
    by_size = Sampler.make(0, (10, 30), (1, 1), times_size=True)
    np.testing.assert_allclose(np.array(by_size.quotas) / BLOCK, [0.25, 0.75], atol=1 / BLOCK)


def test_the_smallest_weight_is_drawn():
    """A share below 1 / BLOCK is rounded up to it, not down to nothing."""
    s = Sampler.make(0, [10] * 4, [1e-6] * 3 + [1])
    assert s.quotas == (1, 1, 1, BLOCK - 3)


def test_seeds_differ():
    a, b = (Sampler.make(seed, (1000,), (1,)).draw(np.arange(1000))[2] for seed in (0, 1))
    assert (a != b).mean() > 0.9
