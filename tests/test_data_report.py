"""`vla-jax data report`: the page is well formed, needs nothing from outside, says what numpy says, and warns of what is wrong."""

import dataclasses
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from pages import Parsed

from vla_jax import config
from vla_jax.cli import main
from vla_jax.data import build, cards, images, mixture, report, sample, survey, svg
from vla_jax.data.mixture import BLOCK

NAMES = ["tabletop_slider", "tabletop_arm", "tabletop_bimanual"]
CHROMIUM = os.environ.get("VLA_CHROMIUM") or shutil.which("chromium")


@pytest.fixture(scope="module")
def indexes(tabletop, tmp_path_factory):
    where = str(tmp_path_factory.mktemp("ix"))
    return [build.ensure(card, str(tabletop), where) for card in mixture.load("tabletop").cards]


def made(tmp_path, mix, indexes, holdout=0.1):
    c = config.default()
    c.data.holdout = holdout
    out = tmp_path / "page.html"
    found = report.write(mix, indexes, config.from_dict(c.to_dict(), where="test"), out)
    text = out.read_text()
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"base64,[^\"]*", "", text.split("</style>")[1]))
    return Parsed(text), found, text


def changed(ix, folder, **arrays):
    """The index with other arrays; its own folder without statistics, so that these are made anew."""
    folder.mkdir(exist_ok=True)
    return dataclasses.replace(ix, path=folder, **arrays)


def alone(ix):
    return mixture.Mixture("alone", (ix.card,), (1.0,))


def test_page_of_the_command(tabletop, tmp_path, capsys):
    out = tmp_path / "sub" / "page.html"
    common = ["data", "report", "tabletop", "--root", str(tabletop), "--index-dir", str(tmp_path / "ix")]
    assert main([*common, "--out", str(out), "--config", "configs/demo.py"]) == 0
    assert "MB" in capsys.readouterr().out and out.stat().st_size < 6e6
    page = Parsed(out.read_text())
    for name in NAMES:
        assert {name, *(f"{name}-{part}" for part in ("episodes", "action", "state", "lengths"))} <= set(page.ids)
        assert page.strips[name] == list(cards.load(name).views) * 3
    assert len(page.ids) == len(set(page.ids)) and "script" not in page.tags
    links = {x[1:] for x in page.loads if x.startswith("#")}
    assert links <= set(page.ids)
    assert all(x.startswith(("#", "data:image/jpeg;base64,")) for x in page.loads)
    assert "0.05 (" in page.text and "0.25 s" in page.text  # holdout and chunk of configs/demo.py
    assert main([*common, "--out", str(tmp_path)]) == 2
    assert main([*common, "--out", str(tmp_path / "page.pdf")]) == 2


def test_numbers_are_those_of_the_index(indexes, tmp_path):
    page, _, _ = made(tmp_path, mixture.load("tabletop"), indexes)
    rows = {r[0]: r for r in page.rows if r and r[0] in NAMES}
    train = {ix.card.name: np.diff(ix.episode_start)[~ix.held_out(0.1)].sum() for ix in indexes}
    for ix in indexes:
        row, frames = rows[ix.card.name], train[ix.card.name]
        assert row[4:6] == [f"{ix.episodes:,}", f"{ix.frames:,}"]
        share = float(row[2].rstrip("%")) / 100
        assert abs(share - 1 / 3) < 1e-4 and float(row[3].rstrip("%")) / 100 == pytest.approx(frames / sum(train.values()), abs=1e-4)
        assert float(row[7]) == pytest.approx(1e6 / 3 / frames, rel=1e-3)  # four digits are written
        assert float(row[8].replace(",", "")) == pytest.approx(frames * 3, rel=1e-3)
        assert row[9:] == ["100.0%", "none", "none", "none"]
        rows_kept = np.repeat(~ix.held_out(0.1), np.diff(ix.episode_start))
        for c, x in zip(survey.take(alone(ix), [ix], config.Config())[0][0].columns["action"], ix.action[rows_kept].T):
            assert (c.min, c.max) == (x.min(), x.max()) and c.mean == pytest.approx(x.mean(), abs=1e-6)
            assert c.counts.sum() == frames and c.counts[0] == (x < c.low + (c.high - c.low) / survey.BINS).sum()
            for value in (c.mean, c.q01, c.q99):
                assert svg.number(value) in page.text


def test_shares_of_a_mixture_by_size(indexes, tmp_path):
    mix = dataclasses.replace(mixture.load("tabletop"), weight="times_size", weights=(9.0, 1.0, 1.0))
    surveys, _ = survey.take(mix, indexes, config.Config())
    want = np.array([9 * surveys[0].train_frames, surveys[1].train_frames, surveys[2].train_frames], float)
    assert np.allclose([s.share for s in surveys], want / want.sum(), atol=1 / BLOCK)
    assert any("its share of the samples" in w for w in survey.warnings(surveys[0]))


