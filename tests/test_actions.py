"""FAST against scipy's DCT and HF's byte-pair encoder, and its properties; bins beside it where both must behave alike."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vla_jax.tokens import actions, bins, bpe, files
from vla_jax.types import UserError

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 9))
DTYPES = st.sampled_from([np.float16, np.float32, np.float64])


def smooth(rng, k, a):
    return np.clip(np.cumsum(rng.normal(0, 0.15, (k, a)), axis=0), -1, 1).astype(np.float32)


def corpus(seed=0, n=200):
    """Of three robots, so that one tokenizer serves several shapes."""
    rng = np.random.default_rng(seed)
    return [smooth(rng, k, a) for k, a in ((5, 7), (10, 3), (16, 8)) for _ in range(n)]


@pytest.fixture(scope="module")
def fitted():
    return actions.fit(corpus(), vocab_size=512, scale=10.0)


@pytest.fixture(scope="module")
def tokenizers(fitted):
    """Every kind of ours."""
    return {"fast": fitted, "bins": bins.uniform(), "quantile": bins.quantile(corpus())}


@pytest.fixture(params=["numba", "numpy"])
def engine(request, monkeypatch):
    """Both ways of merging."""
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(bpe, "_compiled", lambda: None)
    return request.param


def coefficients(fitted, chunk):
    return np.clip(actions.coefficients(chunk[None], fitted.scale)[0], fitted.min_coef, fitted.max_coef)


@pytest.mark.parametrize("k", [1, 2, 5, 16, 50])
def test_dct_equals_scipy(k):
    scipy_fft = pytest.importorskip("scipy.fft")
    x = np.random.default_rng(k).normal(size=(k, 3))
    np.testing.assert_allclose(actions.dct_matrix(k) @ x, scipy_fft.dct(x, axis=0, norm="ortho"), atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(SHAPES, DTYPES, st.data())
def test_round_trip_within_the_quantisation_bound(fitted, shape, dtype, data):
    """Rounding errs by at most 0.5/scale a coefficient, and the transform keeps lengths: rms <= 0.5/scale. Holds where
    nothing was clamped; 1e-6 is float32's share."""
    chunk = data.draw(hnp.arrays(dtype, shape, elements=st.floats(-1, 1, width=16)))
    ids = fitted.encode(chunk)
    assert ids.dtype == np.int32 and ((ids >= 0) & (ids < fitted.vocab_size)).all()
    back, valid = fitted.decode(ids, steps=shape[0], dims=shape[1])
    assert valid and back.shape == chunk.shape and back.dtype == np.float32
    if fitted.clamps(chunk[None]) == (0, 0):
        assert np.sqrt(np.mean((back - chunk.astype(np.float64)) ** 2)) <= 0.5 / fitted.scale + 1e-6


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.data())
def test_extreme_values_are_clamped_counted_and_decode(tokenizers, shape, data):
    """Whatever finite numbers come, the ids are a chunk of that shape, and what was out of range is counted on its side."""
    chunk = data.draw(hnp.arrays(np.float64, shape, elements=st.floats(allow_nan=False, allow_infinity=False)))
    for kind, t in tokenizers.items():
        back, valid = t.decode(t.encode(chunk), steps=shape[0], dims=shape[1])
        assert valid and np.isfinite(back).all(), kind
        low, high = t.clamps(chunk[None])
        if kind == "fast":
            plain = np.rint(actions.dct_matrix(shape[0]) * t.scale @ np.clip(chunk, -1e30, 1e30))
            assert (low, high) == ((plain < t.min_coef).sum(), (plain > t.max_coef).sum())
        else:
            assert (low, high) == ((chunk < t.edges[0]).sum(), (chunk > t.edges[-1]).sum())


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.integers(0, 2**31), st.integers(0, 2**31))
def test_encode_is_injective_on_coefficients(fitted, shape, one, other):
    """Ids spell the coefficients back, so different coefficients have different ids."""
    rng = np.random.default_rng([one, other])
    wanted = rng.integers(fitted.min_coef, fitted.max_coef + 1, shape)
    chunk = actions.dct_matrix(shape[0]).T @ (wanted / fitted.scale)
    ids = fitted.encode(chunk)
    spelt = actions.spell_out(ids.astype(np.int64), fitted._bpe.expanded) + fitted.min_coef
    assert np.array_equal(spelt, wanted.reshape(-1))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(tokenizers, bad):
    chunk = np.zeros((5, 7), np.float32)
    chunk[2, 3] = bad
    for t in tokenizers.values():
        with pytest.raises(ValueError, match="1 of 35 numbers are not"):
            t.encode(chunk)
        for odd in (np.zeros(5), np.zeros((0, 7)), np.zeros((3, 0)), np.array([["a"]]), np.zeros((2, 2), complex)):
            with pytest.raises(ValueError, match="action chunks must be"):
                t.encode(odd)


