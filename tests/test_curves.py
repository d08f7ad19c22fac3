"""The page of curves: what is drawn is what the files say, whatever they say, and it stays small and well formed."""

import html
import json
import math
import re
import time
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pages import Parsed

from vla_jax.train import curves, metrics
from vla_jax.types import UserError

SETS = ("bridge_dataset", "kuka")
SECTIONS = ["Loss", *(f"Dataset {name}" for name in SETS), "Norms by group", "Learning rate", "Epochs", "Speed", "Where the time goes"]
SECTIONS += ["Memory", "Skipped"]


class Page:
    """figures: the XML of each chart by (section, title); table: the runs' cells by (run, head)."""

    def __init__(self, path):
        self.text = path.read_text()
        self.html = Parsed(self.text)
        for drawing in re.findall("<svg.*?</svg>", self.text, re.S):
            ET.fromstring(drawing)
        self.figures, self.sections = {}, []
        for body in re.findall("<(?:section|details) id=.*?</(?:section|details)>", self.text, re.S):
            title = html.unescape(re.search("<(?:h2|summary)>(.*?)</", body, re.S)[1])
            self.sections.append(title)
            for figure in re.findall("<figure>.*?</figure>", body, re.S):
                tree = ET.fromstring(figure)
                self.figures[title, tree.find("h3").text] = tree
        head, *rows = self.html.rows
        self.table = {(row[0], h): x for row in rows if len(row) == len(head) for h, x in zip(head, row)}


def write(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / metrics.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def draw(tmp_path, *runs):
    """runs: (name, lines)."""
    return Page(curves.page([write(tmp_path / name, lines) for name, lines in runs], tmp_path / "out" / "page.html"))


def loss(*values, first=1):
    return [{"step": i, "time": 1.8e9 + i, "train/loss": v} for i, v in enumerate(values, first)]


def full(step, v=2.0):
    """A line of everything that a run logs, and one of an evaluation."""
    line = {"step": step, "time": 1.8e9 + step, "train/loss": v, "train/grad_norm": v, "train/lr": 1e-3, "train/step_s": 0.25}
    line |= {f"train/norm/{what}/{group}": v for what in ("grad", "update", "param") for group in ("vision", "language", "expert")}
    line |= {f"train/dataset/{name}/{what}": v / 10 for name in SETS for what in ("nll", "accuracy", "flow")}
    line |= {f"train/epochs/{name}": step / 7 for name in SETS} | {"train/skipped_steps": 3, "train/skipped/kuka/corrupt": 5}
    line |= {"train/samples_per_s": 512.5, "train/tokens_per_s": 4e5, "train/mfu": 0.431, "train/model_tflops": 80.0}
    line |= {f"train/time/{what}": 0.2 for what in ("device", "data", "checkpoint", "eval", "compile")} | {"train/goodput": 0.875}
    line |= {"train/memory/host_gib": 20.5, "train/memory/device_gib": 61.25, "train/seen/samples": 2_560_000, "train/seen/tokens": 12345}
    line |= {"train/slots_used": 0.75, "train/note": "a word", "train/gone": None}
    held = {"step": step, "time": 1.8e9 + step + 1}
    for name, nll in zip(SETS, (1.0, 3.0)):
        held |= {f"eval/{name}/nll": nll, f"eval/{name}/accuracy": 0.5, f"eval/{name}/flow": 0.1, f"eval/{name}/valid": 1.0}
        held |= {f"eval/{name}/{kind}/{unit}": v / 10 for kind in ("mae", "baseline") for unit in ("m", "rad", "gripper")}
    return [line, held]


def curve(figure, hue, kind="curve"):
    """[(x, y)] of a run's path, its pieces in a row, and how many pieces there are."""
    x = y = 0.0
    out, pieces = [], 0
    for path in figure.findall(f"svg/g[@class='{hue}']/path"):
        if path.get("class").strip() != kind:
            continue
        for move, a, b in re.findall(r"([ml])(-?[\d.]+)(?: |(?=-))(-?[\d.]+)", path.get("d")):
            x, y, pieces = x + float(a), y + float(b), pieces + (move == "m")
            out.append((x, y))
    return out, pieces


def titles(figure):
    return [t.text for t in figure.iter("title")]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=900), st.integers(8, 200))
