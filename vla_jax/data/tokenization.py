"""What an action tokenizer does to each robot of a mixture: length, error in robot units, what is clamped; and tokenizers beside each other."""

from __future__ import annotations

import dataclasses

import numpy as np

from vla_jax.data import sample
from vla_jax.data.source import Source, fit_chunks
from vla_jax.tokens import actions, bins, files, published
from vla_jax.tokens.actions import FastTokenizer
from vla_jax.types import ActionTokenizer, UserError

VOCABS, SCALES, BINS = (512, 1024, 2048), (5.0, 10.0, 20.0), 256
_CHUNKS = 2048  # looked at of each dataset, evenly spaced


def name(action: ActionTokenizer, vocab: int = 0) -> str:
    """vocab: the size that was asked for, if the data filled less."""
    size = vocab or action.vocab_size
    if isinstance(action, published.PublishedFast):
        return f"published {size} x{action.scale:g}"
    return f"fast {size} x{action.scale:g}" if isinstance(action, FastTokenizer) else f"{files.kind(action)} {size}"


def measure(source: Source, action: ActionTokenizer, *, label: str = "") -> list[dict]:
    """One row per dataset of `source` (give the held-out one for figures of held-out episodes).

    tokens, p50, p95, max: of a chunk; ratio: numbers of a chunk to tokens, and ratio_whole of those chunks that do not reach past an
    episode's end (there the last action repeats, which is short to write). error: {dimension: mean absolute error in its unit}, against
    what was recorded; rmse of the same, normalised. clipped: share of numbers beyond the range that normalising keeps (a part of the
    error that no tokenizer can mend). clamped_low, clamped_high: share of what is written (coefficients, for FAST) below and above
    what can be, and clamped_chunks of chunks with any; valid: share that decodes as a chunk; used: ids in use. Steps past an
    episode's end count as tokens, not as errors.
    """
    out = []
    for d, ix in enumerate(source.indexes):
        frames, normal = source.frames[d].spread(_CHUNKS), source.normalizers[d]["action"]
        raw, mask = sample.actions(ix, frames, source.steps(d))
        chunks, exact = normal.normalize(raw), dataclasses.replace(normal, limit=np.inf).normalize(raw)
        n, steps, dims = chunks.shape
        ids = action.encode_batch(chunks)
        back, valid = action.decode_batch(ids, steps=steps, dims=dims)
        lengths = np.array([len(i) for i in ids])
        low, high = action.clamps(chunks)
        whole = lengths[mask.all(axis=1)]
        error = np.abs(normal.denormalize(back) - raw)[mask].mean(axis=0)
        quantile = lambda q, lengths=lengths: int(np.quantile(lengths, q, method="higher"))
        out.append(
            {
                "dataset": ix.card.name,
                "tokenizer": label or name(action),
                "vocab": action.vocab_size,
                "chunk": [steps, dims],
                "chunks": n,
                "numbers": steps * dims,
                "tokens": float(lengths.mean()),
                "p50": quantile(0.5),
                "p95": quantile(0.95),
                "max": int(lengths.max()),
                "ratio": float(steps * dims / lengths.mean()),
                "ratio_whole": float(steps * dims / whole.mean()) if len(whole) else None,
                "rmse": float(np.sqrt(np.mean((back - exact)[mask] ** 2))),
                "error": dict(zip([x.name for x in ix.card.action.dims], error.tolist())),
                "units": [x.unit for x in ix.card.action.dims],
                "clipped": float((exact != chunks)[mask].mean()),
                "clamped_low": low / chunks.size,
                "clamped_high": high / chunks.size,
                "clamped_chunks": float(np.mean([any(action.clamps(c[None])) for c in chunks])) if low + high else 0.0,
                "valid": float(valid.mean()),
                "used": len(np.unique(np.concatenate(ids))),
            }
        )
    return out


