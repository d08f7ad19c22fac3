import collections
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.data import augment, images, pack, source, stream
from vla_jax.data.stream import Stream, initial_state
from vla_jax.types import IMAGE, STATE, UserError


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


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4), st.just(0)), min_size=1, max_size=9))
def test_a_row_is_as_full_as_it_can_be(sizes):
    """Against trying every subset with the oldest item in it."""
    row = pack._fullest(sizes, list(range(len(sizes))), (60, 4, 0), 9)
    subsets = ((0, *rest) for n in range(len(sizes)) for rest in itertools.combinations(range(1, len(sizes)), n))
    sums = (tuple(sum(sizes[i][k] for i in subset) for k in (0, 1)) for subset in subsets)
    assert sum(sizes[i][0] for i in row) == max(tokens for tokens, images in sums if tokens <= 60 and images <= 4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=80))
def test_nothing_waits_for_ever(sizes):
    """With a row for each item, each gets its place; the oldest of those left always in the next row."""
    out = pack.place(sizes, len(sizes), (60, 4, 30), 5)
    assert sorted(i for row in out for i in row) == list(range(len(sizes)))
    assert all(row[0] == min(i for later in out[r:] for i in later) for r, row in enumerate(out) if row)


def test_three_robots_fill_their_rows(opened):
    """Slots used on the demo's mixture, whose robots have one and two cameras and chunks of different lengths."""
    batches = [batch for batch, _ in take(opened, 40)]
    assert {d for b in batches for d in np.unique(b.dataset)} == {-1, 0, 1, 2}
    assert np.mean([(b.segment > 0).mean() for b in batches]) > 0.95


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


@pytest.mark.parametrize("pictures", [1, 500])
def test_reading_ahead_changes_nothing(opened, monkeypatch, pictures):
    """Of a store that takes its time; and what cannot be read is skipped as it is otherwise."""
    from vla_jax.data import store

    data = dataclasses.replace(opened.config.data, read_ahead=pictures)
    slow = tuple(dataclasses.replace(ix, place=store.Store(ix.place.url, latency_s=0.002)) for ix in opened.indexes)
    ahead = dataclasses.replace(opened, indexes=slow, config=dataclasses.replace(opened.config, data=data))
    assert all(same(a, b) and np.array_equal(s, t) for (a, s), (b, t) in zip(take(opened, 4), take(ahead, 4)))

    def gone(self, name, *rest, **options):
        raise store.Unreadable(f"{name} is gone")

    monkeypatch.setattr(store.Store, "_read_local", gone)
    with Stream(ahead) as s:
        batch, _ = next(s)
    assert (batch.dataset == -1).all() and {cause for _, cause in s.skipped} == {"unreadable shard"}


def test_too_many_bad_samples_are_refused(opened, monkeypatch):
    """Each tenth picture of one robot broken: gone on with below data.max_skipped, refused above."""
    from vla_jax.data import images
    from vla_jax.data.source import Source

    right = Source.pixels

    def pixels(self, item, which, out, *rest):
        if item.dataset == 1 and item.sample_id % 10 == 0:
            raise images.UndecodableImage("broken on purpose")
        right(self, item, which, out, *rest)

    monkeypatch.setattr(Source, "pixels", pixels)
    monkeypatch.setattr(stream, "_ENOUGH", 64)
    limit = lambda most: dataclasses.replace(
        opened, config=dataclasses.replace(opened.config, data=dataclasses.replace(opened.config.data, max_skipped=most))
    )
    with Stream(limit(0.3)) as s:
        for _ in range(20):
            batch, _ = next(s)
            assert not ((batch.dataset == 1) & (batch.sample_id % 10 == 0)).any()
        name = opened.names[1]
        share = s.skipped[name, "undecodable image"] / s.drawn[name]
        assert set(s.skipped) == {(name, "undecodable image")} and 0.03 < share < 0.3
    with (
        Stream(limit(0.02)) as s,
        pytest.raises(UserError, match=rf"of \d+ samples of {name} could not be used \(\d+ x undecodable image\).*max_skipped = 0.02"),
    ):
        for _ in range(20):
            next(s)


@pytest.mark.parametrize("where", ["host", "device"])
def test_wrist_cameras_are_not_cropped_in_a_batch(opened, where):
    """Of what training gets: pictures of the wrist are those without augmentation, the others are not."""
    crop = dataclasses.replace(opened.config.augment, crop=0.5, where=where)
    cropped = dataclasses.replace(opened, config=dataclasses.replace(opened.config, augment=crop), augmenter=augment.Augmenter(crop, 0))
    same_picture, identity = {"base": [], "wrist": []}, augment.IDENTITY.numbers()
    with Stream(opened) as a, Stream(cropped) as b:
        for _ in range(3):
            (plain, _), (changed, _) = next(a), next(b)
            for row in range(len(plain.tokens)):
                slot = 0
                for g in range(plain.segment[row].max()):
                    (item,) = opened.draw(plain.sample_id[row, g : g + 1])
                    for at in item.pictures:
                        still = np.array_equal(plain.images[row, slot], changed.images[row, slot])
                        if where == "device":
                            still = still and np.array_equal(changed.change[row, slot], identity)
                        same_picture[at.view].append(still)
                        slot += 1
    assert all(same_picture["wrist"]) and np.mean(same_picture["base"]) < 0.1 and len(same_picture["wrist"]) > 20


