"""The numbers of a data report, and the sentences that warn of what looks wrong in them. What each row means is in data/report.py."""

from __future__ import annotations

import dataclasses

import numpy as np

from vla_jax.config import Config
from vla_jax.data import sample, source, stats
from vla_jax.data.index import StepIndex
from vla_jax.data.mixture import BLOCK, Mixture
from vla_jax.data.source import Source
from vla_jax.tokens import files, text
from vla_jax.tokens.sequence import Layout
from vla_jax.types import Dim, Stats, UserError

BINS = 64
_LOOKED_AT = 200_000  # frames per dataset for histograms; quantiles, mean and range are of all of them
_TOKENIZED = 1024  # frames per dataset for token lengths
_MILLION = 1_000_000
CLIPPED = 0.005  # share of values beyond the limit of the normaliser from which it is worth a word
_LIMITS = {  # the largest size of q01 and q99 that is plausible, by kind and unit
    ("delta", "m"): (0.5, "in one step"),
    ("delta", "rad"): (1.5, "in one step"),
    ("absolute", "m"): (5.0, "from the origin"),
    ("absolute", "rad"): (13.0, "(more than two turns; degrees?)"),
    ("velocity", "m/s"): (5.0, ""),
    ("velocity", "rad/s"): (15.0, ""),
}


@dataclasses.dataclass(frozen=True)
class Column:
    """One dimension of state or action. counts i64[BINS] over low..high; values beyond are counted in the first and last bin.
    clipped: share of frames that the normaliser cuts off; open: share of a binary dimension's values above a half."""

    dim: Dim
    mean: float
    std: float
    q01: float
    q99: float
    min: float
    max: float
    constant: bool
    clipped: float
    counts: np.ndarray
    low: float
    high: float
    open: float
    odd: float  # share of values that are neither 0 nor 1
    closed_first: float  # share of episodes whose first value is at most a half


@dataclasses.dataclass(frozen=True)
class Survey:
    """What there is to say about one dataset; it is training data that is counted where nothing else is said."""

    ix: StepIndex
    weight: float
    share: float  # of the samples drawn
    frame_share: float  # of all training frames
    train_frames: int
    train_episodes: int
    looked_at: int
    columns: dict[str, list[Column]]
    labelled: int  # frames, of all, that have an instruction
    texts: list[tuple[str, int]]  # the most frequent instructions, with their frames
    distinct: int
    odd_texts: int  # instructions with characters that could not be read
    long_texts: list[int]  # words of the instructions that are too long
    tokens: np.ndarray  # i64[n] FAST tokens of a chunk; empty when none could be fitted
    prompts: np.ndarray  # i64[n] text tokens of a prompt
    token_fault: str
    copies: list[tuple[int, int]]  # (episode, an earlier one that it equals)
    leaked: int  # copies of which one is trained on and another one held out

    @property
    def name(self) -> str:
        return self.ix.card.name

    @property
    def lengths(self) -> np.ndarray:
        """i64[episodes], of all."""
        return np.diff(self.ix.episode_start)

    @property
    def epochs(self) -> float:
        """In a million samples."""
        return _MILLION * self.share / self.train_frames

    @property
    def hours(self) -> float:
        return self.ix.frames / self.ix.card.control_hz / 3600


