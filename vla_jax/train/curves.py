"""What runs have measured, on one HTML page that needs nothing else: a table of the runs, and their curves over the steps, laid over each
other. All text that comes from files is escaped; the page runs no script and may load nothing."""

from __future__ import annotations

import dataclasses
import datetime
import html
import json
import math
import os
import re
from pathlib import Path

import numpy as np
from etils import epath

from vla_jax.data import svg
from vla_jax.train import metrics
from vla_jax.train import workdir as workdirs
from vla_jax.types import UserError

_POINTS, _BUDGET, _DOTS = 600, 120_000, 24  # drawn of one curve, of all together, and up to how many are dots with a title
_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _FLOOR = 360, 200, 47, 350, 19, 166  # of a chart, and the edges of its plot
_HUES, _DASHES = 7, ("none", "8 3", "3 3", "13 3 3 3", "13 3 3 3 3 3", "18 6")  # no two of 42 runs have the same pair
_SECTIONS = (  # section, axis, pattern of keys: a chart of each; its title, with the pattern's groups; its unit
    ("Norms by group", "log", "train/norm/(.+?)/(.+)", "{} {}", "norm"),
    ("Norms by group", "log", "train/grad_norm", "whole gradient", "norm"),
    ("Learning rate", "zero", "train/lr", "learning rate", "learning rate"),
    ("Epochs", "zero", "train/epochs/(.+)", "{}", "epochs"),
    ("Speed", "zero", "train/(samples|tokens)_per_s", "{}", "per second"),
    ("Speed", "zero", "train/step_s", "duration of a step", "seconds"),
    ("Speed", "zero", "train/mfu", "MFU", "share of the chip's peak"),
    ("Speed", "zero", "train/model_tflops", "model FLOPs", "TFLOP/s per device"),
    ("Where the time goes", "share", "train/time/(.+)", "{}", "share of the time"),
    ("Where the time goes", "share", "train/goodput", "goodput", "share of the time since the run began"),
    ("Memory", "zero", "train/memory/(.+)_gib", "{}", "GiB"),
    ("Skipped", "zero", "train/(skipped_steps|skipped_in_a_row)", "{}", "steps"),
    ("Skipped", "zero", "train/(skipped|truncated)/(.+)", "{} samples: {}", "samples since the last start"),
)
_is_number = lambda x: type(x) is float or (type(x) is int and abs(x) < 1e300)
_fine = lambda values: np.abs(values) < 1e290  # not NaN, and the difference of two is finite
_exact = lambda x: json.dumps(float(x)).removesuffix(".0")  # as the file has it
# escaped for HTML, and for XML, which has no control characters; neither has halves of surrogate pairs
_e = lambda text: html.escape(re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text))
_STYLE = """
:root{color-scheme:light dark;--bg:#f4f6f8;--card:#fff;--ink:#1d2733;--dim:#5b6570;--line:#dde2e8;--bad:#b3400f;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#a8458c;--c4:#1d2733;--c5:#a87400;--c6:#3f9bd6}
@media(prefers-color-scheme:dark){:root{--bg:#12161b;--card:#1b2128;--ink:#e3e8ee;--dim:#9aa5b1;--line:#343d47;--bad:#ff8f66;--c0:#4fa8e0;--c1:#ff8a3d;--c2:#2fc492;--c3:#e08bc4;--c4:#e3e8ee;--c5:#e6b422;--c6:#9fd4f7}}
body{font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:var(--ink);background:var(--bg);margin:0}main{max-width:1240px;margin:0 auto;padding:16px 12px 50px}h1{font-size:22px;margin:0 0 4px}h2{font-size:18px;margin:0 0 8px}h3{font-size:13px;margin:0;overflow-wrap:anywhere}
section,details{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;margin:12px 0}summary{font-size:18px;font-weight:600;cursor:pointer}a{color:var(--c0);margin-right:12px;display:inline-block;overflow-wrap:anywhere}p{color:var(--dim);font-size:12.5px;margin:6px 0}.bad{color:var(--bad);font-weight:600}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:12px;width:100%}th,td{padding:4px 6px;border-bottom:1px solid var(--line);text-align:right;vertical-align:bottom;font-variant-numeric:tabular-nums}th{font-weight:600;color:var(--dim)}td{white-space:nowrap}th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--card);white-space:normal;overflow-wrap:anywhere;min-width:90px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:14px 16px}.big{grid-template-columns:repeat(auto-fill,minmax(min(460px,100%),1fr))}figure{margin:0;min-width:0}
figcaption{font-size:12px;display:flex;flex-wrap:wrap;gap:0 12px;overflow-wrap:anywhere;padding-left:6px}.chart{display:block;width:100%;height:auto}.key{width:26px;height:8px;margin-right:4px}path{vector-effect:non-scaling-stroke;fill:none;stroke:currentColor}
svg text{font-size:10.5px;font-family:inherit;fill:var(--dim)}.curve{stroke-width:1.4;stroke-linejoin:round;stroke-linecap:round}.curve.training{stroke-width:1.2;opacity:.65}.curve.heldout{stroke-width:2.2}.curve.baseline{stroke-width:1;opacity:.75}.lost{opacity:.4}path.frame{stroke:var(--line)}.restart{opacity:.55}circle,path.odd{fill:currentColor;stroke:none}.r0{color:var(--c0)}.r1{color:var(--c1)}.r2{color:var(--c2)}.r3{color:var(--c3)}.r4{color:var(--c4)}.r5{color:var(--c5)}.r6{color:var(--c6)}@media(min-width:1000px){.big svg text{font-size:7.5px}}
"""