def test_thinning_keeps_extremes(values, most):
    values = np.array(values)
    kept = curves.thin(values, most)
    assert len(kept) <= max(most, 1) and (np.diff(kept) > 0).all() and kept[0] == 0 and kept[-1] == len(values) - 1
    if len(values) <= most:
        assert len(kept) == len(values)
    assert values[kept].max() == values.max() and values[kept].min() == values.min()
    wide = math.ceil(2 * len(values) / (most - 3)) + 1  # of a bin, at most
    for i, v in enumerate(values):  # nobody who stands out from his neighbours is lost
        near = values[kept[np.abs(kept - i) <= wide]]
        assert near.size and near.max() >= v >= near.min()


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_inside(low, size):
    high = low + size
    if high - low < 1e-3 * max(abs(low), abs(high)):  # the axes are never narrower
        return
    found = curves.ticks(low, high)
    assert 2 <= len(found) <= 7 and low - 1e-6 * size <= found[0] and found[-1] <= high + 1e-6 * size
    digits = np.diff(found)[0] / 10.0 ** math.floor(math.log10(np.diff(found)[0] * 1.0001))
    assert min(abs(digits - d) for d in (1, 2, 5)) < 1e-3
    powers = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
    for x in found:  # what is written is what is meant
        number, unit = re.fullmatch(r"(-?[\d.]+(?:e-?\d+)?)([kMG]?)", curves.short(x)).groups()
        assert float(number) * powers[unit] == pytest.approx(x, abs=1e-5 * size, rel=2e-6)


def test_log_axis_is_round_and_holds_zeros(tmp_path):
    lines = [{"step": i, "train/grad_norm": v} for i, v in enumerate((0.0, 1e-5, 3.0, 100.0))]
    figure = draw(tmp_path, ("a", lines)).figures["Norms by group", "whole gradient"]
    words = [t.text for t in figure.iter("text")]
    assert "norm, log axis, 0 or less at the bottom edge" in words and {"1e-5", "0.001", "0.1", "10"} <= set(words)
    (zero, least, middle, most), _ = curve(figure, "r0")
    assert zero[1] == 166 and 160 < least[1] < 166 and most[1] < 25
    assert (least[1] - middle[1]) / (least[1] - most[1]) == pytest.approx(math.log(3e5) / math.log(1e7), abs=0.01)


def test_after_a_restart_the_latest_value_is_drawn(tmp_path):
    first = [{"step": 0, "data/x/episodes": 2}, *loss(*(100 + i for i in range(1, 10)))]
    second = [{"step": 4, "data/x/episodes": 2}, *loss(205, 206, first=5)]  # went on from step 4, and is at 6
    page = draw(tmp_path, ("a", first + second))
    figure = page.figures["Loss", "training loss"]
    line, pieces = curve(figure, "r0")
    assert pieces == 1 and len(line) == 6 and all(b[0] > a[0] for a, b in zip(line, line[1:]))
    told = titles(figure)
    assert "a: step 4, 104" in told and "a: step 5, 205" in told and "a: step 6, 206" in told
    assert not any(f"step {i}, 10{i}" in t for t in told for i in (5, 6))
    assert "a, lost by a restart: step 7, 107" in told  # not done again yet, and faint
    faint, _ = curve(figure, "r0 lost")
    assert len(faint) == 3 and line[-1][0] < faint[0][0] < faint[2][0] <= 350
    assert ["data/x/episodes", "2"] in page.html.rows and len(page.figures) == 2  # no curve of what is only repeated
    (mark,) = [p for p in figure.iter("path") if p.get("class").startswith("restart")]
    assert "from step 4" in mark.find("title").text
    assert float(re.match(r"M([\d.]+) ", mark.get("d"))[1]) == pytest.approx(line[3][0], abs=0.06)
    assert (page.table["a", "restarts"], page.table["a", "last step"], page.table["a", "training loss"]) == ("1", "6", "206")
    done = draw(tmp_path, ("b", [*first, *second, *loss(*range(207, 213), first=7)])).figures["Loss", "training loss"]
    assert len(curve(done, "r0")[0]) == 12 and not curve(done, "r0 lost")[0]


def test_a_restart_that_logs_other_steps(tmp_path):
    lines = [*loss(1, 2, 3, 4, 5, 6), *loss(30, first=3), *loss(50, first=5)]  # 3 again, and 4 is behind it
    told = titles(draw(tmp_path, ("a", lines)).figures["Loss", "training loss"])
    assert [t for t in told if "restarted" not in t] == [
        *("a, lost by a restart", "a, lost by a restart: step 6, 6"),
        *("a", "a: step 1, 1", "a: step 2, 2", "a: step 3, 30", "a: step 5, 50"),
    ]


