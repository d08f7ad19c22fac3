"""FAST against scipy's DCT and HF's byte-pair encoder, and its properties."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vla_jax.tokens import actions
from vla_jax.types import UserError


def smooth(rng, k, a):
    return np.clip(np.cumsum(rng.normal(0, 0.15, (k, a)), axis=0), -1, 1).astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    return actions.fit([smooth(rng, k, a) for k, a in ((5, 7), (10, 3), (16, 8)) for _ in range(200)], vocab_size=512, scale=10.0)


@pytest.mark.parametrize("k", [1, 2, 5, 16, 50])
def test_dct_equals_scipy(k):
    scipy_fft = pytest.importorskip("scipy.fft")
    x = np.random.default_rng(k).normal(size=(k, 3))
    np.testing.assert_allclose(actions.dct_matrix(k) @ x, scipy_fft.dct(x, axis=0, norm="ortho"), atol=1e-12)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(1, 9)), elements=st.floats(-1, 1, width=32)))
def test_round_trip_within_the_quantisation_bound(fitted, chunk):
    """Rounding errs by at most 0.5/scale a coefficient, and the transform keeps lengths: rms <= 0.5/scale. Holds where
    nothing was clamped."""
    ids = fitted.encode(chunk)
    assert ((ids >= 0) & (ids < fitted.vocab_size)).all()
    back, valid = fitted.decode(ids, steps=chunk.shape[0], dims=chunk.shape[1])
    assert valid and back.shape == chunk.shape
    if fitted.clamped(chunk) == 0:
        assert np.sqrt(np.mean((back - chunk) ** 2)) <= 0.5 / fitted.scale + 1e-6


def test_merges_are_byte_pair_encoding(fitted):
    """The same merges in HF's `tokenizers` give the same ids."""
    tokenizers = pytest.importorskip("tokenizers")
    char = lambda i: chr(0x4E00 + i)
    pieces = ["".join(char(c) for c in e) for e in fitted._expanded]
    merges = [(pieces[a], pieces[b]) for a, b in fitted.merges]
    if len(set(pieces)) != len(pieces):
        pytest.skip("two merges spell the same piece, which HF's table cannot hold")
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    rng = np.random.default_rng(1)
    for _ in range(200):
        chunk = smooth(rng, 10, 7)
        c = np.clip(fitted.coefficients(chunk), fitted.min_coef, fitted.max_coef) - fitted.min_coef
        assert hf.encode("".join(map(char, c))).ids == fitted.encode(chunk).tolist()


def test_it_compresses(fitted):
    rng = np.random.default_rng(2)
    assert np.mean([len(fitted.encode(smooth(rng, 16, 8))) for _ in range(50)]) < 0.7 * 16 * 8


def test_malformed_sequences_are_reported_not_silent(fitted):
    ids = fitted.encode(smooth(np.random.default_rng(3), 5, 7))
    for bad in (ids[:-1], np.concatenate([ids, ids[:1]]), np.array([fitted.vocab_size]), np.zeros(0, int)):
        back, valid = fitted.decode(bad, steps=5, dims=7)
        assert not valid and back.shape == (5, 7) and np.isfinite(back).all()


def test_clamping_is_counted_and_decodes(fitted):
    big = np.full((16, 8), 40.0, np.float32)
    assert fitted.clamped(big) > 0
    assert fitted.decode(fitted.encode(big), steps=16, dims=8)[1]


def test_nan_is_refused(fitted):
    with pytest.raises(ValueError, match="finite"):
        fitted.encode(np.full((5, 7), np.nan))


def test_save_load_and_damage(fitted, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps(fitted.to_json()))
    assert actions.load(path) == fitted
    values = fitted.to_json()
    values["scale"] = 11.0
    with pytest.raises(UserError, match="digest"):
        actions.from_json(values)


def test_vocabulary_too_small():
    with pytest.raises(UserError, match="action_vocab 4 is below"):
        actions.fit([np.ones((5, 2), np.float32)], vocab_size=4, scale=10.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_batch_equals_loop(n, k, a, seed):
    """Runs of equal coefficients included, where merges overlap."""
    rng = np.random.default_rng(seed)
    fitted = actions.fit([np.round(rng.normal(size=(9, 3)) * 0.4, 1) for _ in range(30)], vocab_size=128, scale=5.0)
    chunks = np.where(rng.random((n, k, 1)) < 0.3, 0, np.round(rng.normal(size=(n, k, a)) * 0.4, 1)).astype(np.float32)
    assert [x.tolist() for x in fitted.encode_batch(chunks)] == [fitted.encode(c).tolist() for c in chunks]
