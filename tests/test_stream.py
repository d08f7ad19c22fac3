import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.data import pack, source
from vla_jax.data.stream import Stream, initial_state
from vla_jax.types import IMAGE, UserError


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3), st.integers(1, 20)), min_size=1, max_size=20), st.integers(1, 4))
def test_placement_respects_every_limit(sizes, rows):
    limits, samples = (60, 4, 30), 3
    out = pack.place(sizes, rows, limits, samples)
    flat = [i for r in out for i in r]
    assert len(set(flat)) == len(flat) and 0 in flat
    for row in out:
        assert len(row) <= samples
        assert all(sum(sizes[i][k] for i in row) <= limits[k] for k in range(3))


@pytest.fixture(scope="module")
def opened(tabletop, tmp_path_factory):
    from vla_jax import config

    index = tmp_path_factory.mktemp("index")
    c, _ = config.load("configs/demo.py", [f"data.root={tabletop}", f"data.index_dir={index}", "pack.rows=8", "pack.group=2"])
    return source.open_source(c, tokens_per_image=16)


def take(src, n, **kw):
    with Stream(src, **kw) as s:
        return [next(s) for _ in range(n)]


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def test_resumed_stream_goes_on_exactly(opened):
    whole = take(opened, 6)
    rest = take(opened, 3, state=whole[2][1])
    assert all(same(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(whole[3:], rest))


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batch_does_not_depend_on_the_hosts(opened, processes):
    whole = take(opened, 4)
    parts = [take(opened, 4, process=i, processes=processes) for i in range(processes)]
    for step in range(4):
        for field in dataclasses.fields(whole[0][0]):
            if field.name == "change":  # nothing is augmented here
                continue
            joined = np.concatenate([getattr(p[step][0], field.name) for p in parts])
            assert np.array_equal(joined, getattr(whole[step][0], field.name)), field.name


def test_restart_from_two_hosts_to_four(opened):
    whole = take(opened, 5)
    two = [take(opened, 2, process=i, processes=2) for i in range(2)]
    state = np.concatenate([p[-1][1] for p in two])
    four = [take(opened, 3, process=i, processes=4, state=state[i : i + 1]) for i in range(4)]
    for step in range(3):
        assert np.array_equal(np.concatenate([p[step][0].sample_id for p in four]), whole[2 + step][0].sample_id)


def test_no_sample_is_lost_or_repeated(opened):
    batches = take(opened, 12)
    ids = np.concatenate([b.sample_id[b.sample_id >= 0] for b, _ in batches])
    waiting = batches[-1][1][:, 1:]
    seen = set(ids.tolist()) | set(waiting[waiting >= 0].tolist())
    assert len(set(ids.tolist())) == len(ids)
    groups = len(initial_state(opened.config))
    drawn = {g + k * groups for g in range(groups) for k in range(int(batches[-1][1][g, 0]))}
    assert seen == drawn


def test_rows_are_whole(opened):
    for batch, _ in take(opened, 3):
        assert batch.images.shape[1:] == (opened.config.pack.images, 48, 48, 3)
        per_image = opened.layout.tokens_per_image
        for r in range(len(batch.tokens)):
            assert (batch.tokens[r] == IMAGE).sum() % per_image == 0
            assert batch.segment[r].max() == (batch.dataset[r] >= 0).sum()
            for g in range(batch.segment[r].max()):
                on = batch.segment[r] == g + 1
                assert batch.position[r][on].tolist() == list(range(on.sum()))
                assert batch.loss_weight[r][on].sum() == pytest.approx(1, abs=1e-5)


def test_processes_that_do_not_divide_the_groups(opened):
    with pytest.raises(UserError, match="cannot be shared by 3 processes. Nearest: --config.pack.rows=6"):
        Stream(opened, processes=3)


def test_undecodable_image_is_skipped_and_counted(opened, monkeypatch):
    from vla_jax.data import images

    def fail(data, *rest, **options):
        raise images.UndecodableImage("broken on purpose")

    monkeypatch.setattr(images, "decode", fail)
    with Stream(opened) as s:
        batch, _ = next(s)
    assert (batch.dataset == -1).all() and sum(s.skipped.values()) > 0
    assert all(cause == "undecodable image" for _, cause in s.skipped)