@pytest.mark.parametrize(
    "lines,count", [(loss(1, 2) + loss(3, first=1), 1), ([{"step": 0, "data/x/n": 1}, *loss(1), {"step": 1, "data/x/n": 1}], 1)]
)
def test_what_a_restart_is(tmp_path, lines, count):
    assert draw(tmp_path, ("a", lines)).table["a", "restarts"] == str(count)
    assert draw(tmp_path, ("b", loss(1, 2, 3))).table["b", "restarts"] == "0"


def test_values_that_are_not_finite_are_seen(tmp_path):
    page = draw(tmp_path, ("a", loss(3, 2, math.nan, math.inf, 1, None, 2)))
    figure = page.figures["Loss", "training loss"]
    line, pieces = curve(figure, "r0")
    assert pieces == 2 and len(line) == 4  # a gap where it is NaN, and none where nothing is known
    assert [p.get("d").count("h0") for p in figure.iter("path") if "curve" in p.get("class")][0] == 2  # a point alone is a dot
    marks = [p for p in figure.iter("path") if p.get("class") == "odd"]
    assert len(marks) == 2 and {m.find("title").text for m in marks} == {"a: step 3, NaN", "a: step 4, Infinity"}
    at = [float(re.match(r"M([\d.]+) 16h", m.get("d"))[1]) + 4 for m in marks]  # at the top edge, between their neighbours
    assert line[1][0] < at[0] < at[1] < line[2][0]
    assert page.table["a", "losses not finite"] == "2" and page.table["a", "training loss"] == "2"
    assert page.text.count("<td class=bad>2<") == 1
    only = draw(tmp_path, ("b", loss(*[math.nan] * 500)))
    marks = [p for p in only.figures["Loss", "training loss"].iter("path") if p.get("class") == "odd"]
    assert 20 < len(marks) < 80 and only.table["b", "training loss"] == "NaN" and only.table["b", "losses not finite"] == "500"
    assert "and 8 more close by" in "".join(titles(only.figures["Loss", "training loss"]))


numbers = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-(10**400), 10**400), st.none(), st.text(max_size=3), st.booleans()
)


@example([(1, 1.7e308), (2, -1.7e308)], "x").via("their difference overflows")
@example([(1, 5e-324), (2, 1e-323)], "x").via("and this one is hardly there")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(-5, 30), numbers), min_size=1, max_size=40), st.text(max_size=8))
def test_whatever_is_in_the_file_the_drawings_are_well_formed(tmp_path, pairs, name):
    keys = ("train/loss", "train/grad_norm", "train/lr", f"eval/{name}/mae/{name}", name)
    lines = [{"step": s, "time": v} | dict.fromkeys(keys, v) for s, v in pairs]
    page = draw(tmp_path, ("a", [{"step": "no"}, 3, [], {"train/loss": 1}, *lines]))
    for figure in page.figures.values():
        for mark in (*figure.iter("path"), *figure.iter("circle"), *figure.iter("text")):
            at = " ".join(mark.get(k, "") for k in ("d", "cx", "cy", "x", "y"))
            assert not re.search("nan|inf|None|e", at), at
            assert all(-20 <= float(y) <= 200 for y in (mark.get("cy"), mark.get("y")) if y)