def take(mix: Mixture, indexes: list[StepIndex], config: Config) -> tuple[list[Survey], Source]:
    """Surveys of all datasets, and the source that a run with this config draws from, except that no limit of a row and no
    choice of views is applied. Raises: UserError when a dataset has no training frames."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, views=()))
    statistics = [stats.compute(ix, config.data.holdout) for ix in indexes]
    words, fault = text.load(config.tokens.text_model), ""
    make = lambda action: Source.make(
        config, indexes, statistics, Layout.of(config.tokens, words, action, 0), weights=mix.weights, times_size=mix.weight == "times_size"
    )
    opened = make(None)
    try:
        given = config.tokens.action_path
        opened = make(files.load(given) if given else source.fit_tokenizer(opened, config))
    except UserError as e:
        fault = str(e)
    frames = sum(map(len, opened.frames))
    return [_one(opened, d, weight, frames, fault) for d, weight in enumerate(mix.weights)], opened


def _one(opened: Source, d: int, weight: float, frames: int, fault: str) -> Survey:
    ix, mine, held = opened.indexes[d], opened.frames[d], opened.indexes[d].held_out(opened.config.data.holdout)
    looked = mine.spread(_LOOKED_AT)
    specs = {"state": ix.card.state, "action": ix.card.action}
    columns = {}
    for key, spec in specs.items():
        rows, first = np.asarray(getattr(ix, key)[looked]), np.asarray(getattr(ix, key)[ix.episode_start[:-1]])
        normal = opened.normalizers[d][key]
        columns[key] = [_column(dim, i, opened.statistics[d][key], normal, rows[:, i], first[:, i]) for i, dim in enumerate(spec.dims)]
    copies = _copies(ix)
    tokens, prompts = _lengths(opened, d)
    labelled, texts = _language(ix)
    words = [len(t.split()) for t, _ in texts]
    return Survey(
        ix=ix,
        weight=weight,
        share=opened.sampler.quotas[d] / BLOCK,
        frame_share=len(mine) / frames,
        train_frames=len(mine),
        train_episodes=len(mine.first),
        looked_at=len(looked),
        columns=columns,
        labelled=labelled,
        texts=sorted(texts, key=lambda x: (-x[1], x[0]))[:6],
        distinct=len(texts),
        odd_texts=sum("\ufffd" in text for text in texts),
        long_texts=sorted((w for w in words if w > 100), reverse=True),
        tokens=tokens,
        prompts=prompts,
        token_fault=fault,
        copies=copies,
        leaked=sum(bool(held[a] != held[b]) for a, b in copies),
    )


def _column(dim: Dim, i: int, s: Stats, normal: stats.Normalizer, x: np.ndarray, first: np.ndarray) -> Column:
    low, high, q01, q99 = (float(v[i]) for v in (s.min, s.max, s.q01, s.q99))
    constant, margin = bool(normal.constant[i]), 0.5 * (q99 - q01)
    if not constant and dim.kind != "binary":  # a few far outliers would leave one bar
        low, high = max(low, q01 - margin), min(high, q99 + margin)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    x = x.astype(np.float64)
    scaled = 2 * (x - normal.low[i]) / (float(normal.high[i]) - normal.low[i]) - 1
    return Column(
        dim=dim,
        **{k: float(getattr(s, k)[i]) for k in ("mean", "std", "q01", "q99", "min", "max")},
        constant=constant,
        clipped=0.0 if constant else float((np.abs(scaled) > normal.limit + 1e-6).mean()),
        counts=np.bincount(np.clip((x - low) / (high - low) * BINS, 0, BINS - 1).astype(np.int64), minlength=BINS),
        low=low,
        high=high,
        open=float((x > 0.5).mean()),
        odd=float(((x != 0) & (x != 1)).mean()),
        closed_first=float((first <= 0.5).mean()),
    )


def _copies(ix: StepIndex) -> list[tuple[int, int]]:
    key = ix.episode_crc.astype(np.uint64) << np.uint64(32) | np.diff(ix.episode_start).astype(np.uint64)
    order = np.argsort(key, kind="stable")
    same = np.flatnonzero(key[order][1:] == key[order][:-1])
    return sorted((int(order[i + 1]), int(order[i])) for i in same)


def _language(ix: StepIndex) -> tuple[int, list[tuple[str, int]]]:
    """(frames with an instruction, (text, frames it belongs to) of every instruction)."""
    sets = len(ix.set_start) - 1
    per_set = np.zeros(sets, np.int64)
    for at in range(0, ix.frames, 1 << 22):
        per_set += np.bincount(ix.language[at : at + (1 << 22)], minlength=sets)
    sizes = np.diff(ix.set_start)
    count = np.bincount(ix.set_text, weights=np.repeat(per_set, sizes), minlength=len(ix.text_start) - 1).astype(np.int64)
    at, raw = np.asarray(ix.text_start), bytes(ix.text)
    texts = [raw[a:b].decode("utf-8", "replace") for a, b in zip(at[:-1].tolist(), at[1:].tolist())]
    said = np.array([bool(t.strip()) for t in texts], np.int64)
    has = np.concatenate([[0], np.cumsum(said[ix.set_text])]) if len(texts) else np.zeros(len(ix.set_text) + 1, np.int64)
    labelled = has[ix.set_start[1:]] > has[ix.set_start[:-1]]
    return int(per_set[labelled].sum()), [(t, int(n)) for t, n, s in zip(texts, count, said) if s]


def _lengths(opened: Source, d: int) -> tuple[np.ndarray, np.ndarray]:
    frames, layout = opened.frames[d].spread(_TOKENIZED), opened.layout
    states = opened.normalizers[d]["state"].normalize(sample.states(opened.indexes[d], frames, opened.config.data.history))
    said = [
        opened.prompt(d, (opened.indexes[d].instructions(f) or ("",))[0], state.reshape(-1)).text
        for f, state in zip(frames.tolist(), states)
    ]
    known = {p: len(layout.text.encode(p)) for p in set(said)}
    tokens = [len(t) for t in layout.action.encode_batch(opened.chunks(d, frames)[0])] if layout.action else []
    return np.array(tokens, np.int64), np.array([known[p] for p in said], np.int64)


def warnings(s: Survey) -> list[str]:
    """Sentences, the gravest first; the dataset's name is left to the reader of them."""
    ix, out = s.ix, []
    skipped, gone = sum(ix.skipped.values()), int(np.isin(ix.episode_shard, sorted(ix.missing)).sum())
    expected = ix.episodes + skipped + sum(ix.filtered.values()) - gone  # those are indexed, and skipped as well
    if skipped > 0.01 * expected:
        out.append(f"{skipped} of {expected} episodes ({skipped / expected:.1%}) cannot be used: {causes(ix.skipped)}.")
    if s.copies:
        a, b = s.copies[0]
        leak = f" In {s.leaked} cases one is trained on and the other is held out." if s.leaked else ""
        out.append(f"{len(s.copies)} of {ix.episodes} episodes are copies of others (episode {a} equals {b}).{leak}")
    for key, columns in s.columns.items():
        for c in columns:
            out += [f"{key} dimension {c.dim.name} {said}" for said in _column_warnings(c)]
    for key, sense in ix.card.gripper.items():
        if sense == "unknown":
            out.append(f"the card does not know in which sense the {key}'s gripper was recorded, so that 1 may not mean open.")
    lengths, typical = s.lengths, float(np.median(s.lengths))
    long = np.flatnonzero(lengths > 5 * typical)
    if long.size:
        worst = int(lengths.argmax())
        more = f"{long.size} episodes are" if long.size > 1 else "one episode is"
        out.append(
            f"{more} more than 5 times as long as the median of {typical:g} steps; the longest, {worst}, has {lengths[worst]} steps."
        )
    if s.labelled < ix.frames:
        bare = ix.frames - s.labelled
        out.append(f"{bare} of {ix.frames} frames ({bare / ix.frames:.1%}) have no instruction.")
    if ix.surplus:
        out.append(f"{ix.surplus} episodes more than dataset_info.json announces were found, and are used.")
    if s.odd_texts:
        out.append(f"{s.odd_texts} of {s.distinct} instructions hold characters that are no UTF-8, shown as \ufffd.")
    if s.long_texts:
        out.append(f"{len(s.long_texts)} of {s.distinct} instructions have more than 100 words (the longest {s.long_texts[0]}).")
    if s.share > 3 * s.frame_share or s.share < s.frame_share / 3:
        out.append(
            f"its share of the samples is {s.share:.2%} and its share of the frames {s.frame_share:.2%}, a factor of {s.share / s.frame_share:.2g}."
        )
    if s.epochs > 20:
        out.append(f"a million samples are {s.epochs:.1f} epochs of its {s.train_frames} training frames.")
    return out