def test_many_blocks_no_chunks_and_any_order_of_memory(tokenizers, monkeypatch):
    """Ties (seed 770 of 25 x 9 has some) round alike in any layout of memory; the last block may be smaller."""
    rng = np.random.default_rng(770)
    chunks = np.round(rng.normal(size=(7, 25, 9)), 1)
    for t in tokenizers.values():
        want = [t.encode(c).tolist() for c in chunks]
        monkeypatch.setattr(actions, "_BLOCK", 2 * 25 * 9)
        for order in (chunks, np.asfortranarray(chunks), chunks.transpose(1, 2, 0).copy().transpose(2, 0, 1)):
            assert [i.tolist() for i in t.encode_batch(order)] == want
            assert [t.encode(c).tolist() for c in order] == want
        together = t.decode_batch(want, steps=25, dims=9)[0]
        assert np.array_equal(together, np.stack([t.decode(i, steps=25, dims=9)[0] for i in want]))
        assert t.encode_batch(np.zeros((0, 25, 9))) == [] and t.decode_batch([], steps=25, dims=9)[0].shape == (0, 25, 9)
        with pytest.raises(ValueError, match="must be numbers"):
            t.encode_batch(np.zeros(0))
        ml_dtypes = pytest.importorskip("ml_dtypes")
        half = chunks.astype(ml_dtypes.bfloat16)
        assert np.array_equal(t.encode(half[0]), t.encode(half[0].astype(np.float64)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_batch_equals_loop(n, k, a, seed):
    """Runs of equal coefficients included, where merges overlap; compiled and not."""
    rng = np.random.default_rng(seed)
    fitted = actions.fit([np.round(rng.normal(size=(9, 3)) * 0.4, 1) for _ in range(30)], vocab_size=128, scale=5.0)
    chunks = np.where(rng.random((n, k, 1)) < 0.3, 0, np.round(rng.normal(size=(n, k, a)) * 0.4, 1)).astype(np.float32)
    made = {}
    for engine in (True, False):
        with pytest.MonkeyPatch.context() as m:
            if not engine:
                m.setattr(bpe, "_compiled", lambda: None)
            made[engine] = [x.tolist() for x in fitted.encode_batch(chunks)]
            assert made[engine] == [fitted.encode(c).tolist() for c in chunks]
    assert made[True] == made[False]
    for t in (fitted, bins.uniform(16)):
        ids = t.encode_batch(chunks)
        ids[0] = ids[0][:-1]  # one that is malformed among them
        together, valid = t.decode_batch(ids, steps=k, dims=a)
        alone = [t.decode(i, steps=k, dims=a) for i in ids]
        assert np.array_equal(together, np.stack([c for c, _ in alone])) and valid.tolist() == [v for _, v in alone]
        assert not valid[0] and valid[1:].all()


def plain_bpe(ids, merges, wall):
    """One merge at a time: the earliest learned that applies, at its leftmost place."""
    ids = list(ids)
    while True:
        found = [(merges.index(p), i) for i, p in enumerate(zip(ids, ids[1:])) if p in merges]
        if not found:
            return [i for i in ids if i != wall]
        rank, at = min(found)
        ids[at : at + 2] = [result_of(merges, rank)]


def result_of(merges, rank):
    return merges.results[rank]


class Merges(list):
    results: list


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_merging_equals_one_at_a_time(data, seed):
    """Any table, also one as other programs write it: where a later merge makes what an earlier one needs; with walls. Twenty more
    tables by chance beside each one that hypothesis draws: the orders that matter are rare."""
    compare_with_plain(*drawn_table(data))
    for rng in (np.random.default_rng([seed, i]) for i in range(20)):
        size = int(rng.integers(4, 9))
        pairs = list(dict.fromkeys(map(tuple, rng.integers(0, size, (int(rng.integers(2, 9)), 2)).tolist())))
        merges = Merges(pairs)
        merges.results = [int(rng.choice([i for i in range(size) if i not in p])) for p in pairs]
        compare_with_plain(size, merges, [rng.integers(0, size + (rng.random() < 0.2), rng.integers(0, 30)).tolist() for _ in range(6)])


def drawn_table(data):
    alphabet, count = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 8))
    ids = st.integers(0, alphabet + count - 1)
    pairs = list(dict.fromkeys(data.draw(st.lists(st.tuples(ids, ids), max_size=count))))
    merges = Merges(pairs)
    # a result is never one of its own parts: a merge must shorten what it spells
    merges.results = [data.draw(ids.filter(lambda r, p=p: r not in p)) for p in pairs if alphabet + count > 2]
    if len(merges.results) < len(pairs):
        merges, pairs = Merges(), []
        merges.results = []
    size = alphabet + count
    rows = data.draw(st.lists(st.lists(st.integers(0, size), max_size=40), min_size=1, max_size=8))
    return size, merges, rows