def test_every_section_of_a_full_run(tmp_path):
    page = draw(tmp_path, ("run", [{"step": 0, "data/kuka/episodes": 25}, *full(10), *full(20, 1.5)]))
    assert page.sections[:-1] == SECTIONS and page.sections[-1].startswith("Everything else")
    other = [title for section, title in page.figures if section.startswith("Everything")]
    assert other == ["train/seen/samples", "train/seen/tokens", "train/slots_used"]
    assert ["data/kuka/episodes", "25"] in page.html.rows
    norms = [title for section, title in page.figures if section == "Norms by group"]
    assert len(norms) == 10 and {"grad vision", "update language", "param expert", "whole gradient"} <= set(norms)
    assert [t for s, t in page.figures if s == "Dataset kuka"][:3] == ["nll", "accuracy", "flow"]
    error = page.figures["Dataset kuka", "action error, rad"]
    assert {"run, model: step 20, 0.15", "run, model: step 10, 0.2"} <= set(titles(error)) and "rad, mean absolute" in [
        t.text for t in error.iter("text")
    ]
    (line,) = [p for p in error.iter("path") if "baseline" in p.get("class")]
    assert line.get("stroke-dasharray") == "3 4"
    nll = page.figures["Dataset kuka", "nll"]
    assert len(curve(nll, "r0", "curve training")[0]) == len(curve(nll, "r0", "curve heldout")[0]) == 2
    row = {head: x for (_, head), x in page.table.items()}
    assert row.pop("run") == "run" and row == {
        "last step": "20",
        "started, UTC": "2027-01-15 08:00",
        "last written, UTC": "2027-01-15 08:00",
        "training loss": "1.5",
        "losses not finite": "0",
        "held-out nll, mean of datasets": "2",
        "restarts": "0",
        "samples seen": "2.56M",
        "tokens seen": "12.345k",
        "samples/s": "512.5",
        "MFU": "43.1%",
        "goodput": "87.5%",
        "skipped steps": "3",
        "host memory, GiB": "20.5",
        "device memory, GiB": "61.25",
    }


def test_only_what_there_are_numbers_for(tmp_path):
    page = draw(tmp_path, ("a", loss(2, 1)))
    assert page.sections == ["Loss"]
    assert {x for (_, head), x in page.table.items() if head not in ("run", "last step", "started, UTC", "last written, UTC")} == {
        "1",
        "0",
        "-",
    }
    assert draw(tmp_path, ("b", [{"step": 0, "train/mfu": None}])).sections == []
    none = draw(tmp_path, ("c", [{"step": s, "train/skipped_steps": 0} for s in (1, 2)])).figures["Skipped", "skipped_steps"]
    assert {"0", "1"} <= {t.text for t in none.iter("text")} and "-1" not in {t.text for t in none.iter("text")}


def test_axes_of_the_loss(tmp_path):
    flat = [1 + 0.01 * (i % 7) for i in range(400)]
    page = draw(tmp_path, ("a", loss(*(100 - i for i in range(90)), *flat, 50, *flat)))
    whole, half = (page.figures["Loss", t] for t in ("training loss", "last half, spikes cut"))
    words = lambda figure: {t.text for t in figure.iter("text")}
    assert "loss, log axis" in words(whole) and "loss" in words(half)
    assert "0" not in words(half) and {"500", "800"} <= words(half) and {"1", "1.05", "1.1"} <= words(half)
    line, _ = curve(half, "r0")
    assert (
        min(y for _, y in line) == pytest.approx(19) and sorted(y for _, y in line)[1] > 60
    )  # the spike touches the edge, and leaves room for the rest
    assert min(x for x, _ in line) == pytest.approx(51, abs=0.7)
    assert {"0", "1", "2"} <= words(draw(tmp_path, ("b", loss(2, 3, 4, first=0))).figures["Loss", "training loss"])
    assert not {"0.5", "1.5"} & words(draw(tmp_path, ("b", loss(2, 3, 4, first=0))).figures["Loss", "training loss"])


def test_runs_are_laid_over_each_other(tmp_path):
    names = [f"run{i}" for i in range(9)]
    page = draw(tmp_path, *((name, loss(i + 1, i + 0.5)) for i, name in enumerate(names)), ("other", [{"step": 9, "train/mfu": 0.5}]))
    figure = page.figures["Loss", "training loss"]
    legend = ["".join(span.itertext()) for span in figure.findall("figcaption/span")]
    assert legend == [*(f"run{i} {curves.said(i + 0.5)}" for i in range(9)), "other -"]
    drawn = [(g.get("class"), g.find("path").get("stroke-dasharray")) for g in figure.findall("svg/g")]
    shown = [(k.get("class").split()[1], k.find("path").get("stroke-dasharray")) for k in figure.findall("figcaption/span/svg")]
    assert len(set(drawn)) == 9 and drawn == shown[:9]
    assert len({dashes for _, dashes in drawn[:6]}) == len({hue for hue, _ in drawn[:6]}) == 6  # without colour, and without dashes
    for scheme in re.findall(r"--bg:[^}]*", page.text):  # light and dark
        assert len({re.search(f"--c{i}:([^;]*)", scheme)[1] for i in range(7)}) == 7
    assert len(re.findall(r"--bg:", page.text)) == 2 and "prefers-color-scheme:dark" in page.text
    assert [row[0] for row in page.html.rows if row][1:11] == [*names, "other"]