def test_samples_too_long_for_a_row_are_bad_samples_too(opened, monkeypatch):
    """A row that most samples do not fit in is refused after a while, and never searched for ever."""
    monkeypatch.setattr(stream, "_ENOUGH", 64)
    lengths = sorted(item.size[0] for item in opened.draw(np.arange(200)))
    for length in (lengths[60], 3):
        packs = dataclasses.replace(opened.config.pack, length=length, targets=min(length, opened.config.pack.targets))
        narrow = dataclasses.replace(opened, config=dataclasses.replace(opened.config, pack=packs))
        with Stream(narrow) as s, pytest.raises(UserError, match="too long for a row"):
            for _ in range(200):
                next(s)


def test_samples_whose_text_is_cut_are_counted_by_dataset(opened, monkeypatch):
    """None silently, none twice, and each dataset its own."""
    layout = dataclasses.replace(opened.layout, describe=True)  # so that prompts of three lengths are there
    opened = dataclasses.replace(
        opened, config=dataclasses.replace(opened.config, pack=dataclasses.replace(opened.config.pack, length=384))
    )
    opened = dataclasses.replace(opened, layout=layout)
    said = lambda item: item.sequence.prefix - np.isin(item.sequence.tokens, (IMAGE, STATE)).sum()
    limit = sorted({int(said(item)) for item in opened.draw(np.arange(200))})[-2]
    cut = dataclasses.replace(opened, layout=dataclasses.replace(layout, limit=limit))
    seen: collections.Counter = collections.Counter()
    with Stream(cut) as s:
        for _ in range(6):
            batch, _ = next(s)
            for number in batch.sample_id[batch.sample_id >= 0].tolist():
                (item,), (whole,) = cut.draw(np.array([number])), opened.draw(np.array([number]))
                seen[cut.names[item.dataset]] += item.sequence.cut > 0
                assert item.sequence.cut == whole.sequence.length - item.sequence.length
        assert +s.truncated == +seen and set(+seen) == {"tabletop_bimanual"} and sum(s.truncated.values()) < sum(s.drawn.values())
    with Stream(opened) as s:
        next(s)
        assert not s.truncated

    def unreadable(self, item, which, out, asked=None):
        raise images.UndecodableImage("no picture")

    monkeypatch.setattr(type(cut), "pixels", unreadable)  # what is left out for its picture is not counted as cut
    with Stream(cut) as s:
        next(s)
        assert sum(s.skipped.values()) and not s.truncated


# One host as a process of its own: takes some batches from a state in a file, and writes what it saw and the state after.
HOST = """
import json, sys
import numpy as np
from vla_jax import config
from vla_jax.data import source
from vla_jax.data.stream import Stream
job = json.loads(sys.argv[1])
src = source.open_source(config.load("configs/demo.py", job["overrides"])[0], tokens_per_image=16)
state = np.load(job["state"]) if job["state"] else None
share = None if state is None else np.split(state, job["processes"])[job["process"]]
with Stream(src, process=job["process"], processes=job["processes"], state=share) as s:
    taken = [next(s) for _ in range(job["batches"])]
fields = ("images", "tokens", "segment", "target", "actions", "action_mask", "state", "dataset", "sample_id")
np.savez(job["out"], after=taken[-1][1], **{f: np.stack([getattr(b, f) for b, _ in taken]) for f in fields})
"""


def hosts(count: int, batches: int, overrides: list[str], folder: Path, state: str = "", threads=(1, 3)) -> dict[str, np.ndarray]:
    """What `count` processes saw, side by side: {field: [batch, row of the global batch, ..]}, and all their states after it."""
    folder.mkdir()
    jobs = [{"process": i, "processes": count, "batches": batches, "state": state, "out": str(folder / f"{i}.npz")} for i in range(count)]
    options = [[*overrides, f"data.threads={threads[i % len(threads)]}"] for i in range(count)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, json.dumps(job | {"overrides": o})],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for job, o in zip(jobs, options)
    ]
    for process in running:
        said = process.communicate(timeout=300)[1]
        assert process.returncode == 0, said
    parts = [np.load(job["out"]) for job in jobs]
    return {f: np.concatenate([p[f] for p in parts], axis=0 if f == "after" else 1) for f in parts[0].files}


def test_processes_of_any_number_see_the_same_samples(opened, tabletop, tmp_path):
    """1, 2 and 4 processes with different numbers of threads, and a restart from 2 to 4, sample by sample and pixel by pixel."""
    index = opened.indexes[0].path.parent
    overrides = [f"data.root={tabletop}", f"data.index_dir={index}", "pack.rows=8", "pack.group=2", "augment.crop=0.8", "augment.hue=0.1"]
    one = hosts(1, 6, overrides, tmp_path / "one")
    two = hosts(2, 3, overrides, tmp_path / "two")
    np.save(tmp_path / "state.npy", two["after"])
    four = hosts(4, 3, overrides, tmp_path / "four", state=str(tmp_path / "state.npy"))
    for field in one:
        if field != "after":
            assert np.array_equal(one[field][:3], two[field]), field
            assert np.array_equal(one[field][3:], four[field]), field
    assert np.array_equal(one["after"], four["after"])
    assert len(np.unique(one["sample_id"][one["sample_id"] >= 0])) == (one["sample_id"] >= 0).sum() > 150