def beside(source: Source, held_out: Source, *, sweep: bool) -> list[dict]:
    """Rows of `measure` on held-out chunks for the run's own tokenizer (`*`), uniform and quantile bins; with `sweep`, FAST of every
    vocabulary in VOCABS and scale in SCALES, too, fitted on the mixture's training chunks."""
    chunks, own = fit_chunks(source), source.layout.action
    rows = measure(held_out, own, label=f"{name(own)} *")
    for scale in SCALES if sweep else ():
        for vocab, made in fits(chunks, scale).items():
            rows += measure(held_out, made, label=name(made, vocab))
    for made in (bins.uniform(BINS), bins.quantile(chunks, BINS)):
        rows += measure(held_out, made, label=name(made, BINS)) if made != own else []
    return rows


def fits(chunks: list[np.ndarray], scale: float) -> dict[int, FastTokenizer]:
    """One for each vocabulary in VOCABS that holds the coefficients in use: the merges of a smaller one are the first of a larger. A
    vocabulary that the data cannot fill is as large as no pair occurs twice."""
    try:
        whole = actions.fit(chunks, vocab_size=max(VOCABS), scale=scale)
    except UserError:
        return {}
    return {v: dataclasses.replace(whole, merges=whole.merges[: v - whole.alphabet]) for v in VOCABS if v >= whole.alphabet}


def texts(source: Source) -> list[str]:
    """A line per dataset: how long the text of its samples is, and what tokens.limit cuts of it."""
    out = []
    for d, ix in enumerate(source.indexes):
        frames = source.frames[d].spread(_CHUNKS // 4)
        made = [i.sequence for i in source.items(d, frames, np.zeros(len(frames), np.int64))]
        length = np.array([(s.tokens >= 0).sum() + s.cut for s in made])
        middle, most = np.quantile(length, [0.5, 0.95], method="higher")
        cut = np.array([s.cut for s in made])
        said = f"; tokens.limit {source.layout.limit} cuts {np.mean(cut > 0):.1%} of them, by {cut.max()} at most" if cut.any() else ""
        out.append(
            f"{ix.card.name}: text of a sample (prompt and actions) has {middle:g} tokens (p50), {most:g} (p95), {length.max()} (max){said}"
        )
    return out


_COLUMNS = {
    "tokenizer": lambda r: r["tokenizer"],
    "tokens": lambda r: f"{r['tokens']:.1f}",
    "p50": lambda r: str(r["p50"]),
    "p95": lambda r: str(r["p95"]),
    "max": lambda r: str(r["max"]),
    "ratio": lambda r: f"{r['ratio']:.2f}",
    "whole": lambda r: f"{r['ratio_whole']:.2f}" if r["ratio_whole"] else "",
    "rmse": lambda r: f"{r['rmse']:.4f}",
    "clipped": lambda r: f"{r['clipped']:.2%}",
    "clamped": lambda r: f"{r['clamped_low'] + r['clamped_high']:.2%}",
    "in chunks": lambda r: f"{r['clamped_chunks']:.1%}",
    "valid": lambda r: f"{r['valid']:.1%}",
    "used": lambda r: f"{r['used']}/{r['vocab']}",
}


def table(rows: list[dict]) -> str:
    """Per dataset its tokenizers, one a line, and the error of each dimension in its unit."""
    out = []
    for dataset in dict.fromkeys(r["dataset"] for r in rows):
        mine = [r for r in rows if r["dataset"] == dataset]
        (steps, dims), count = mine[0]["chunk"], mine[0]["chunks"]
        out.append(f"{dataset}: {count} chunks of {steps} x {dims} = {steps * dims} numbers")
        heads = [f"{n} {u}" if u != "1" else n for n, u in zip(mine[0]["error"], mine[0]["units"])]
        lines = [[*_COLUMNS, *heads]]
        lines += [[*(show(r) for show in _COLUMNS.values()), *(f"{e:.2g}" for e in r["error"].values())] for r in mine]
        width = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        out += ["  " + "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, width))) for line in lines]
    return "\n".join(out)