def test_real_sample(real_data, tmp_path):
    ix = build.ensure(cards.load("bridge_dataset"), str(real_data), str(tmp_path / "ix"))
    page, found, text = made(tmp_path, alone(ix), [ix])
    assert page.strips["bridge_dataset"] == ["base", "side", "side_2", "wrist"] * 3
    assert text.count("data:image/jpeg;base64,") == 3 * 4 * 8 and "64 x 64, JPEG" in page.text
    assert all(t in page.text for t in ix.instructions(0))
    # this sample's wrist camera is black throughout
    assert [w for _, w in found if "view" in w] == ["24 of the pictures shown of view wrist are of one plain colour: was the camera there?"]
    assert len(text) < 1e6


def test_text_from_data_is_escaped(indexes, tmp_path):
    evil = b'<script>alert(1)</script>"&\xff </section><img src=http://x/y>'.replace(b"\xff", "é".encode())
    ix = changed(
        indexes[0],
        tmp_path / "ix",
        text=np.frombuffer(evil, np.uint8),
        text_start=np.array([0, len(evil)]),
        set_text=np.zeros(1, np.int32),
        set_start=np.array([0, 1]),
        language=np.zeros(indexes[0].frames, np.int32),
        skipped={"<b>odd</b>": 1},
        card=dataclasses.replace(indexes[0].card, robot="<i>arm</i>"),
    )
    page, _, text = made(tmp_path, dataclasses.replace(alone(ix), name="<u>mix</u>"), [ix])
    assert "script" not in page.tags and not {"b", "i", "u"} & set(page.tags)
    assert evil.decode() in page.text and "<script" not in text and "<i>arm</i>" in page.text
    assert all(x.startswith(("#", "data:")) for x in page.loads)


def test_warnings_of_a_constructed_index(indexes, tmp_path):
    ix = indexes[1]
    crc, action = np.array(ix.episode_crc), np.array(ix.action)
    lengths = np.diff(ix.episode_start)
    twins = next((i, j) for i in range(ix.episodes) for j in range(i + 1, ix.episodes) if lengths[i] == lengths[j])
    other = next(k for k in range(ix.episodes) if lengths[k] != lengths[twins[0]])
    crc[[*twins, other]] = 7  # equal checksums of episodes of different lengths are no copies
    action[:, 0], action[:, 1] = 0.25, np.linspace(-2, 2, len(action))
    action[:, 2] = 0
    action[np.flatnonzero(np.repeat(~ix.held_out(0.1), lengths))[5], 2] = (
        0.5  # of a training episode; which are held out differs by machine
    )
    language = np.array(ix.language)
    language[:10] = len(ix.set_start) - 1
    bad = changed(
        ix,
        tmp_path / "ix",
        episode_crc=crc,
        action=action,
        language=language,
        set_start=np.append(ix.set_start, ix.set_start[-1]),
        skipped={"undecodable image": 2},
        card=dataclasses.replace(ix.card, gripper={"state": "open_high", "action": "unknown"}),
    )
    page, found, _ = made(tmp_path, alone(bad), [bad])
    said = "\n".join(w for _, w in found)
    for want in (
        f"1 of 12 episodes are copies of others \\(episode {twins[1]} equals {twins[0]}\\)",
        r"action dimension dq1 is constant \(q99 - q01 = 0\): it teaches nothing and always comes back as 0\.25\.",
        r"action dimension dq2 reaches 1\.9\d* rad in one step, which is implausible for kind delta \(limit 1\.5 rad\)",
        r"action dimension gripper is binary but 0\.\d\d% of its values are neither 0 nor 1 \(from 0 to 0\.5\)",
        r"action dimension gripper is open in 0\.0% of the frames",
        r"action dimension gripper starts closed in 100% of the episodes",
        r"in which sense the action's gripper was recorded",
        r"2 of 14 episodes \(14\.3%\) cannot be used: 2 x undecodable image",
        f"10 of {ix.frames} frames .* have no instruction",
        r"a million samples are [\d.]+ epochs of its",
    ):
        assert re.search(want, said), f"{want}\n---\n{said}"
    assert all(w in page.text for _, w in found)
    clean = [w for s in survey.take(mixture.load("tabletop"), indexes, config.Config())[0] for w in survey.warnings(s)]
    assert not [w for w in clean if "constant" in w or "copies" in w or "binary" in w or "implausible" in w]