def _column_warnings(c: Column):
    if c.constant:
        yield f"is constant (q99 - q01 = {max(c.q99 - c.q01, 0):.2g}): it teaches nothing and always comes back as {c.mean:.4g}."
    if c.clipped > CLIPPED:
        yield f"has {c.clipped:.2%} of its values so far outside q01..q99 ({c.q01:.4g} to {c.q99:.4g}) that they are clipped."
    limit, per = _LIMITS.get((c.dim.kind, c.dim.unit), (None, ""))
    size = max(-c.q01, c.q99)
    if limit is not None and size > limit:
        yield (
            f"reaches {size:.3g} {c.dim.unit} {per}".rstrip()
            + f", which is implausible for kind {c.dim.kind} (limit {limit:g} {c.dim.unit})."
        )
    if c.dim.kind == "binary":
        if c.odd > 0 or c.min < 0 or c.max > 1:
            yield f"is binary but {c.odd:.2%} of its values are neither 0 nor 1 (from {c.min:.3g} to {c.max:.3g})."
        if not 0.05 <= c.open <= 0.95:
            yield f"is open in {c.open:.1%} of the frames: is its sense the right way round?"
        if c.closed_first > 0.8:
            yield f"starts closed in {c.closed_first:.0%} of the episodes: is its sense the right way round?"


def causes(found: dict[str, int]) -> str:
    return ", ".join(f"{n} x {cause}" for cause, n in sorted(found.items(), key=lambda x: -x[1]))
