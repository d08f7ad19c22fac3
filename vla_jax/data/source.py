"""A run's data, opened: indexes, statistics, tokenizers and sampler of every dataset in the mixture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from vla_jax import distributed
from vla_jax.config import Config
from vla_jax.data import index, mixture, pack, sample, stats
from vla_jax.data.index import StepIndex
from vla_jax.data.mixture import Sampler
from vla_jax.tokens import actions, text
from vla_jax.tokens.sequence import Layout
from vla_jax.types import Stats, UserError

_FIT_CHUNKS = 8192  # drawn from the mixture to fit the action tokenizer


def open_indexes(config: Config, *, progress=None) -> tuple[mixture.Mixture, tuple[StepIndex, ...]]:
    """The mixture and its indexes; what is missing is built by the first process while the others wait.

    Raises: UserError for any fault of cards, folders or files.
    """
    mix = mixture.load(config.data.mixture)
    opened = []
    if distributed.is_main():
        opened = [index.ensure(card, config.data.root, config.data.index_dir, progress=progress) for card in mix.cards]
    distributed.barrier("index")
    return mix, tuple(opened or (index.ensure(card, config.data.root, config.data.index_dir) for card in mix.cards))


def open_source(config: Config, *, tokens_per_image: int, tokenizer_path: Path | None = None, refit: bool = False, progress=None) -> Source:
    """Everything for training on `config.data.mixture`. The fitted action tokenizer is kept at `tokenizer_path`,
    and taken from there unless `refit`.

    Raises: UserError.
    """
    mix, indexes = open_indexes(config, progress=progress)
    statistics = [stats.compute(ix, config.data.holdout) for ix in indexes]
    words = text.load(config.tokens.text_model)
    path = Path(config.tokens.action_path) if config.tokens.action_path else tokenizer_path
    fitted = actions.load(path) if path and path.is_file() and (config.tokens.action_path or not refit) else None
    if fitted is None and config.tokens.action_path:
        raise UserError(f"tokens.action_path {path} does not exist. Fit one with `vla-jax tokens fit`, or leave it empty.")
    build = lambda action: Source.make(
        config,
        indexes,
        statistics,
        Layout(words, action, tokens_per_image, config.tokens.state == "continuous"),
        weights=mix.weights,
        times_size=mix.weight == "times_size",
    )
    if fitted is None:
        fitted = fit_tokenizer(build(None), config)
        if path and distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")  # renamed when whole: another host may be reading
            partial.write_text(json.dumps(fitted.to_json()))
            partial.replace(path)
    source = build(fitted)
    source.check_fit()
    return source


def fit_tokenizer(source: Source, config: Config) -> actions.FastTokenizer:
    """FAST on normalised training chunks drawn as training will draw them; the same on every host."""
    dataset, _, place = source.sampler.draw(np.arange(min(_FIT_CHUNKS, sum(map(len, source.frames)))))
    chunks = [source.chunk(int(d), int(source.frames[d][i]))[0] for d, i in zip(dataset, place)]
    return actions.fit(chunks, vocab_size=config.tokens.action_vocab, scale=config.tokens.action_scale)


@dataclasses.dataclass(frozen=True)
class Source:
    """All that turns sample numbers into samples; the same on every host. `frames` lists what may be drawn."""

    indexes: tuple[StepIndex, ...]
    frames: tuple[np.ndarray, ...]
    statistics: tuple[dict[str, Stats], ...]
    normalizers: tuple[dict[str, stats.Normalizer], ...]
    sampler: Sampler
    layout: Layout
    config: Config

    @classmethod
    def make(
        cls,
        config: Config,
        indexes,
        statistics: list[dict[str, Stats]],
        layout: Layout,
        *,
        weights,
        times_size: bool = False,
        held_out: bool = False,
        seed: int | None = None,
    ) -> Source:
        """Raises: UserError when a dataset has no frames left."""
        frames = []
        for ix in indexes:
            mask = ix.held_out(config.data.holdout)[ix.frame_episode]
            frames.append(np.flatnonzero(mask if held_out else ~mask))
            if not frames[-1].size:
                raise UserError(
                    f"dataset {ix.card.name} has no {'held-out' if held_out else 'training'} frames ({ix.episodes} episodes, data.holdout={config.data.holdout:g})"
                )
        normalizers = tuple(
            {
                "state": stats.Normalizer.make(s["state"], ix.card.state.dims),
                "action": stats.Normalizer.make(s["action"], ix.card.action.dims),
            }
            for ix, s in zip(indexes, statistics)
        )
        sampler = Sampler.make(config.train.seed if seed is None else seed, [len(f) for f in frames], weights, times_size=times_size)
        return cls(tuple(indexes), tuple(frames), tuple(statistics), normalizers, sampler, layout, config)

    def held_out(self, seed: int = 0) -> Source:
        """The same data, drawing evenly from the episodes kept for evaluation."""
        return Source.make(
            self.config, self.indexes, list(self.statistics), self.layout, weights=[1.0] * len(self.indexes), held_out=True, seed=seed
        )

    def check_fit(self) -> None:
        """Raises: UserError when a dataset's typical sample is larger than a row, or has none of the wanted views."""
        p = self.config.pack
        for d, ix in enumerate(self.indexes):
            items = [self.item(d, int(f), 0) for f in self.frames[d][:: max(1, len(self.frames[d]) // 16)]]
            if self.config.data.views and not items[0].views:
                raise UserError(
                    f"{ix.card.name} has none of the views {', '.join(self.config.data.views)}; it has {', '.join(ix.views)}. "
                    "Add one to data.views, or set it to () to train without images."
                )
            need = (max(i.sequence.length for i in items), len(items[0].views), max(i.sequence.targets for i in items))
            for have, want, name in zip((p.length, p.images, p.targets), need, ("pack.length", "pack.images", "pack.targets")):
                if want > have:
                    raise UserError(
                        f"a sample of {ix.card.name} needs {want} but {name} is {have}. Raise --config.{name}, or lower image size, views or chunk length."
                    )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(ix.card.name for ix in self.indexes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The mixture's largest (chunk steps, action dims, state dims)."""
        return (
            max(self.steps(d) for d in range(len(self.indexes))),
            max(ix.action.shape[1] for ix in self.indexes),
            max(ix.state.shape[1] for ix in self.indexes),
        )

    def steps(self, dataset: int) -> int:
        c = self.config.data
        return sample.chunk_steps(self.indexes[dataset].card.control_hz, c.chunk_s, c.max_chunk)

    def fingerprint(self) -> str:
        return self.sampler.fingerprint([ix.digest for ix in self.indexes])

    def chunk(self, dataset: int, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """(normalised actions f32[k a], mask bool[k]) from a frame on."""
        chunk, mask = sample.actions(self.indexes[dataset], frame, self.steps(dataset))
        return self.normalizers[dataset]["action"].normalize(chunk), mask

    def item(self, dataset: int, frame: int, sample_id: int) -> pack.Item:
        """A sample's tokens and normalised numbers; no image is read."""
        index, normal = self.indexes[dataset], self.normalizers[dataset]
        chunk, mask = self.chunk(dataset, frame)
        views = sample.views(index, self.config.data.views)
        text = index.languages[index.language[frame]] if index.languages else ""
        prompt = self.layout.prompt(index.card.name, text)
        sequence = self.layout.build(images=len(views), prompt=prompt, chunk=chunk)
        return pack.Item(sample_id, dataset, frame, sequence, views, normal["state"].normalize(np.asarray(index.state[frame])), chunk, mask)


def token_report(source: Source, *, chunks: int = 512) -> list[dict]:
    """Per dataset, over evenly spaced training chunks: tokens, how often coefficients were clamped, error in robot units."""
    out, action = [], source.layout.action
    for d, ix in enumerate(source.indexes):
        lengths, errors, clamped = [], [], []
        for f in source.frames[d][:: max(1, len(source.frames[d]) // chunks)]:
            chunk, mask = source.chunk(d, int(f))
            ids = action.encode(chunk)
            back, _ = action.decode(ids, steps=len(chunk), dims=chunk.shape[1])
            undo = source.normalizers[d]["action"].denormalize
            lengths.append(len(ids))
            errors.append(np.abs(undo(back) - undo(chunk))[mask])
            clamped.append(action.clamped(chunk))
        worst = np.concatenate(errors).mean(axis=0)
        out.append(
            {
                "dataset": ix.card.name,
                "numbers": chunk.size,
                "tokens": f"{np.mean(lengths):.1f}",
                "p95": int(np.quantile(lengths, 0.95)),
                "max": max(lengths),
                "ratio": f"{chunk.size / np.mean(lengths):.2f}",
                "clamped": f"{np.mean(clamped):.4f}",
                "error": " ".join(f"{dim.name}={e:.2g}{dim.unit if dim.unit != '1' else ''}" for dim, e in zip(ix.card.action.dims, worst)),
            }
        )
    return out