def test_clipped_and_long(indexes, tmp_path):
    ix = indexes[2]
    action = np.array(ix.action)
    action[: int(0.009 * len(action)), 0] = 9.0  # less than a hundredth: q99 does not follow
    joined = np.array([0, 1, 2, 3, 4, 5, 6, ix.frames])  # the last episode takes in the rest
    long = changed(ix, tmp_path / "ix", action=action, episode_start=joined, **{k: getattr(ix, k)[:7] for k in _BY_EPISODE})
    (s,), _ = survey.take(alone(long), [long], config.from_dict(_plain(holdout=0.0), where="t"))
    said = "\n".join(survey.warnings(s))
    n = int(0.009 * len(action))
    assert n > 0 and f"{ix.card.action.dims[0].name} has {n / len(action):.2%} of its values so far outside" in said
    assert f"one episode is more than 5 times as long as the median of 1 steps; the longest, 6, has {ix.frames - 6} steps" in said


_BY_EPISODE = ("episode_shard", "episode_offset", "episode_crc")


def _plain(**data):
    c = config.default()
    c.data.update(data)
    return c.to_dict()


def test_pictures_that_cannot_be_shown(indexes, tmp_path):
    ix = indexes[1]
    image = np.array(ix.image)
    image[:, 0, 1] = 0  # the first view was never recorded
    image[:, 1] = (0, 20)  # the second points at something else
    page, found, _ = made(tmp_path, alone(ix), [changed(ix, tmp_path / "ix", image=image)])
    assert "no picture" in page.text and "undecodable image" in page.text and page.strips[ix.card.name] == list(ix.views) * 3
    assert "img" not in page.tags
    assert sorted(w for _, w in found if "view" in w) == [
        "24 of the pictures shown of view base cannot be: none is recorded at that step.",
        "24 of the pictures shown of view wrist cannot be: undecodable image.",
    ]
    gone = changed(ix, tmp_path / "ix", missing=frozenset(range(len(ix.shards))), skipped={"shard deleted after indexing": ix.episodes})
    page, found, _ = made(tmp_path, alone(ix), [gone])
    assert "shard deleted after indexing" in page.text and ix.shards[0] in page.text
    assert any("12 of 12 episodes (100.0%) cannot be used: 12 x shard deleted after indexing" in w for _, w in found)


def test_the_barest_dataset(indexes, tmp_path):
    """One episode of one frame; no state, no camera, no language."""
    ix = indexes[0]
    card = dataclasses.replace(ix.card, state=cards.Spec((), ()), views={}, language=())
    bare = changed(
        ix,
        tmp_path / "ix",
        card=card,
        pictures={},
        action=np.array(ix.action[:1]),
        state=np.zeros((1, 0), np.float32),
        image=np.zeros((1, 0, 2), np.uint32),
        language=np.zeros(1, np.int32),
        episode_start=np.array([0, 1]),
        text=np.zeros(0, np.uint8),
        text_start=np.zeros(1, np.int64),
        set_text=np.zeros(0, np.int32),
        set_start=np.zeros(2, np.int64),
        **{k: getattr(ix, k)[:1] for k in _BY_EPISODE},
    )
    page, found, _ = made(tmp_path, alone(bare), [bare])
    assert "No state is recorded." in page.text and "No camera is recorded." in page.text and "There are no instructions." in page.text
    assert any("1 of 1 frames (100.0%) have no instruction" in w for _, w in found)
    beside, _, _ = made(tmp_path, mixture.load("tabletop"), [bare, *indexes[1:]], holdout=0.0)
    assert set(NAMES) <= set(beside.ids)


def test_no_tokenizer_fits(indexes, tmp_path):
    values = _plain()
    values["tokens"]["action_vocab"] = 2
    found = report.write(mixture.load("tabletop"), indexes, config.from_dict(values, where="t"), tmp_path / "page.html")
    Parsed((tmp_path / "page.html").read_text())
    assert [w for name, w in found if name == "the action tokenizer" and "vocab" in w]


def test_drawings():
    assert svg.number(float("nan")) == "-" and svg.number(123456.7) == "123457" and svg.number(-0.00012345) == "-0.0001234"
    counts, low, high = svg.whole_numbers(np.array([3, 3, 200]))
    assert counts.sum() == 3 and low == 3 and high > 200 and len(counts) <= 64
    drawn = svg.line(np.array([0.0, np.nan, 1, 1]), [True, True, False, False], band=(0, 0), limits=(0, 0))
    assert "nan" not in drawn and drawn.count(svg.GREY) == 3  # the grey line and two grey points
    big = svg.picture(np.zeros((300, 600, 3), np.uint8))
    assert 'width="128" height="64"' in big
    assert "nan" not in svg.histogram(np.zeros(0), 0.0, 0.0, marks=(float("nan"),))


