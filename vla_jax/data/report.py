"""`vla-jax data report`: what a mixture holds, on one HTML page that needs nothing else: weights, warnings, and of each dataset
pictures, action chunks and distributions. All text that comes from data is escaped; the page runs no script and may load nothing."""

from __future__ import annotations

import collections
import datetime
import html
from pathlib import Path

import numpy as np

from vla_jax import __version__
from vla_jax.config import Config
from vla_jax.data import images, sample, survey, svg
from vla_jax.data.index import StepIndex
from vla_jax.data.mixture import Mixture
from vla_jax.data.survey import Column, Survey

_EPISODES, _SHOTS = 3, 8
_PARTS = ("Episodes", "Action", "State", "Lengths")  # of a dataset's section
_STYLE = """
:root{color-scheme:light}body{font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:#1d2733;background:#f4f6f8;margin:0}
main{max-width:1200px;margin:0 auto;padding:24px 20px 60px}h1{font-size:25px;margin:0 0 4px}h2{font-size:20px;margin:0 0 10px;overflow-wrap:anywhere}
h3{font-size:16px;margin:24px 0 8px}h3 .dim{font-weight:400}h4{font-size:13px;margin:0;font-weight:600}section{background:#fff;border:1px solid #dde2e8;border-radius:8px;padding:18px 20px;margin:16px 0}
a{color:#235a98;text-decoration:none}a:hover{text-decoration:underline}.dim{color:#6b7480}.small{font-size:12px}
nav ul{columns:3 300px;margin:4px 0;padding-left:18px}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:12.5px}th,td{padding:5px 8px;border-bottom:1px solid #e6eaee;text-align:left;vertical-align:top}
th{font-weight:600;color:#4a5562;border-bottom:2px solid #cdd4dc;vertical-align:bottom;line-height:1.25}th.n{white-space:normal}.names td:first-child{min-width:150px}td{overflow-wrap:anywhere}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tbody tr:nth-child(even){background:#fafbfc}dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(125px,1fr));gap:10px;margin:12px 0 0}
dl.facts div{background:#fff;border:1px solid #dde2e8;border-radius:6px;padding:7px 11px}dt{font-size:11.5px;color:#6b7480}dd{margin:0;font-size:15px;font-weight:600;overflow-wrap:anywhere}
section dl.facts div{background:#f4f6f8;border:0}.warn li{margin:3px 0}.warn{border-left:5px solid #d98324}.fine{border-left:5px solid #4b9a66}.warn ul{margin:4px 0 12px;padding-left:20px}
.episode{border-top:1px solid #e6eaee;padding:12px 0 6px}.said{font-size:14px;margin:2px 0 8px}.said q{font-style:italic}
.strip{display:flex;flex-wrap:wrap;gap:6px;margin:0 0 8px}.view{font-size:12px;color:#4a5562;margin:6px 0 2px}figure{margin:0}figure img{display:block;height:auto;border-radius:3px;image-rendering:auto}
figcaption{font-size:11px;color:#6b7480;text-align:center}.gone{width:128px;height:96px;background:#d3d7dc;color:#4a5562;border-radius:3px;font-size:11px;display:flex;align-items:center;justify-content:center;text-align:center;padding:4px;box-sizing:border-box}
.middle img,.middle .gone{outline:2px solid #2f6db3}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:8px}
.card{border:1px solid #e6eaee;border-radius:6px;padding:7px 8px 6px;min-width:0}.card svg{display:block;width:100%;height:auto;margin:3px 0}svg text{font-size:10px;font-family:inherit}.card p{margin:0;font-size:11.5px;color:#4a5562;overflow-wrap:anywhere}
.card h4{overflow-wrap:anywhere}.card h4 .dim{display:block;font-weight:400;font-size:11px}dl.mini{display:grid;grid-template-columns:1fr 1fr;margin:4px 0 0;font-size:11px;line-height:1.4}.mini dt{font-size:11px}
.mini dd{font-size:11px;font-weight:400;text-align:right;font-variant-numeric:tabular-nums}.bad{color:#b3400f;font-weight:600}.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(250px,1fr));gap:10px 22px}.two>div{min-width:0}
"""
_e = html.escape
_n = svg.number


