"""Whoever samples only from what the grammar allows ends with a chunk, and whatever a tokenizer writes is allowed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.tokens import actions, bins, published


def published_tokenizer():
    """Every byte, and merges that end within a character of two bytes or begin with its second."""
    letter = {byte: char for char, byte in published._byte_alphabet().items()}
    pieces, merges = list(letter.values()), []
    for raw in (b"\xc5\xa2", b"\xa2\xc5", b"\xc5\xa2\xc5", b"AB", b"\xa2A", b"A\xc5", b"\xc5\xa2\xc5\xa2"):
        whole = "".join(letter[b] for b in raw)
        for cut in range(1, len(whole)):
            if whole[:cut] in pieces and whole[cut:] in pieces:
                merges.append((whole[:cut], whole[cut:]))
                break
        pieces.append(whole)
    pieces.append("\u3000")  # a piece that no byte makes: never valid
    return published.PublishedFast(10.0, -50, tuple(pieces), tuple(m for m in merges if m[0] + m[1] in pieces), True)


def tokenizers():
    rng = np.random.default_rng(0)
    chunks = [np.clip(np.cumsum(rng.normal(0, 0.15, (8, 4)), axis=0), -1, 1) for _ in range(200)]
    return {
        "fast": actions.fit(chunks, vocab_size=256, scale=10.0),
        "bins": bins.uniform(32),
        "published": published_tokenizer(),
    }


ALL = tokenizers()


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=80, deadline=None)
@given(shape=st.tuples(st.integers(1, 7), st.integers(1, 6)), seed=st.integers(0, 2**31))
def test_a_sampler_cannot_leave_the_language(kind, shape, seed):
    """A model of no sense at all: each time a random id among those allowed, the rare ones as likely as the others."""
    t, rng, (steps, dims) = ALL[kind], np.random.default_rng(seed), shape
    g, ids, state, left = t.grammar, [], 0, steps * dims
    while state or left:
        allowed = np.flatnonzero(g.allowed(state, left))
        assert len(allowed), "the sampler is stuck"
        made = g.count[state, allowed], g.after[state, allowed]
        odd = allowed[(made[0] != 1) | (made[1] != 0)]
        ids.append(int(rng.choice(odd if len(odd) and rng.random() < 0.5 else allowed)))
        state, left = int(g.after[state, ids[-1]]), left - int(g.count[state, ids[-1]])
        assert len(ids) <= steps * dims * len(g.after)
    assert not g.allowed(state, left).any()
    assert g.accepts(ids, steps * dims) and t.decode(ids, steps=steps, dims=dims)[1]
    assert np.isfinite(t.decode(ids, steps=steps, dims=dims, malformed="raise")[0]).all()


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=80, deadline=None)
@given(shape=st.tuples(st.integers(1, 7), st.integers(1, 6)), seed=st.integers(0, 2**31))
def test_what_is_encoded_is_accepted(kind, shape, seed):
    t, chunk = ALL[kind], np.random.default_rng(seed).uniform(-1, 1, shape)
    ids = t.encode(chunk)
    assert t.grammar.accepts(ids, chunk.size)
    for wrong in (ids[:-1], np.append(ids, ids[-1:]), np.append(ids, -1), np.append(ids, t.vocab_size)):
        assert not t.grammar.accepts(wrong, chunk.size)


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=150, deadline=None)
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=st.integers(0, 2**31))
def test_accepted_is_exactly_what_decodes(kind, shape, seed):
    """Random ids, mostly no chunk: the grammar and the decoder agree on every one of them."""
    t, rng, (steps, dims) = ALL[kind], np.random.default_rng(seed), shape
    ids = rng.integers(0, t.vocab_size, rng.integers(1, 2 * steps * dims + 1))
    if kind == "published":  # more of those that matter
        ids = np.where(rng.random(len(ids)) < 0.7, rng.integers(t.vocab_size - 12, t.vocab_size, len(ids)), ids)
    assert t.grammar.accepts(ids, steps * dims) == t.decode(ids, steps=steps, dims=dims)[1]


def test_published_ids_may_end_within_a_number():
    g = ALL["published"].grammar
    assert g.after.shape[0] == 2 and (g.after == 1).any() and (g.after[1] == 0).any()
    first = int(np.flatnonzero((g.after[0] == 1) & (g.count[0] == 0))[0])
    assert not g.allowed(0, 0)[first] and g.allowed(0, 1)[first]  # the number that it begins must fit
