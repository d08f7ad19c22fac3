"""The page of `vla-jax rollout`: a table of tasks, and every filmed episode with its outcome, instruction, film strip and video. It needs no
other file; all text is escaped, and nothing on it runs or is fetched."""

from __future__ import annotations

import base64
import html
from pathlib import Path

import numpy as np

from vla_jax import __version__
from vla_jax.data import svg
from vla_jax.deploy.rollout import Outcome

_SHOTS = 6
_TYPES = {".mp4": "video/mp4", ".webp": "image/webp"}
_STYLE = """
:root{color-scheme:light}body{font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;color:#1d2733;background:#f4f6f8;margin:0}
main{max-width:1200px;margin:0 auto;padding:24px 20px 60px}h1{font-size:25px;margin:0 0 4px}h2{font-size:19px;margin:0 0 10px;overflow-wrap:anywhere}
section{background:#fff;border:1px solid #dde2e8;border-radius:8px;padding:18px 20px;margin:16px 0;overflow-x:auto}.dim{color:#6b7480}
table{border-collapse:collapse;width:100%;font-size:13px}th,td{padding:5px 8px;border-bottom:1px solid #e6eaee;text-align:left}.n{text-align:right;font-variant-numeric:tabular-nums}
th{color:#4a5562}.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:14px}article{border:1px solid #e6eaee;border-radius:6px;padding:10px 12px;border-left:5px solid #c4501b}
article.won{border-left-color:#4b9a66}article h3{font-size:14px;margin:0}article p{margin:2px 0 8px}article q{font-style:italic}.tag{color:#b3400f;font-weight:600}.won .tag{color:#2f7a4c}
video,.film{width:100%;display:block;background:#222;border-radius:3px}.strip{display:flex;gap:3px;margin:0 0 6px}.strip img{width:calc(100%/6 - 3px);height:auto;border-radius:2px}
"""
_e = html.escape


def write(out: Path, how: dict, tasks: dict[str, dict], results: dict[str, list[Outcome]], videos: dict[tuple[str, int], Path]) -> None:
    """how: what was run; tasks: rollout.summary by task; videos: files by (task, seed), laid into the page."""
    sections = [_task(task, outcomes, videos) for task, outcomes in results.items()]
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'\">"
        f"<title>Rollouts: {_e(how['env'])}</title><style>{_STYLE}</style></head><body><main>\n<h1>Rollouts: {_e(how['env'])}</h1>"
        f'<p class="dim">{_e(how["robot"])} of {_e(Path(how["export"]).name)}, {_e(_replans(how))}; seed {how["seed"]}; vla_jax {_e(__version__)}</p>'
        f"<section>{_table(tasks)}</section>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )
    out.write_text(text, encoding="utf-8")


def _replans(how: dict) -> str:
    often = f"replans after {how['execute']:.0%} of a chunk" if how["execute"] else "replans at every step"
    return often if how["ensemble"] is None else f"{often}, chunks blended with decay {how['ensemble']:g}"


def _table(tasks: dict[str, dict]) -> str:
    head = ("task", "success", "95 % interval", "", "steps to success", "ms an answer (at once)", "malformed chunks", "numbers cut")
    rows = []
    for task, s in tasks.items():
        low, high = s["interval_95"]
        take = lambda key, scale=1.0, s=s: "-" if s[key] is None else f"{s[key] * scale:.1f}"
        cells = [f"{s['successes']} of {s['episodes']} ({s['success_rate']:.0%})", f"{low:.0%} - {high:.0%}"]
        tail = [
            take("mean_steps_to_success"),
            f"{take('seconds_per_call', 1000)} ({s['at_once']})",
            f"{s['malformed']} of {s['chunks']}",
            f"{s['clipped']:.1%}",
        ]
        plain = lambda cells: "".join(f'<td class="n">{_e(c)}</td>' for c in cells)
        rows.append(f"<tr><td>{_e(task)}</td>{plain(cells)}<td>{_interval(s['success_rate'], low, high)}</td>{plain(tail)}</tr>")
    right = ' class="n"'
    top = "".join(f"<th{right if i not in (0, 3) else ''}>{_e(h)}</th>" for i, h in enumerate(head))
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _interval(rate: float, low: float, high: float) -> str:
    """A success rate as a dot on 0 to 1, its interval as a line."""
    x = lambda v: f"{4 + 112 * float(np.clip(v, 0, 1)):.1f}"
    return (
        f'<svg viewBox="0 0 120 14" width="120" height="14" role="img" aria-label="{rate:.0%}"><path d="M4 7H116" stroke="#dde2e8"/>'
        f'<path d="M{x(low)} 7H{x(high)}" stroke="{svg.BLUE}" stroke-width="3"/><circle cx="{x(rate)}" cy="7" r="4" fill="{svg.BLUE}"/></svg>'
    )


def _task(task: str, outcomes: list[Outcome], videos: dict[tuple[str, int], Path]) -> str:
    filmed = "".join(_episode(o, videos[task, o.seed]) for o in outcomes if (task, o.seed) in videos)
    rest = [o for o in outcomes if (task, o.seed) not in videos]
    said = lambda o: f"{o.seed}: {'success' if o.success else 'failure'} after {o.steps} steps"
    note = f'<p class="dim">Not filmed: {_e("; ".join(map(said, rest)))}</p>' if rest else ""
    return f'<section><h2>{_e(task)}</h2><div class="grid">{filmed}</div>{note}</section>'


def _episode(o: Outcome, file: Path) -> str:
    kind = _TYPES[file.suffix]
    data = f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"
    shots = [o.frames[i] for i in np.unique(np.linspace(0, len(o.frames) - 1, _SHOTS).round().astype(int))]
    strip = "".join(svg.picture(x, most=96, label=f"shot {i + 1}") for i, x in enumerate(shots))
    still = strip.partition('src="')[2].partition('"')[0]  # shown before the video is loaded
    player = f'<video controls muted loop poster="{still}" src="{data}"></video>'
    if not kind.startswith("video"):
        player = f'<img class="film" alt="video" src="{data}">'
    bad = f", {o.malformed} of {o.chunks} chunks malformed" if o.malformed else ""
    return (
        f'<article class="{"won" if o.success else "lost"}"><h3><span class="tag">{"success" if o.success else "failure"}</span> '
        f'<span class="dim">after {o.steps} steps, scene {o.seed}{bad}</span></h3><p><q>{_e(o.prompt)}</q></p>'
        f'<div class="strip">{strip}</div>{player}</article>'
    )