@dataclasses.dataclass(frozen=True)
class Run:
    label: str
    name: str  # HTML: a piece of its line, and its label
    hue: str  # class of its colour
    dashes: str
    curves: dict[str, np.ndarray]  # by the key in metrics.jsonl: f64[2 n] steps, ascending, and values, which may be NaN or infinite
    restarts: list[float]  # steps that it went on from
    last: float  # step of the last line; what comes after it in a curve, a restart threw away, and it is not done again yet
    times: list[float]  # seconds since 1970, of all lines that tell

    def final(self, key: str) -> float | None:
        return next((float(v) for s, v in reversed(self.curves[key].T) if s <= self.last), None) if key in self.curves else None


@dataclasses.dataclass(frozen=True)
class Chart:
    """lines: key -> what it is: "" (the only one), training, held out, model or baseline. axis: fit (logarithmic where the greatest is far
    above the others), near (without spikes), zero (from 0), share (0 to 1) or log. since: the share of the steps that is left out."""

    title: str
    unit: str
    lines: dict[str, str]
    axis: str = "zero"
    since: float = 0.0


def page(folders: list[str | os.PathLike], out: Path) -> Path:
    """Writes the page of these run folders to `out`, whose folder is made, and returns it.

    Raises: UserError when a folder is missing or holds no metrics.jsonl with a step, when none is given, or when `out` is a folder.
    """
    folders, out = list(dict.fromkeys(workdirs.place(f) for f in folders)), Path(out).expanduser()
    if not folders:
        raise UserError("no run folder is given, so there is nothing to draw. Give the --workdir of one training run or of several.")
    if out.is_dir():
        raise UserError(f"{out} is a folder, and the page is one file: name it, such as {out / 'curves.html'}")
    # a label: as many of a path's last parts as tell it from the others, one if that is enough
    cuts = lambda folder: ["/".join(folder.parts[-n:]) for n in range(1, len(folder.parts))] + [str(folder)]
    labels = [next(cut for cut in cuts(folder) if sum(cut in cuts(other) for other in folders) == 1) for folder in folders]
    runs = [_run(folder, label, i) for i, (folder, label) in enumerate(zip(folders, labels))]
    curves = [c for run in runs for c in run.curves.values()]
    most = min(_POINTS, max(_BUDGET // max(len(curves), 1), 40))
    ends = [c[0, i] for c in curves for i in (0, -1)] + [run.last for run in runs]
    span = min(ends), max(max(ends), min(ends) + 1)
    grid = lambda kind, charts: f'<div class="{kind}">{"".join(_chart(chart, runs, span, most) for chart in charts)}</div>'
    sections, rest = _plan(sorted({key for run in runs for key in run.curves}))
    body, links = [], "".join(f'<a href="#s{i}">{_e(title)}</a>' for i, title in enumerate(sections))
    for i, (title, charts) in enumerate(sections.items()):
        body.append(f'<section id="s{i}"><h2>{_e(title)}</h2>{grid("grid big" if title == "Loss" else "grid", charts)}</section>')
    if rest:
        several = [k for k in rest if k[:5] != "data/" and any(run.curves[k].shape[1] > 1 for run in runs if k in run.curves)]
        single = [[_e(k), *(said(run.final(k)) for run in runs)] for k in rest if k not in several]
        inner = grid("grid", [Chart(key, "value", {key: ""}, "fit") for key in several])
        inner += _table(["", *(run.name for run in runs)], single) if single else ""
        body.append(f'<details id="rest"><summary>Everything else ({len(rest)})</summary>{inner}</details>')
    rows = [_row(run) for run in runs]
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        # whatever a run is called: nothing on this page runs, and nothing is fetched
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Curves of {_e(', '.join(run.label for run in runs))}</title><style>{_STYLE}</style></head><body><main>\n<h1>Curves</h1>"
        f"<section>{_table(list(rows[0]), [list(row.values()) for row in rows])}</section><nav>{links}</nav>"
        "<p>A number under a chart is the last one logged. Triangle at the top edge: a value that is not finite. Vertical line: the run "
        "went on from this step after a restart; faint: steps lost by it and not done again yet. Of datasets: thin is training, thick held "
        "out; the baseline always gives the mean training action.</p>\n" + "\n".join(body) + "\n</main></body></html>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out


def _run(folder: epath.Path, label: str, number: int) -> Run:
    """Raises: UserError."""
    file, give = folder / metrics.FILE, "Give the --workdir of a training run."
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist or is no folder; looked for {file}. {give}")
    if not file.is_file():
        held = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} holds no run: looked for {file}, and found {held}. {give}")
    lines = [x for x in metrics.read(folder) if isinstance(x, dict) and _is_number(x.get("step")) and math.isfinite(x["step"])]
    if not lines:
        raise UserError(
            f"{file} ({len(file.read_bytes())} bytes) holds no line with a step: nothing is logged yet. Wait for its first steps."
        )
    steps, starts = [float(line["step"]) for line in lines], [any(key.startswith("data/") for key in line) for line in lines]
    again = {i: steps[i] for i in range(1, len(lines)) if steps[i] < steps[i - 1] or (starts[i] and any(starts[:i]))}
    reach, kept, curves = math.inf, [], {}
    for i in reversed(range(len(lines))):  # what lies after a step that a later restart went on from is lost, and drawn if not done again
        kept += [i] if steps[i] <= reach or steps[i] > steps[-1] else []
        reach = min(reach, steps[i]) if i in again else reach
    for i in reversed(kept):
        for key, value in lines[i].items():
            if _is_number(value) and key not in ("step", "time"):
                curves.setdefault(key, {})[steps[i]] = value
    for key, found in curves.items():
        curve = np.array([list(found), list(found.values())], np.float64)
        curves[key] = curve[:, curve[0].argsort()]
    hue, dashes, times = f"r{number % _HUES}", _DASHES[number % len(_DASHES)], [x["time"] for x in lines if _is_number(x.get("time"))]
    piece = f'<svg class="key {hue}" viewBox="0 0 26 8"><path class="curve" d="M1 4H25" stroke-dasharray="{dashes}"/></svg>'
    return Run(label, piece + _e(label), hue, dashes, curves, list(again.values()), steps[-1], times)


def _plan(keys: list[str]) -> tuple[dict[str, list[Chart]], list[str]]:
    """(section -> its charts, where there are numbers for it; the keys that belong to none)."""
    left, out = dict.fromkeys(keys), {}
    take = lambda pattern: [m for key in keys if key in left and (m := re.fullmatch(pattern, key)) and not left.pop(key)]
    for m in take("train/loss"):
        out["Loss"] = [Chart("training loss", "loss", {m[0]: ""}, "fit"), Chart("last half, spikes cut", "loss", {m[0]: ""}, "near", 0.5)]
    sets: dict[str, dict[str, Chart]] = {}
    add = lambda name, chart: sets.setdefault(name, {}).setdefault(chart.title, chart).lines
    for what, unit in (("nll", "nats per token"), ("accuracy", "share of tokens"), ("flow", "flow matching loss")):
        for m in take(f"(train/dataset|eval)/(.+)/{what}"):
            add(m[2], Chart(what, unit, {}, "zero" if what == "accuracy" else "fit"))[m[0]] = "held out" if m[1] == "eval" else "training"
    for m in (*take("eval/(.+?)/(mae)/(.+)"), *take("eval/(.+?)/(baseline)/(.+)")):
        add(m[1], Chart(f"action error, {m[3]}", f"{m[3]}, mean absolute", {}))[m[0]] = "model" if m[2] == "mae" else "baseline"
    for m in take("eval/(.+)/valid"):
        add(m[1], Chart("well-formed chunks", "share of the model's", {}, "share"))[m[0]] = ""
    out |= {f"Dataset {name}": list(sets[name].values()) for name in sorted(sets)}
    for title, axis, pattern, name, unit in _SECTIONS:
        for m in take(pattern):
            out.setdefault(title, []).append(Chart(name.format(*m.groups()), unit, {m[0]: ""}, axis))
    return out, list(left)


def thin(values: np.ndarray, most: int) -> np.ndarray:
    """f64[n], finite -> i64[m], m <= most: which to draw, ascending: the first, the last, and the least and the greatest of every bin."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), (most - 2) // 2 + 1).astype(int).tolist()
    return np.unique([0, len(values) - 1, *(a + f(values[a:b]) for a, b in zip(edges, edges[1:]) for f in (np.argmin, np.argmax))])


def ticks(low: float, high: float, *, least: float = 0.0, log: bool = False) -> list[float]:
    """About five round numbers within low..high, low < high; `least` is the smallest distance of two."""
    if log:
        ends = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        powers, finer = ([x for i in ends for m in ms if low <= (x := m * 10.0**i) <= high] for ms in ((1,), (1, 2, 5)))
        return powers[:: -(-len(powers) // 6)] if len(powers) > 2 else finer if len(finer) > 2 else ticks(low, high)
    rough = max((high - low) / 5, least)
    power = 10.0 ** math.floor(math.log10(rough))
    every = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [i * every for i in range(math.ceil(low / every - 1e-9), math.floor(high / every + 1e-9) + 1)]


def _axis(values: np.ndarray, kind: str) -> tuple:
    """f64[n], finite -> (ticks, values -> 0 (bottom) to 1 (top), whether it is logarithmic)."""
    above, free = values[values > 1e-290], kind in ("fit", "near")
    if len(above) and (kind == "log" or (kind == "fit" and len(above) == len(values) and above.max() > 20 * np.median(above))):
        low, high = math.log10(above.min() / 1.15), math.log10(above.max() * 1.15)
        return ticks(10**low, 10**high, log=True), lambda v: (np.log10(np.maximum(v, 10**low)) - low) / (high - low), True
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    high = min(high, float(np.quantile(values, [0.99, 0.01]) @ [2, -1])) if kind == "near" and len(values) else high
    if not free:
        low, high = min(low, 0.0), max(high, float(kind == "share"))
    size = max(abs(low), abs(high))
    if high - low < max(1e-3 * size, 1e-30):  # all the same: a line in the middle, and not the noise of rounding
        low, high = low - (0.1 * size or 1) * free, high + (0.1 * size or 1)
    low, high = low - 0.05 * (high - low) * (free or low < 0), high + 0.05 * (high - low)
    return ticks(low, high), lambda v: (v - low) / (high - low), False


def _chart(chart: Chart, runs: list[Run], span: tuple[float, float], most: int) -> str:
    """A figure: all runs over the steps of `span`, and under it what each of them was last."""
    low, high = span[0] + chart.since * (span[1] - span[0]), span[1]
    drawn = [(run, what, run.curves[key]) for run in runs for key, what in chart.lines.items() if key in run.curves]
    seen = np.concatenate([np.zeros(0), *(v[(s >= low) & _fine(v)] for _, _, (s, v) in drawn)])
    marks, place, log = _axis(seen, chart.axis)
    x = lambda s: _LEFT + 4 + (s - low) / (high - low) * (_RIGHT - _LEFT - 8)
    y = lambda v: _FLOOR - np.clip(place(v), 0, 1) * (_FLOOR - _TOP)
    unit = f"{chart.unit}{', log axis' if log else ''}{', 0 or less at the bottom edge' if log and (seen <= 0).any() else ''}"
    text = lambda a, b, anchor, words: f'<text x="{a:.1f}" y="{b:.1f}" text-anchor="{anchor}">{_e(words)}</text>'
    frame = "".join(f"M{_LEFT} {y(v):.1f}H{_RIGHT}" for v in marks) + f"M{_LEFT} {_TOP}V{_FLOOR}H{_RIGHT}"
    frame += "".join(f"M{x(s):.1f} {_FLOOR}v4" for s in ticks(low, high, least=1))
    out = [f'<svg class="chart" viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{_e(chart.title)} over steps">']
    out += [f'<path class="frame" d="{frame}"/>', text(4, 11, "start", unit), text((_RIGHT + _LEFT) / 2, _HIGH - 4, "middle", "step")]
    out += [text(_LEFT - 5, y(v) + 3.5, "end", short(v)) for v in marks]
    out += [text(x(s), _FLOOR + 15, "middle", short(s)) for s in ticks(low, high, least=1)]
    for run in {run.label: run for run, _, _ in drawn}.values():
        if here := [s for s in dict.fromkeys(run.restarts) if s >= low]:
            told, d = ", ".join(map(_exact, here[:20])) + ", .." * (len(here) > 20), "".join(f"M{x(s):.1f} {_TOP}V{_FLOOR}" for s in here)
            out.append(f'<path class="restart {run.hue}" d="{d}"><title>{_e(run.label)}: restarted from step {told}</title></path>')
    for run, what, (steps, values) in drawn:
        for lost, part in ((" lost", steps > run.last), ("", steps <= run.last)):
            name = _e(run.label + f", {what}" * bool(what) + ", lost by a restart" * bool(lost))
            style = f'class="curve {what.replace(" ", "")}" stroke-dasharray="{"3 4" if what == "baseline" else run.dashes}"'
            inside = _line(steps[part & (steps >= low)], values[part & (steps >= low)], x, y, most, name, style)
            out.append(f'<g class="{run.hue}{lost}">{inside}</g>' if inside else "")
    told = lambda run: ", ".join(f"{what} {said(run.final(key))}".strip() for key, what in chart.lines.items() if key in run.curves)
    legend = "".join(f"<span>{run.name} <b>{_e(told(run)) or '-'}</b></span>" for run in runs)
    return f"<figure><h3>{_e(chart.title)}</h3>{''.join(out)}</svg><figcaption>{legend}</figcaption></figure>"


def _line(steps: np.ndarray, values: np.ndarray, x, y, most: int, name: str, style: str) -> str:
    """A curve's path, its dots, and triangles at the top edge where it is not finite. steps, values: f64[n]; name: escaped."""
    fine, out = _fine(values), []
    at, odd = np.flatnonzero(fine), np.flatnonzero(~fine)
    at = at[thin(values[at], most)]
    px, py = (np.rint(10 * p).astype(int) for p in (x(steps[at]), y(values[at])))  # tenths of a pixel
    if len(at):
        gaps = np.diff(np.cumsum(~fine)[at]) >= np.diff(np.cumsum(fine)[at])  # as many are not finite there as were thinned out, or more
        cuts = {0, *(np.flatnonzero(gaps) + 1).tolist()}  # each begins with h0: a point alone is a dot, the ends being round
        moves = zip(np.diff(px, prepend=0).tolist(), np.diff(py, prepend=0).tolist())
        d = "".join(f"{'m' if i in cuts else 'l'}{a / 10:g} {b / 10:g}{'h0' * (i in cuts)}" for i, (a, b) in enumerate(moves))
        out.append(f'<path {style} d="{d.replace(" -", "-")}"><title>{name}</title></path>')
    for i in range(len(at))[0 if len(at) <= _DOTS else -1 :]:
        told = f"{name}: step {_exact(steps[at[i]])}, {_exact(values[at[i]])}"
        out.append(f'<circle cx="{px[i] / 10:g}" cy="{py[i] / 10:g}" r="{3 if i == len(at) - 1 else 2}"><title>{told}</title></circle>')
    for near in np.split(odd, np.flatnonzero(np.diff(x(steps[odd]) // 5)) + 1) if len(odd) else []:
        more = f", and {len(near) - 1} more close by" * (len(near) > 1)
        told = f"{name}: step {_exact(steps[near[0]])}, {_exact(values[near[0]])}{more}"
        out.append(f'<path class="odd" d="M{x(steps[near[0]]) - 4:.1f} {_TOP - 3}h8l-4 7z"><title>{told}</title></path>')
    return "".join(out)


def _row(run: Run) -> dict[str, str]:
    """Of the table of runs."""
    nll = [v for key in run.curves if re.fullmatch("eval/.+/nll", key) and (v := run.final(key)) is not None]
    odd = int((~np.isfinite(run.curves["train/loss"][1])).sum()) if "train/loss" in run.curves else None
    day = lambda t: datetime.datetime.fromtimestamp(t, datetime.UTC).strftime("%Y-%m-%d %H:%M") if 0 <= t < 1e11 else "-"
    began, wrote = (day(run.times[i]) if run.times else "-" for i in (0, -1))
    out = {"run": run.name, "last step": f"{run.last:,.15g}", "started, UTC": began, "last written, UTC": wrote}
    out |= {"training loss": said(run.final("train/loss")), "losses not finite": said(odd) + "!" * bool(odd)}
    out |= {"held-out nll, mean of datasets": said(sum(nll) / len(nll) if nll else None), "restarts": str(len(run.restarts))}
    out |= {f"{key} seen": said(run.final(f"train/seen/{key}"), "short") for key in ("samples", "tokens")}
    out |= {"samples/s": said(run.final("train/samples_per_s")), "MFU": said(run.final("train/mfu"), ".1%")}
    out |= {"goodput": said(run.final("train/goodput"), ".1%"), "skipped steps": said(run.final("train/skipped_steps"))}
    return out | {f"{where} memory, GiB": said(run.final(f"train/memory/{where}_gib")) for where in ("host", "device")}


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A row's first cell and the head are HTML, the others text, a warning if it ends with "!"."""
    cell = lambda x: f"<td{' class=bad' if x.endswith('!') or 'NaN' in x or 'Inf' in x else ''}>{_e(x.rstrip('!'))}</td>"
    body = "".join(f"<tr><td>{first}</td>{''.join(map(cell, more))}</tr>" for first, *more in rows)
    return f'<div class="scroll"><table><thead><tr><th>{"</th><th>".join(head)}</th></tr></thead><tbody>{body}</tbody></table></div>'


def said(x: float | None, form: str = "") -> str:
    """About four digits, or as `form` says, if that is short as beside an axis; "-" for what is missing."""
    if x is None or not math.isfinite(x):
        return "-" if x is None else _exact(x)
    return short(x) if form == "short" or abs(x) >= 1e15 else format(x, form) if form else svg.number(x)


def short(x: float) -> str:
    """A round number, as it is written beside an axis."""
    size, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")) if s <= abs(x) < 1e15), (1.0, ""))
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{x / size:.6g}{unit}")