def write(mix: Mixture, indexes: list[StepIndex], config: Config, out: Path) -> list[tuple[str, str]]:
    """Writes the page and returns its warnings: (dataset, sentence). Chunks and tokens are as a run with `config` has them.

    Raises: UserError when a dataset has no training frames.
    """
    surveys, opened = survey.take(mix, indexes, config)
    steps = [opened.steps(d) for d in range(len(surveys))]
    made = [_dataset(s, k) for s, k in zip(surveys, steps)]
    found = [(s.name, said) for s, (_, faults) in zip(surveys, made) for said in [*survey.warnings(s), *faults]]
    fault = next((s.token_fault for s in surveys if s.token_fault), "")
    if fault:
        found.append(("the action tokenizer", fault))
    body = [_header(mix, surveys, config), _contents(surveys, found), _weights(mix, surveys), _warnings(found), *(text for text, _ in made)]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        # whatever a dataset holds: nothing on this page runs, and nothing is fetched
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{_e(mix.name)}: data report</title><style>{_STYLE}</style></head><body><main>\n"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(head + "\n".join(body) + "\n</main></body></html>\n", encoding="utf-8")
    return found


def _facts(pairs) -> str:
    return '<dl class="facts">' + "".join(f"<div><dt>{_e(k)}</dt><dd>{_e(str(v))}</dd></div>" for k, v in pairs) + "</dl>"