def compare_with_plain(size, merges, rows):
    left, right = np.array(merges, np.int32).reshape(-1, 2).T
    table = bpe.Bpe(size, left.copy(), right.copy(), np.array(merges.results, np.int32))
    flat, start = actions.joined(rows)
    want = [plain_bpe(r, merges, size) for r in rows]
    for compiled in (True, False):
        with pytest.MonkeyPatch.context() as m:
            if not compiled:
                m.setattr(bpe, "_compiled", lambda: None)
            made, ends = table.encode(flat, start)
        assert [made[a:b].tolist() for a, b in zip(ends, ends[1:])] == want


def test_merges_are_byte_pair_encoding(fitted, engine):
    """The same merges in HF's `tokenizers` give the same ids."""
    hf = as_hf(fitted)
    rng = np.random.default_rng(1)
    for k, a in ((10, 7), (15, 7), (30, 26)):
        chunks = np.stack([smooth(rng, k, a) for _ in range(100)])
        whole = (np.stack([coefficients(fitted, c) for c in chunks]) - fitted.min_coef).astype(int)
        want = [hf.encode("".join(chr(0x4E00 + i) for i in row)).ids for row in whole]
        assert [ids.tolist() for ids in fitted.encode_batch(chunks)] == want


def as_hf(fitted):
    tokenizers = pytest.importorskip("tokenizers")
    spelt, start = fitted._bpe.expanded
    pieces = ["".join(chr(0x4E00 + c) for c in spelt[a:b]) for a, b in zip(start, start[1:])]
    assert len(set(pieces)) == len(pieces), "two merges spell the same piece, which HF's table cannot hold"
    merges = [(pieces[a], pieces[b]) for a, b in fitted.merges]
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=12), max_size=12), st.integers(6, 16))
def test_learning_equals_counting_anew(rows, size):
    """Pair counts kept up to date against pairs counted from scratch before each merge."""
    flat, start = actions.joined(rows)
    found = bpe.learn(flat.astype(np.int32), start, alphabet=6, size=size)
    seqs = [list(r) for r in rows]
    for left, right, new in zip(found.left, found.right, found.result):
        counts = {}
        for s in seqs:
            for pair in zip(s, s[1:]):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts.values())
        assert (left, right) == min(p for p, n in counts.items() if n == best) and best >= 2
        for i, s in enumerate(seqs):
            out, at = [], 0
            while at < len(s):
                hit = tuple(s[at : at + 2]) == (left, right)
                out.append(int(new) if hit else s[at])
                at += 2 if hit else 1
            seqs[i] = out
    if found.size < size:
        assert all(sum(tuple(s[i : i + 2]) == p for s in seqs for i in range(len(s) - 1)) < 2 for s in seqs for p in zip(s, s[1:]))


