"""A policy for people: what it is sent, what it sends, in which units and ranges; and a picture of a chunk before it moves anything."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from vla_jax.data import images, svg
from vla_jax.deploy.limits import Limits
from vla_jax.deploy.policy import Policy
from vla_jax.types import UserError

_KINDS = {
    "delta": "change within one step",
    "absolute": "where to be after the step",
    "velocity": "speed during the step",
    "binary": "0 or 1; of a gripper 1 is open",
}


def text(policy: Policy, limits: Limits | None, *, prompt_tokens: int) -> str:
    """The sheet, for a terminal. prompt_tokens: of the longest instruction that is served."""
    card = policy.card
    lines = [
        f"{card.name}: {card.robot}",
        f"control   {card.control_hz:g} actions a second; a chunk is {policy.steps} steps = {policy.steps / card.control_hz:.3g} s",
        f"cameras   uint8 RGB [h, w, 3], any size, resized to {policy.image_size} x {policy.image_size} ({policy.resize})",
        *(
            f"          {v:<10} recorded as {card.views[v]}{', stored as BGR in the data: send RGB' if v in card.bgr else ''}"
            for v in policy.views
        ),
    ]
    lines.append(f"prompt    text of at most {prompt_tokens} tokens as `vla-jax serve --prompt-tokens={prompt_tokens}` takes it")
    if policy.history > 1:
        lines.append(
            f"history   {policy.history} steps: pictures VIEW@-1 .. of the steps before, states [{policy.history}, {len(card.state.dims)}] oldest first"
        )
    of = policy.stats or {}
    lines += ["", "state, in this order; the range is q01 .. q99 of training", *_table(card.state.dims, of.get("state"), None)]
    lines += ["", "action, in this order; sent = what leaves the limits", *_table(card.action.dims, of.get("action"), limits)]
    used = dict.fromkeys(d.kind for d in card.action.dims)
    lines += ["", *(f"{kind:<9} {_KINDS[kind]}" for kind in used)]
    if limits is None:
        lines.append("limits    none: actions are sent as the model has them")
    return "\n".join(lines)


def _table(dims, stats, limits: Limits | None) -> list[str]:
    rows = [["", "name", "unit", "frame", "kind", "training"] + (["sent", "most change a step"] if limits else [])]
    shown = lambda a, b: f"{svg.number(float(a))} .. {svg.number(float(b))}"
    for i, d in enumerate(dims):
        row = [str(i), d.name, d.unit, d.frame, d.kind, shown(stats.q01[i], stats.q99[i]) if stats else "-"]
        if limits:
            free = not np.isfinite(limits.low[i])
            row += ["as it is" if free else shown(limits.low[i], limits.high[i])]
            row += [svg.number(float(limits.most[i])) if np.isfinite(limits.most[i]) else "-"]
        rows.append(row)
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(r, widths)).rstrip() for r in rows]


def read_picture(file: str | Path) -> np.ndarray:
    """JPEG or PNG -> u8[h w 3] RGB. Raises: UserError."""
    try:
        return images.decode(Path(file).expanduser().read_bytes())
    except images.UndecodableImage as e:
        raise UserError(f"{file} is no picture that can be read: {e}") from e


def picture(policy: Policy, chunk: np.ndarray, sent: np.ndarray, *, title: str) -> str:
    """f32[k a] of the model, f32[k a] as it would be sent -> an SVG file: a row a dimension, q01 .. q99 of training shaded."""
    dims, stats, wide, tall, left = policy.card.action.dims, policy.stats["action"], 300, 84, 190
    step = tall + 16
    width, height = left + 2 * (wide + 20), 64 + step * len(dims)
    write = lambda x, y, said, size=12: f'<text x="{x}" y="{y}" font-size="{size}">{html.escape(said)}</text>'
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">']
    out.append('<style>text{font-size:11px;font-family:sans-serif}</style><rect width="100%" height="100%" fill="#fff"/>')
    out += [write(10, 22, title), write(left, 48, "as the model has it"), write(left + wide + 20, 48, "as it would be sent")]
    real = np.ones(len(chunk), bool)
    for i, d in enumerate(dims):
        band = float(stats.q01[i]), float(stats.q99[i])
        both = np.nan_to_num(np.stack([chunk[:, i], sent[:, i]]))
        span = min(band[0], float(both.min())), max(band[1], float(both.max()))
        top = 58 + i * step
        out += [write(10, top + 30, f"{d.name} [{d.unit}]"), write(10, top + 46, f"{d.kind}, {d.frame}")]
        changed = int((chunk[:, i] != sent[:, i]).sum())
        out.append(write(10, top + 62, f"{changed} of {len(chunk)} changed" if changed else "unchanged"))
        for column, values in enumerate(both):
            drawn = svg.line(values, real, band=band, limits=span, width=wide, height=tall, label=d.name)
            out.append(f'<g transform="translate({left + column * (wide + 20)},{top})">{drawn}</g>')
    return "\n".join([*out, "</svg>"]) + "\n"