def test_labels_of_folders_of_one_name(tmp_path):
    folders = [write(tmp_path / name, loss(1)) for name in ("a/run", "b/run", "x/b/run", "single")]
    page = Page(curves.page([*folders, folders[0]], tmp_path / "page.html"))
    labels = dict.fromkeys(run for run, _ in page.table)
    assert list(labels) == ["a/run", f"{tmp_path.name}/b/run", "x/b/run", "single"]


def test_names_are_escaped(tmp_path):
    bad = '<script>alert("1")</script>&\x07\ud800'
    name = "<i>&amp;'\"run"
    page = draw(
        tmp_path,
        (name, [{"step": s} | dict.fromkeys((f"eval/{bad}/nll", f"eval/x/mae/{bad}", bad, f"train/epochs/{bad}"), 1) for s in (1, 2)]),
    )
    assert not {"script", "i"} & set(page.html.tags) and "alert(" in page.text
    assert any(run == name for run, _ in page.table) and any("alert" in s for s in page.sections)
    assert name in page.figures["Epochs", bad.replace("\x07", "\ufffd").replace("\ud800", "\ufffd")].find("figcaption").find("span")[0].tail


def test_nothing_is_loaded_and_nothing_runs(tmp_path):
    page = draw(tmp_path, ("a", [*full(1), *full(2)]))
    assert (
        {x[1:] for x in page.html.loads} <= set(page.html.ids) and all(x.startswith("#") for x in page.html.loads) and not page.html.styles
    )
    assert not {"script", "img", "link", "iframe", "object", "use", "image"} & set(page.html.tags)
    assert not re.search(r"https?:|url\(|@import|\son\w+=", page.text) and "default-src 'none'" in page.text
    assert 'name="viewport"' in page.text


def test_a_long_run_is_small_and_its_spike_is_seen(tmp_path):
    rng, n = np.random.default_rng(0), 100_000
    noise = rng.normal(1, 0.1, n)
    noise[61_234] = 9.5
    keys = ["train/loss", "train/grad_norm", "train/lr", "train/goodput", *(f"train/dataset/{d}/nll" for d in "abcd")]
    folder, out = (
        write(tmp_path / "long", ({"step": 10 * i} | dict.fromkeys(keys, x) for i, x in enumerate(noise.tolist()))),
        tmp_path / "p.html",
    )
    began = time.monotonic()
    page = Page(curves.page([folder], out))
    assert time.monotonic() - began < 30 and out.stat().st_size < 1e6
    figure = page.figures["Loss", "training loss"]
    line, pieces = curve(figure, "r0")
    assert pieces == 1 and 300 < len(line) <= 600 and {"0", "200k", "800k"} <= {t.text for t in figure.iter("text")}
    top = min(line, key=lambda p: p[1])
    assert sorted(y for _, y in line)[1] - top[1] > 90 and top[0] == pytest.approx(51 + 0.61234 * 295, abs=0.2)
    assert titles(figure) == ["long", f"long: step 999990, {noise.tolist()[-1]}"]
    many = [{"step": i} | {f"train/epochs/set{k}": x + k for k in range(500)} for i, x in enumerate(noise[:700].tolist())]
    assert curves.page([write(tmp_path / "wide", many)], out).stat().st_size < 2e6


def test_errors(tmp_path):
    with pytest.raises(UserError, match=r"/gone does not exist.*looked for .*/gone/metrics\.jsonl"):
        curves.page([tmp_path / "gone"], tmp_path / "p.html")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "other.txt").write_text("")
    with pytest.raises(UserError, match=r"looked for .*/bare/metrics\.jsonl, and found other\.txt"):
        curves.page([write(tmp_path / "good", loss(1)), tmp_path / "bare"], tmp_path / "p.html")
    (tmp_path / "bare" / metrics.FILE).write_text('{"train/loss": 1}\nnot json\n')
    with pytest.raises(UserError, match=r"\(27 bytes\) holds no line with a step"):
        curves.page([tmp_path / "bare"], tmp_path / "p.html")
    with pytest.raises(UserError, match="no run folder"):
        curves.page([], tmp_path / "p.html")
    with pytest.raises(UserError, match="is a folder"):
        curves.page([tmp_path / "good"], tmp_path)
    assert not (tmp_path / "p.html").exists()