def _table(head: list[str], rows: list[list], numeric=(), kind: str = "") -> str:
    """Cells are text and escaped, or (html,) and not."""
    mark = lambda i: ' class="n"' if i in numeric else ""
    cell = lambda i, x: f"<td{mark(i)}>{x[0] if isinstance(x, tuple) else _e(str(x))}</td>"
    top = "".join(f"<th{mark(i)}>{_e(h)}</th>" for i, h in enumerate(head))
    body = "".join("<tr>" + "".join(cell(i, x) for i, x in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _size(n: float) -> str:
    return next(f"{n / k:.3g} {u}" for k, u in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes")) if n >= k or k == 1)


def _header(mix: Mixture, surveys: list[Survey], config: Config) -> str:
    size = sum(f.stat().st_size for s in surveys for f in s.ix.path.iterdir() if f.is_file())
    held = sum(s.ix.episodes - s.train_episodes for s in surveys)
    facts = [
        ("datasets", len(surveys)),
        ("episodes", f"{sum(s.ix.episodes for s in surveys):,}"),
        ("frames", f"{sum(s.ix.frames for s in surveys):,}"),
        ("hours", f"{sum(s.hours for s in surveys):.2f}"),
        ("index size", _size(size)),
        ("held out", f"{config.data.holdout:g} ({held:,} episodes)"),
        ("chunk", f"{config.data.chunk_s:g} s"),
    ]
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f'<h1>{_e(mix.name)}</h1><p class="dim">Data report, made {when} by vla_jax {_e(__version__)}</p>{_facts(facts)}'


def _contents(surveys: list[Survey], found) -> str:
    many = collections.Counter(name for name, _ in found)
    said = lambda n: f' <span class="bad">({n} warning{"s" if n > 1 else ""})</span>' if n else ""
    link = lambda s: f'<a href="#{_e(s.name)}">{_e(s.name)}</a>'
    parts = lambda s: ", ".join(f'<a href="#{_e(s.name)}-{p.lower()}">{p.lower()}</a>' for p in _PARTS)
    items = [f'<li>{link(s)}{said(many[s.name])}<br><span class="small">{parts(s)}</span></li>' for s in surveys]
    top = f'<li><a href="#-weights">Weights</a></li><li><a href="#-warnings">Warnings</a> ({len(found)})</li>'
    return f"<section><nav><h4>Contents</h4><ul>{top}{''.join(items)}</ul></nav></section>"


def _weights(mix: Mixture, surveys: list[Survey]) -> str:
    head = [
        "dataset",
        "weight",
        "share of samples",
        "share of frames",
        "episodes",
        "frames",
        "hours",
        "epochs in 1M samples",
        "samples until all seen",
    ]
    head += ["with an instruction", "skipped", "filtered", "missing shards"]
    rows = []
    for s in surveys:
        bar = (
            f'<span style="display:block;background:linear-gradient(90deg,#c9dff5 {100 * s.share:.1f}%,transparent 0)">{s.share:.2%}</span>'
        )
        gone = [s.ix.shards[i] for i in sorted(s.ix.missing)]
        name = f'<a href="#{_e(s.name)}">{_e(s.name)}</a>'
        lost = f"{len(gone)}: {', '.join(gone[:3])}{', ..' if len(gone) > 3 else ''}" if gone else "none"
        row = [
            (name,),
            f"{s.weight:g}",
            (bar,),
            f"{s.frame_share:.2%}",
            f"{s.ix.episodes:,}",
            f"{s.ix.frames:,}",
            f"{s.hours:.2f}",
            _n(s.epochs),
        ]
        row += [f"{s.train_frames / s.share:,.0f}", f"{s.labelled / s.ix.frames:.1%}"]
        rows.append([*row, survey.causes(s.ix.skipped) or "none", survey.causes(s.ix.filtered) or "none", lost])
    table = _table(head, rows, range(1, 10), "names")
    how = "times the dataset's number of frames, " if mix.weight == "times_size" else ""
    note = f"The share of samples follows from the weight as published, {how}normalised to one. Episodes, frames and hours are all that can be read; shares of frames and epochs count those that are trained on."
    return f'<section id="-weights"><h2>Weights</h2>{table}<p class="dim small">{note}</p></section>'


def _warnings(found) -> str:
    by: dict[str, list[str]] = {}
    for name, said in found:
        by.setdefault(name, []).append(said)
    if not by:
        return '<section id="-warnings" class="fine"><h2>Warnings</h2><p>Nothing looks wrong.</p></section>'
    groups = "".join(f"<h4>{_e(name)}</h4><ul>{''.join(f'<li>{_e(said)}</li>' for said in lines)}</ul>" for name, lines in by.items())
    return f'<section id="-warnings" class="warn"><h2>Warnings ({len(found)})</h2>{groups}</section>'


def _dataset(s: Survey, steps: int) -> tuple[str, list[str]]:
    """(a dataset's section, warnings about its pictures)."""
    strips, seen, faults = _strips(s, steps)
    out = [f'<section id="{_e(s.name)}"><h2>{_e(s.name)}</h2>', _card(s, seen), _part(s, "Episodes"), strips]
    for part in ("Action", "State"):
        key, columns = part.lower(), s.columns[part.lower()]
        cut = f" ({s.looked_at:,} of {s.train_frames:,}, evenly spaced)" if s.looked_at < s.train_frames else ""
        note = f"Training frames{cut}; red: q01 and q99; what lies further out is counted in the outermost bars."
        out.append(_part(s, part, note if columns else ""))
        grid = "".join(_column(c) for c in columns)
        out.append(f'<div class="grid">{grid}</div>' if columns else f'<p class="dim">No {key} is recorded.</p>')
    return "".join(out) + _counts(s, steps) + "</section>", faults


def _part(s: Survey, part: str, note: str = "") -> str:
    return f'<h3 id="{_e(s.name)}-{part.lower()}">{part} <span class="dim small">{_e(note)}</span></h3>'


def _card(s: Survey, seen: dict[str, str]) -> str:
    card = s.ix.card
    facts = [("robot", card.robot or "-"), ("rate", f"{card.control_hz:g} Hz"), ("version", card.version), ("licence", card.licence or "-")]
    facts += [("splits", ", ".join(card.splits)), ("gripper recorded", f"state {card.gripper['state']}, action {card.gripper['action']}")]
    views = [[v, card.views[v], seen.get(v, "-"), "red and blue exchanged" if v in card.bgr else ""] for v in card.views]
    shown = _table(["view", "key", "pictures", ""], views) if views else '<p class="dim">No camera is recorded.</p>'
    dims = lambda key: [[c.dim.name, c.dim.unit, c.dim.frame, c.dim.kind] for c in s.columns[key]]
    said = [[t, f"{n:,}"] for t, n in s.texts]
    texts = (
        _table([f"most frequent of {s.distinct:,} instructions", "frames"], said, {1})
        if said
        else '<p class="dim">There are no instructions.</p>'
    )
    specs = "".join(f"<div>{_table([key, 'unit', 'frame', 'kind'], dims(key))}</div>" for key in ("action", "state") if s.columns[key])
    return f'{_facts(facts)}<div class="two" style="margin:14px 0"><div>{shown}<br>{texts}</div>{specs}</div>'


def _strips(s: Survey, steps: int) -> tuple[str, dict[str, str], list[str]]:
    """(filmstrips and chunks, what the pictures of each view are, warnings about them)."""
    ix, out, seen = s.ix, [], {}
    bad: dict[str, collections.Counter] = {v: collections.Counter() for v in ix.views}
    plain: collections.Counter = collections.Counter()
    whole = np.flatnonzero(~np.isin(ix.episode_shard, sorted(ix.missing)))
    whole = whole if whole.size else np.arange(ix.episodes)
    for episode in whole[np.unique(((np.arange(_EPISODES) + 0.5) * len(whole) / _EPISODES).astype(int))].tolist():
        first, end = (int(x) for x in ix.episode_start[episode : episode + 2])
        frames = np.unique(np.linspace(first, end - 1, _SHOTS).round().astype(int)).tolist()
        middle = frames[len(frames) // 2]
        said = " / ".join(f"<q>{_e(t)}</q>" for t in ix.instructions(first)) or '<span class="dim">no instruction</span>'
        length = f"{end - first} steps, {(end - first) / ix.card.control_hz:.1f} s"
        out.append(f'<div class="episode"><h4>Episode {episode} <span class="dim">({length})</span></h4><div class="said">{said}</div>')
        for number, view in enumerate(ix.views):
            shots = []
            for frame in frames:
                tile, what, flat = _shot(ix, frame, number)
                plain[view] += flat
                if what.startswith("!"):
                    bad[view][what[1:]] += 1
                else:
                    seen.setdefault(view, what)
                mark = ' class="middle"' if frame == middle else ""
                shots.append(f"<figure{mark}>{tile}<figcaption>{(frame - first) / ix.card.control_hz:.1f} s</figcaption></figure>")
            out.append(f'<div class="view">{_e(view)}</div><div class="strip" data-view="{_e(view)}">{"".join(shots)}</div>')
        chunk, mask = sample.actions(ix, middle, steps)
        plots = "".join(_plot(c, chunk[:, i], mask) for i, c in enumerate(s.columns["action"]))
        note = f"The {steps} actions from step {middle - first} on, as the card's ops make them; shaded: q01 to q99; grey: after the episode's end."
        out.append(f'<div class="view">{note}</div><div class="grid">{plots}</div></div>')
    tell = lambda view, n, cause: f"{n} of the pictures shown of view {view} cannot be: {cause}."
    faults = [tell(view, n, cause) for view, causes in bad.items() for cause, n in causes.items()]
    faults += [f"{n} of the pictures shown of view {view} are of one plain colour: was the camera there?" for view, n in plain.items() if n]
    return "".join(out), seen, faults


def _shot(ix: StepIndex, frame: int, view: int) -> tuple[str, str, bool]:
    """(a picture or a grey tile; what the picture is in words, or `!` and why it cannot be shown; whether it is of one colour)."""
    name = ix.views[view]
    if not ix.image[frame, view, 1]:
        return '<div class="gone">no picture</div>', "!none is recorded at that step", False
    try:
        data = sample.fetch(ix, sample.picture(ix, frame, name))
        image = images.decode(data, ix.pictures[name], bgr=name in ix.card.bgr)
    except images.UndecodableImage as e:
        return f'<div class="gone">{_e(e.cause)}</div>', f"!{e.cause}", False
    feature = ix.pictures[name]
    known = {b"\xff\xd8": "JPEG", b"\x89P": "PNG"}
    kind = known.get(data[:2], "other") if feature.kind != "tensor" else f"raw ({feature.encoding or 'none'})"
    flat = bool((image.reshape(-1, 3).std(axis=0) < 2).all())
    return svg.picture(image, label=f"{name}, frame {frame}"), f"{image.shape[1]} x {image.shape[0]}, {kind}", flat


def _name(c: Column) -> str:
    return f'<h4>{_e(c.dim.name)} <span class="dim">{_e(c.dim.unit)}, {_e(c.dim.frame)}, {_e(c.dim.kind)}</span></h4>'


def _plot(c: Column, values: np.ndarray, mask: np.ndarray) -> str:
    band = (0.0, 1.0) if c.dim.kind == "binary" else (c.q01, c.q99)
    return f'<div class="card">{_name(c)}{svg.line(values, mask, band=band, limits=band, label=c.dim.name)}</div>'


def _column(c: Column) -> str:
    lines = [(k, _n(getattr(c, k)), "") for k in ("mean", "std", "min", "q01", "q99", "max")]
    if c.constant:
        lines.append(("constant", "yes", "bad"))
    elif c.clipped:
        lines.append(("clipped", f"{c.clipped:.2%}", "bad" if c.clipped > survey.CLIPPED else ""))
    said = "".join(f'<dt class="{mark}">{k}</dt><dd class="{mark}">{v}</dd>' for k, v, mark in lines)
    picture = svg.histogram(c.counts, c.low, c.high, marks=(c.q01, c.q99), label=c.dim.name)
    return f'<div class="card">{_name(c)}{picture}<dl class="mini">{said}</dl></div>'


def _counts(s: Survey, steps: int) -> str:
    size = f"{steps} x {len(s.columns['action'])} numbers"
    out = []
    for title, values, unit in (
        (f"FAST tokens of a chunk ({size})", s.tokens, "tokens"),
        ("Text tokens of a prompt", s.prompts, "tokens"),
        ("Length of an episode", s.lengths, "steps"),
    ):
        if not len(values):
            out.append(f'<div class="card"><h4>{_e(title)}</h4><p>{_e(s.token_fault)}</p></div>')
            continue
        mid, high = (float(np.quantile(values, q)) for q in (0.5, 0.95))
        said = f"mean {_n(values.mean())}, median {_n(mid)}, 95 % {_n(high)}, longest {int(values.max())} {unit}"
        drawn = svg.histogram(*svg.whole_numbers(values), width=360, height=90, label=title)
        out.append(f'<div class="card"><h4>{_e(title)}</h4>{drawn}<p>{said}</p></div>')
    return _part(s, "Lengths") + f'<div class="two">{"".join(out)}</div>'