def test_it_compresses(fitted):
    rng = np.random.default_rng(2)
    assert np.mean([len(fitted.encode(smooth(rng, 16, 8))) for _ in range(50)]) < 0.7 * 16 * 8


def test_nothing_is_remembered_between_robots(fitted):
    """The published processor decodes with the shape of its last call; here another robot in between changes nothing."""
    rng = np.random.default_rng(5)
    a, b = smooth(rng, 5, 7), smooth(rng, 16, 8)
    ids = fitted.encode(a)
    before = fitted.decode(ids, steps=5, dims=7)
    fitted.decode(fitted.encode(b), steps=16, dims=8)
    assert np.array_equal(before[0], fitted.decode(ids, steps=5, dims=7)[0]) and before[1]
    assert not fitted.decode(ids, steps=16, dims=8)[1]


def test_malformed_sequences_are_reported_not_silent(tokenizers):
    chunk, last = smooth(np.random.default_rng(3), 5, 7), np.arange(7, dtype=np.float32) / 10
    for kind, t in tokenizers.items():
        ids = t.encode(chunk)
        good = t.decode(ids, steps=5, dims=7)[0]
        unknown = np.insert(ids, 3, t.vocab_size)
        for bad in (ids[:-1], np.concatenate([ids, ids[:1]]), unknown, np.append(ids, -1), np.zeros(0, int)):
            back, valid = t.decode(bad, steps=5, dims=7)
            assert not valid and back.shape == (5, 7) and np.isfinite(back).all(), kind
            held, valid = t.decode(bad, steps=5, dims=7, malformed="hold", last=last)
            assert not valid and np.array_equal(held, np.tile(last, (5, 1)))
            with pytest.raises(actions.MalformedTokens, match="5 x 7 = 35"):
                t.decode(bad, steps=5, dims=7, malformed="raise")
        assert np.array_equal(t.decode(unknown, steps=5, dims=7)[0], good)  # repaired: the unknown id is passed over
        assert np.array_equal(t.decode(np.concatenate([ids, ids]), steps=5, dims=7)[0], good)  # and what is too long is cut
        assert np.abs(t.decode(ids[:-1], steps=5, dims=7)[0] - good).max() < 0.6  # what is left of it, not zeros
        assert t.decode(ids, steps=5, dims=7, malformed="raise")[1]
        with pytest.raises(ValueError, match="needs last=: of each chunk the 7 finite numbers"):
            t.decode(ids[:-1], steps=5, dims=7, malformed="hold")
        for policy in (
            {"malformed": "zeros"},
            {"malformed": "hold"},
            {"malformed": "hold", "last": last * np.nan},
            {"malformed": "hold", "last": last[:6]},
        ):
            with pytest.raises(ValueError, match="allowed: repair, hold, raise|7 finite numbers"):
                t.decode(ids, steps=5, dims=7, **policy)  # refused at once, not at the first malformed sequence
        with pytest.raises(ValueError, match="holds no number"):
            t.decode(ids, steps=0, dims=7)
        both = np.stack([last, -last])
        held, valid = t.decode_batch([ids[:-1], ids[:0]], steps=5, dims=7, malformed="hold", last=both)
        assert np.array_equal(held, np.repeat(both[:, None], 5, axis=1)) and not valid.any()  # each its own
        held[0] = 1  # and it may be written to
        with pytest.raises(ValueError, match="whole numbers"):
            t.decode(["a"], steps=5, dims=7)


