"""The action tokenizer beside HF's `tokenizers`, on the same coefficients and with the same ids."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import numpy as np

from vla_jax.tokens import actions, bpe
from vla_jax.types import UserError

SHAPES = (5, 7), (15, 7), (50, 14), (30, 26)
VOCAB, SCALE, CHUNKS = 1024, 10.0, 2000


def run(*, repeats: int, chunks: int = CHUNKS) -> Iterator[dict]:
    """One line per shape, engine (numba where it is installed, numpy) and direction, in chunks per CPU-second, medians over
    `repeats` rounds in which ours and theirs take turns.

    ours: from numbers to ids, or back, all chunks in one call (`batch` of them, as training does it) or one a call (batch 1, as a robot
    decodes); theirs always one a call. hf: only byte-pair encoding, of text that is ready (decode: from ids to text). processor:
    what a FAST processor does around it, with scipy's transform. ceiling: the transform and its rounding alone. Raises: UserError when
    `tokenizers` or scipy is missing, or ids or decoded chunks differ.
    """
    try:
        import scipy.fft  # noqa: F401
        import tokenizers  # noqa: F401
    except ImportError as e:
        raise UserError(f"{e.name} is not installed, which this measures beside ours: pip install 'vla-jax[oracles]'") from e
    for steps, dims in SHAPES:
        rng = np.random.default_rng([steps, dims])
        fitted = actions.fit(list(_chunks(rng, 2000, steps, dims)), vocab_size=VOCAB, scale=SCALE)
        yield from _shape(fitted, _chunks(rng, chunks, steps, dims), repeats)


def _chunks(rng: np.random.Generator, n: int, steps: int, dims: int) -> np.ndarray:
    """Smooth motions f32[n steps dims]: power falls with frequency, and some joints move much, others hardly."""
    reach = 10 ** rng.uniform(-2, 0, (1, 1, dims)) * 10 ** rng.uniform(-1, 0, (n, 1, 1))
    power = rng.normal(size=(n, steps, dims)) * reach / (1 + np.arange(steps)[:, None]) ** 1.5 * np.sqrt(steps)
    return np.clip(actions.dct_matrix(steps).T @ power, -1.5, 1.5).astype(np.float32)


def _shape(fitted: actions.FastTokenizer, x: np.ndarray, repeats: int) -> Iterator[dict]:
    n, steps, dims = x.shape
    theirs = _Processor(fitted)
    texts = [theirs.text(c) for c in x]
    ids = [i.tolist() for i in fitted.encode_batch(x)]
    whole = actions.coefficients(x, SCALE)
    work = {
        "encode": {
            "ceiling": lambda: actions.coefficients(x, SCALE),
            "hf": lambda: [theirs.bpe.encode(t).ids for t in texts],
            "processor": lambda: [theirs.encode(c) for c in x],
        },
        "decode": {
            "ceiling": lambda: actions.restore(whole, SCALE, steps, dims),
            "hf": lambda: [theirs.bpe.decode(i) for i in ids],
            "processor": lambda: np.stack([theirs.decode(i, steps, dims) for i in ids]),
        },
    }
    ours = {
        ("encode", n): lambda: fitted.encode_batch(x),
        ("encode", 1): lambda: [fitted.encode(c) for c in x],
        ("decode", n): lambda: fitted.decode_batch(ids, steps=steps, dims=dims)[0],
        ("decode", 1): lambda: np.stack([fitted.decode(i, steps=steps, dims=dims)[0] for i in ids]),
    }
    known = bpe._compiled
    compiled = known()
    for engine in ["numba", "numpy"] if compiled else ["numpy"]:
        bpe._compiled = (lambda: compiled) if engine == "numba" else (lambda: None)
        try:
            want_ids, want = work["encode"]["hf"](), work["decode"]["processor"]()
            for (direction, batch), mine in ours.items():
                if direction == "decode" and engine == "numpy" and compiled:
                    continue  # it is the same code
                peers, made = work[direction], mine()
                if direction == "encode" and [i.tolist() for i in made] != want_ids:
                    raise UserError(f"ids differ from those of HF's tokenizers at {steps} x {dims} ({engine}, batch {batch})")
                if direction == "decode" and not np.allclose(made, want, atol=1e-5):
                    raise UserError(f"decoded chunks differ from the processor's at {steps} x {dims} (batch {batch})")
                took: dict[str, list[float]] = {}
                for _ in range(repeats):
                    for name, f in {"ours": mine, **peers}.items():
                        before = time.process_time()
                        f()
                        took.setdefault(name, []).append(time.process_time() - before)
                rate = {name: n / max(median(t), 1e-9) for name, t in took.items()}
                yield {
                    "what": direction,
                    "chunk": [steps, dims],
                    "engine": engine,
                    "batch": batch,
                    "tokens": round(float(np.mean([len(i) for i in ids])), 1),
                    **{f"{name}_per_s": round(r) for name, r in rate.items()},
                    "of_ceiling": round(rate["ours"] / rate["ceiling"], 3),
                    "times_hf": round(rate["ours"] / rate["hf"], 2),
                    "times_processor": round(rate["ours"] / rate["processor"], 2),
                    "identical": True,
                }
        finally:
            bpe._compiled = known


class _Processor:
    """The same merges in HF's table, one character a coefficient."""

    def __init__(self, fitted: actions.FastTokenizer):
        import tokenizers

        self.low, self.high = fitted.min_coef, fitted.max_coef
        spelt, start = fitted._bpe.expanded
        pieces = ["".join(chr(0x4E00 + c) for c in spelt[a:b]) for a, b in zip(start, start[1:])]
        merges = [(pieces[a], pieces[b]) for a, b in fitted.merges]
        self.bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
        self.bpe.decoder = tokenizers.decoders.Fuse()

    def text(self, chunk) -> str:
        import scipy.fft

        whole = np.around(scipy.fft.dct(chunk, axis=0, norm="ortho") * SCALE)
        return "".join(map(chr, (np.clip(whole, self.low, self.high) - self.low + 0x4E00).astype(int).flatten()))

    def encode(self, chunk) -> list[int]:
        return self.bpe.encode(self.text(chunk)).ids

    def decode(self, ids, steps: int, dims: int) -> np.ndarray:
        import scipy.fft

        whole = np.array(list(map(ord, self.bpe.decode(ids)))) - 0x4E00 + self.low
        return scipy.fft.idct(whole.reshape(steps, dims) / SCALE, axis=0, norm="ortho")


def table(lines: list[dict]) -> str:
    head = ["what", "chunk", "engine", "batch", "tokens", "ours/s", "HF/s", "processor/s", "ceiling/s", "x HF", "x processor"]
    keys = ("ours_per_s", "hf_per_s", "processor_per_s", "ceiling_per_s", "times_hf", "times_processor")
    rows = [head]
    for r in lines:
        rows.append(
            [r["what"], "x".join(map(str, r["chunk"])), r["engine"], str(r["batch"]), str(r["tokens"]), *(f"{r[k]:,}" for k in keys)]
        )
    width = [max(len(r[i]) for r in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(r, width)) for r in rows)