@pytest.mark.skipif(not CHROMIUM, reason="no browser: install chromium or set VLA_CHROMIUM to its binary")
def test_in_a_browser(indexes, tmp_path):
    import cv2

    made(tmp_path, mixture.load("tabletop"), indexes)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    shot = tmp_path / "shot.png"
    run = lambda *more: subprocess.run(
        [CHROMIUM, *flags.split(), "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", *more, f"file://{tmp_path}/page.html"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    done = run(f"--screenshot={shot}", "--window-size=1300,3000")
    assert shot.is_file(), done.stderr[-2000:]
    image = cv2.imread(str(shot))
    assert image.shape[:2] == (3000, 1300) and len(np.unique(image.reshape(-1, 3)[::50], axis=0)) > 100
    for part in np.array_split(image[:, 50:1200], 10):  # no tenth of it is blank
        assert part.std() > 3
    dom = run("--dump-dom").stdout
    for name in ("-weights", "-warnings", *NAMES):
        assert f'id="{name}"' in dom
    shown = lambda ix: np.diff(ix.episode_start)[[int((i + 0.5) * ix.episodes / 3) for i in range(3)]]
    assert dom.count("<figure") == sum(
        len(ix.views) * sum(min(8, n) for n in shown(ix)) for ix in indexes
    )  # a short episode has fewer pictures


def test_what_is_drawn_is_what_was_recorded(indexes, tmp_path, monkeypatch):
    """The arguments of every drawing: pictures of different frames, the chunk of the marked one, quantiles, lengths of tokens."""
    drawn = {"picture": [], "line": [], "histogram": []}
    for name in drawn:
        real = getattr(svg, name)
        monkeypatch.setattr(svg, name, lambda *a, _real=real, _to=drawn[name], **k: _to.append((a, k)) or _real(*a, **k))
    ix = indexes[1]
    made(tmp_path, alone(ix), [ix])
    steps = sample.chunk_steps(ix.card.control_hz, 1.0, 50)
    pictures = [(a[0], k["label"]) for a, k in drawn["picture"]]
    assert len({label for _, label in pictures}) == len(pictures) > 6
    for image, label in pictures:
        view, _, frame = label.partition(", frame ")
        assert np.array_equal(image, images.decode(sample.fetch(ix, sample.picture(ix, int(frame), view))))
    frames = [int(label.partition(", frame ")[2]) for _, label in pictures]
    dims, chunks = len(ix.card.action.dims), drawn["line"]
    for at in range(0, len(chunks), dims):
        seen = [np.stack([a[0] for a, _ in chunks[at : at + dims]], axis=1), chunks[at][0][1]]
        begin = [f for f in set(frames) if all(map(np.array_equal, sample.actions(ix, f, steps), seen))]
        assert begin and not set(begin) & set(ix.episode_start.tolist()), "the chunk plotted is not that of a picture inside the episode"
    kept = np.repeat(~ix.held_out(0.1), np.diff(ix.episode_start))
    shown = {}
    for a, k in drawn["histogram"]:
        shown.setdefault(k["label"], []).append((a, k))
    inside = 0
    for values, dims in ((ix.action[kept], ix.card.action.dims), (ix.state[kept], ix.card.state.dims)):  # drawn in this order
        for column, dim in zip(values.T, dims):
            want, width = np.quantile(column, [0.01, 0.99]), np.ptp(column)
            assert np.allclose(shown[dim.name][0][1]["marks"], want, atol=0.002 * width + 1e-6)
            inside += want[0] > column.min() + 0.01 * width
            shown[dim.name].append(shown[dim.name].pop(0))
    assert inside > 0  # somewhere the quantiles are not the extremes
    surveyed, opened = survey.take(alone(ix), [ix], config.Config())
    frames = opened.frames[0].spread(1024)
    words = [len(opened.layout.text.encode(opened.prompt(0, ix.instructions(f)[0], None).text)) for f in frames.tolist()]
    tokens = [len(opened.layout.action.encode(chunk)) for chunk in opened.chunks(0, frames)[0]]
    ((title, _),) = [(label, a) for label, a in shown.items() if label.startswith("FAST tokens")]
    for label, want in ((title, tokens), ("Text tokens of a prompt", words), ("Length of an episode", np.diff(ix.episode_start))):
        (((counts, low, high), _),) = shown[label]
        expected = svg.whole_numbers(np.array(want))
        assert np.array_equal(counts, expected[0]) and (low, high) == expected[1:], label