def test_repair_keeps_the_low_frequencies(fitted):
    """Cut short, the coefficients that are left are those of the slow motion: the repaired chunk follows the true one."""
    chunk = smooth(np.random.default_rng(6), 16, 8)
    ids = fitted.encode(chunk)
    back, valid = fitted.decode(ids[: len(ids) * 2 // 3], steps=16, dims=8)
    assert not valid and np.sqrt(np.mean((back - chunk) ** 2)) < 0.5 * np.sqrt(np.mean(chunk**2))


def test_save_load_and_damage(tokenizers, tmp_path):
    for kind, t in tokenizers.items():
        path = tmp_path / f"{kind}.json"
        files.save(t, path)
        assert files.load(path) == t
        values = json.loads(path.read_text())
        assert values["format"].startswith("vla_jax.") and path.stat().st_size < 40_000
        values["scale" if kind == "fast" else "centers"] = 11.0
        with pytest.raises(UserError, match="digest"):
            files.from_json(values)
    with pytest.raises(UserError, match="cannot be read"):
        files.load(tmp_path / "none.json")
    for odd in ([], {}, {"format": "other"}, {"format": "vla_jax.fast.1", "digest": "x"}):
        with pytest.raises(UserError):
            files.from_json(odd)


def hostile():
    """(what, body): files whose digest is right and whose content is not."""
    fast = {"format": actions.FORMAT, "scale": 10.0, "min_coef": 0, "max_coef": 1, "merges": []}
    for key, value in (
        ("scale", 1e308),
        ("scale", 1e-320),
        ("scale", -1.0),
        ("scale", float("nan")),
        ("scale", "x"),
        ("min_coef", -(10**12)),
        ("min_coef", float("-inf")),
        ("min_coef", 0.5),
        ("min_coef", 2),
        ("max_coef", 10**12),
        ("merges", [[0, 5]]),
        ("merges", [[0, 2]]),
        ("merges", [[-1, 0]]),
        ("merges", [[0.9, 1.9]]),
        ("merges", [[0, 1, 2]]),
        ("merges", 3),
        ("merges", [[i + 1 if i else 0, i + 1 if i else 0] for i in range(40)]),  # the last stands for 2^40 coefficients
    ):
        yield f"{key} {str(value)[:20]}", fast | {key: value}
    for edges, centers in (([0, 1, 1], [0.5, 1]), ([0, 1], [2]), ([float("-inf"), 0, 1], [-1, 0.5]), ([0], []), ([0, 1], []), (1, 2)):
        yield f"edges {edges}", {"format": bins.FORMAT, "edges": edges, "centers": centers}


@pytest.mark.parametrize("body", [b for _, b in hostile()], ids=[w for w, _ in hostile()])
def test_hostile_files_are_refused_at_the_door(body):
    with pytest.raises(UserError):
        files.from_json({**body, "digest": files._digest(body)})


def test_files_of_another_shape(tmp_path):
    deep = "[" * 990 + "]" * 990
    for odd in ("[]", "{}", '{"format": []}', '{"format": "vla_jax.fast.1", "merges": ' + deep + "}", deep, "\x00", "9" * 5000):
        (tmp_path / "t.json").write_text(odd)
        with pytest.raises(UserError):
            files.load(tmp_path / "t.json")


def test_ids_that_no_table_has_never_reach_compiled_code(fitted, engine):
    for bad in (-1, fitted.vocab_size + 1):
        with pytest.raises(ValueError, match="not all in"):
            fitted._bpe.encode(np.array([0, bad, 1]), np.array([0, 3]))


def test_numba_that_does_not_work_is_said_once_and_done_without(monkeypatch):
    from vla_jax.tokens import bpe_numba

    def broken(*, cache):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(bpe_numba, "compiled", broken)
    with pytest.warns(UserWarning, match="no space left.*encoded by numpy"):
        assert bpe._compiled.__wrapped__() is None


def test_numbers_that_are_not_normalised():
    with pytest.raises(UserError, match="not normalised"):
        actions.fit([np.full((1, 1), 1e9)], vocab_size=100, scale=10.0)


def test_margin_keeps_a_little_more_than_was_seen():
    seen = actions.fit([np.array([[1.0]]), np.array([[-1.0]])], vocab_size=100, scale=10.0)
    assert (seen.min_coef, seen.max_coef) == (-12, 12)
    assert actions.fit([np.array([[1.0]]), np.array([[-1.0]])], vocab_size=25, scale=10.0) == seen
    with pytest.raises(UserError, match="below the 25 coefficients"):
        actions.fit([np.array([[1.0]]), np.array([[-1.0]])], vocab_size=24, scale=10.0)


def test_vocabulary_too_small():
    with pytest.raises(UserError, match="action_vocab 4 is below"):
        actions.fit([np.ones((5, 2), np.float32)], vocab_size=4, scale=10.0)
    with pytest.raises(UserError, match="no action chunks"):
        actions.fit([], vocab_size=4, scale=10.0)


def test_uniform_bins_are_those_of_numpy():
    t, x = bins.uniform(256), np.random.default_rng(7).uniform(-1.2, 1.2, (50, 4, 3))
    want = np.clip(np.floor((x + 1) * 128), 0, 255).astype(int)
    assert np.array_equal(np.stack(t.encode_batch(x)), want.reshape(50, 12))
    back, valid = t.decode_batch(t.encode_batch(x), steps=4, dims=3)
    assert valid.all() and np.abs(back - np.clip(x, -1, 1)).max() <= 1 / 256 + 1e-6


def test_quantile_bins_hold_equally_many():
    rng = np.random.default_rng(8)
    chunks = [np.clip(rng.normal(0, 0.3, (10, 2)), -1, 1) for _ in range(300)]
    t = bins.quantile(chunks, 64)
    used = np.bincount(np.concatenate(t.encode_batch(np.stack(chunks))), minlength=t.vocab_size)
    assert t.vocab_size == 64 and used.min() > 0.7 * used.mean() and used.max() < 1.3 * used.mean()
    error = lambda t: np.abs(t.decode_batch(t.encode_batch(np.stack(chunks)), steps=10, dims=2)[0] - chunks).mean()
    assert error(t) < error(bins.uniform(64))  # finer where the numbers are


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 30))
def test_quantile_bins_keep_what_is_frequent_exact(seed, size, distinct):
    """Grippers, keyboards, constants: few values are each exact, and one that fills four bins stays exact among many others."""
    rng = np.random.default_rng(seed)
    values = rng.choice(np.round(rng.normal(size=200), 3), distinct)
    few = [rng.choice(values, (10, 3)) for _ in range(20)]
    t = bins.quantile(few, max(size, distinct))
    assert np.abs(t.decode_batch(t.encode_batch(np.stack(few)), steps=10, dims=3)[0] - np.stack(few)).max() < 1e-6
    assert t.clamps(np.stack(few)) == (0, 0)
    mixed = [np.where(rng.random((10, 3)) < 0.7, rng.choice([-1.0, 1.0], (10, 3)), rng.normal(0, 0.2, (10, 3))) for _ in range(100)]
    t = bins.quantile(mixed, max(size, 24))
    assert 4 < t.vocab_size <= max(size, 24)
    back = t.decode_batch(t.encode_batch(np.stack(mixed)), steps=10, dims=3)[0]
    often = np.abs(np.stack(mixed)) == 1
    assert np.abs(back - np.stack(mixed))[often].max() < 1e-6


def test_state_bins_are_openpis():
    """-1 below the range, 255 at and above its end: as numpy.digitize has it there."""
    state = np.array([-1.5, -1.0, -0.9999, -0.0001, 0.0, 0.5, 0.9999, 1.0, 7.0], np.float32)
    assert bins.state_text(state) == "-1 0 0 127 128 192 255 255 255"
    with pytest.raises(ValueError, match="holds NaN"):
        bins.state_text(np.array([0.0, np.nan]))
