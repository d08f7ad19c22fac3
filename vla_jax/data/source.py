"""A run's data, opened: indexes, statistics, tokenizers and sampler of every dataset in the mixture."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

import numpy as np

from vla_jax import distributed
from vla_jax.config import Config
from vla_jax.data import build, mixture, pack, sample, stats
from vla_jax.data.augment import Augmenter
from vla_jax.data.index import StepIndex
from vla_jax.data.mixture import Sampler
from vla_jax.data.prior import Prior
from vla_jax.tokens import actions, bins, files, text
from vla_jax.tokens.sequence import Embodiment, Layout, Prompt
from vla_jax.types import ActionTokenizer, Stats, UserError

_FIT_CHUNKS = 8192  # drawn from the mixture to fit the action tokenizer


def open_indexes(config: Config, *, progress=None) -> tuple[mixture.Mixture, tuple[StepIndex, ...]]:
    """The mixture and its indexes; those that are missing are built first (build.ensure).

    Raises: UserError, on every host, for any fault of cards, folders or files.
    """
    mix, d = mixture.load(config.data.mixture), config.data
    show = lambda name: progress and (lambda shards, total: progress(shards, total, name))
    settings = {"holdout": d.holdout, "max_skipped": d.max_skipped}
    return mix, tuple(
        build.ensure(card, d.root or os.environ.get("VLA_DATA_ROOT", ""), d.index_dir, progress=show(card.name), **settings)
        for card in mix.cards
    )


def open_source(
    config: Config,
    *,
    tokens_per_image: int,
    tokenizer_path: Path | None = None,
    refit: bool = False,
    rows: bool = True,
    prior: Prior | None = None,
    progress=None,
) -> Source:
    """Everything for training on `config.data.mixture`. The fitted action tokenizer is kept at `tokenizer_path`,
    and taken from there unless `refit`. rows: hold samples against the size of a row, which who only looks at tokens need not.
    prior: the policy that the run begins with; its tokenizers, and its statistics of robots that it knows, are taken unless
    tokens.action_path, tokens.refit or data.refit_stats say otherwise.

    Raises: UserError.
    """
    mix, indexes = open_indexes(config, progress=progress)
    known = {ix.card.name: prior.statistics(ix.card) for ix in indexes} if prior and not config.data.refit_stats else {}
    statistics = [known.get(ix.card.name) or stats.compute(ix, config.data.holdout) for ix in indexes]
    words = prior.text if prior and not config.tokens.text_model else text.load(config.tokens.text_model)
    if prior and words.model != prior.text.model:
        raise UserError(
            f"tokens.text_model {config.tokens.text_model} is not the text model of model.init ({prior.text.vocab_size} pieces, "
            f"this one {words.vocab_size}). Leave tokens.text_model empty: it comes with the policy."
        )
    path = Path(config.tokens.action_path) if config.tokens.action_path else tokenizer_path
    there = path is not None and path.exists()
    fitted = files.load(path) if there and (config.tokens.action_path or not refit) else None
    if fitted is None and config.tokens.action_path:
        raise UserError(f"tokens.action_path {path} does not exist. Fit one with `vla-jax tokens fit`, or leave it empty.")
    whose = path
    if fitted is None and prior and not config.tokens.refit:
        whose, fitted = "model.init", prior.action
        if path and distributed.is_main():
            files.save(fitted, path)  # from which the run goes on
    if fitted is not None and (kind := files.kind(fitted)) != config.tokens.action:
        raise UserError(
            f"{whose} holds a tokenizer of kind {kind}, but tokens.action is {config.tokens.action}: set --config.tokens.action={kind}"
            + (", or --config.tokens.refit=true to fit one" if whose == "model.init" else "")
        )
    build = lambda action: Source.make(
        config,
        indexes,
        statistics,
        Layout.of(
            config.tokens, words, action, tokens_per_image, behind=prior.ids_behind(config, action) if prior and action is not None else 0
        ),
        weights=mix.weights,
        times_size=mix.weight == "times_size",
        prior=prior,
    )
    if fitted is None:
        fitted = fit_tokenizer(build(None), config)
        if path and distributed.is_main():
            files.save(fitted, path)
    source = build(fitted)
    for d, who in enumerate(source.robots):
        source.layout.check_limit(who, source.indexes[d].state.shape[1] * config.data.history)
    if rows:
        source.check_fit()
    return source


def fit_chunks(source: Source, most: int = _FIT_CHUNKS) -> list[np.ndarray]:
    """Normalised training chunks f32[k a], drawn as training will draw them; the same on every host."""
    dataset, _, place = source.sampler.draw(np.arange(min(most, sum(map(len, source.frames)))))
    chunks = []
    for d in range(len(source.indexes)):
        chunks += list(source.chunks(d, source.frames[d][place[dataset == d]])[0])
    return chunks


def fit_tokenizer(source: Source, config: Config) -> ActionTokenizer:
    """The kind that tokens.action names, fitted on the mixture. Raises: UserError."""
    t = config.tokens
    if t.action == "fast":
        return actions.fit(fit_chunks(source), vocab_size=t.action_vocab, scale=t.action_scale)
    if t.action == "bins":
        return bins.uniform(t.action_vocab)
    return bins.quantile(fit_chunks(source), t.action_vocab)


@dataclasses.dataclass(frozen=True)
class Frames:
    """The frames of some of an index's episodes, numbered from 0 without gaps. Costs two numbers an episode, none a frame."""

    first: np.ndarray  # i64[episodes] in the index
    start: np.ndarray  # i64[episodes + 1] in this numbering

    @classmethod
    def of(cls, ix: StepIndex, keep: np.ndarray) -> Frames:
        """keep: bool[episodes of the index]."""
        lengths = np.diff(ix.episode_start)[keep]
        return cls(ix.episode_start[:-1][keep], np.concatenate([[0], np.cumsum(lengths)]))

    def __len__(self) -> int:
        return int(self.start[-1])

    def __getitem__(self, number) -> np.ndarray:
        """Number(s) here -> frame(s) of the index."""
        number = np.asarray(number)
        episode = np.searchsorted(self.start, number, side="right") - 1
        return self.first[episode] + number - self.start[episode]

    def spread(self, most: int) -> np.ndarray:
        """At most `most` frames, evenly spaced."""
        return self[np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(np.int64))]


@dataclasses.dataclass(frozen=True)
class Source:
    """All that turns sample numbers into samples; the same on every host. `frames` are those that may be drawn."""

    indexes: tuple[StepIndex, ...]
    frames: tuple[Frames, ...]
    statistics: tuple[dict[str, Stats], ...]
    normalizers: tuple[dict[str, stats.Normalizer], ...]
    sampler: Sampler
    layout: Layout
    config: Config
    augmenter: Augmenter | None  # None: pictures as they are
    prior: Prior | None = None  # what the run begins with, where that is a policy

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
        prior: Prior | None = None,
    ) -> Source:
        """Raises: UserError when a dataset has no frames left."""
        frames = []
        for ix in indexes:
            mask = ix.held_out(config.data.holdout)
            frames.append(Frames.of(ix, mask if held_out else ~mask))
            if not len(frames[-1]):
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
        seed = config.train.seed if seed is None else seed
        sampler = Sampler.make(seed, [len(f) for f in frames], weights, times_size=times_size)
        augmenter = Augmenter(config.augment, seed)
        augmenter = augmenter if augmenter.active and not held_out else None
        return cls(tuple(indexes), tuple(frames), tuple(statistics), normalizers, sampler, layout, config, augmenter, prior)

    def held_out(self, seed: int = 0) -> Source:
        """The same data, drawing evenly from the episodes kept for evaluation."""
        return Source.make(
            self.config,
            self.indexes,
            list(self.statistics),
            self.layout,
            weights=[1.0] * len(self.indexes),
            held_out=True,
            seed=seed,
            prior=self.prior,
        )

    def check_fit(self) -> None:
        """Raises: UserError when a dataset's typical sample is larger than a row, or has none of the wanted views."""
        p = self.config.pack
        for d, ix in enumerate(self.indexes):
            items = self.items(d, self.frames[d].spread(16), np.zeros(min(16, len(self.frames[d])), np.int64))
            if self.config.data.views and not any(i.pictures for i in items):
                raise UserError(
                    f"{ix.card.name} has none of the views {', '.join(self.config.data.views)}; it has {', '.join(ix.views)}. "
                    "Add one to data.views, or set it to () to train without images."
                )
            need = (max(i.sequence.length for i in items), max(len(i.pictures) for i in items), max(i.sequence.targets for i in items))
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
        """The mixture's largest (chunk steps, action dims, state dims); states are never narrower than those of the policy it begins with."""
        return (
            max(self.steps(d) for d in range(len(self.indexes))),
            max(ix.action.shape[1] for ix in self.indexes),
            max(max(ix.state.shape[1] for ix in self.indexes) * self.config.data.history, self.prior.state_dim if self.prior else 0),
        )

    @property
    def known_rows(self) -> int:
        """Rows of the embedding that model.init has, if there is one: those of the text and of a policy's earlier tokenizers, and all of them where
        the tokenizer is the policy's."""
        own = self.prior and self.layout.action == self.prior.action
        return self.prior.vocab if own else self.layout.text.vocab_size + self.layout.behind

    def steps(self, dataset: int) -> int:
        c = self.config.data
        return sample.chunk_steps(self.indexes[dataset].card.control_hz, c.chunk_s, c.max_chunk)

    @functools.cached_property
    def robots(self) -> tuple[Embodiment, ...]:
        return tuple(Embodiment(ix.card.name, ix.card.control_hz, self.steps(d), ix.card.action.dims) for d, ix in enumerate(self.indexes))

    def prompt(self, dataset: int, instruction: str, state: np.ndarray) -> Prompt:
        """state: f32[history * s] normalised."""
        return self.layout.prompt(self.robots[dataset], instruction, state)

    def fingerprint(self) -> str:
        return self.sampler.fingerprint([ix.digest for ix in self.indexes])

    def normalize_state(self, dataset: int, state: np.ndarray) -> np.ndarray:
        """f32[history * s] in robot units, as types.Sample has it -> the same normalised."""
        steps = state.reshape(self.config.data.history, -1)
        return self.normalizers[dataset]["state"].normalize(steps).reshape(-1)

    def chunks(self, dataset: int, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(normalised actions f32[n k a], mask bool[n k]) from each of n frames of the index on."""
        chunk, mask = sample.actions(self.indexes[dataset], frames, self.steps(dataset))
        return self.normalizers[dataset]["action"].normalize(chunk), mask

    def draw(self, numbers: np.ndarray) -> list[pack.Item]:
        """The samples of these numbers, in their order: tokens and normalised numbers; no image is read."""
        numbers = np.asarray(numbers, np.int64)
        dataset, _, place = self.sampler.draw(numbers)
        out: list = [None] * len(numbers)
        for d in np.unique(dataset).tolist():
            here = np.flatnonzero(dataset == d)
            for at, item in zip(here.tolist(), self.items(d, self.frames[d][place[here]], numbers[here])):
                out[at] = item
        return out

    def items(self, dataset: int, frames: np.ndarray, numbers: np.ndarray) -> list[pack.Item]:
        """One dataset's frames of the index, each with its sample's number."""
        ix, c, normal = self.indexes[dataset], self.config.data, self.normalizers[dataset]
        chunks, masks = self.chunks(dataset, frames)
        states = normal["state"].normalize(sample.states(ix, frames, c.history)).reshape(len(frames), -1)
        tokens: list = [np.zeros(0, np.int32)] * len(frames)
        if self.config.train.objective == "flow":  # the expert sees the prompt alone
            tokens = [None] * len(frames)
        elif self.layout.action:
            tokens = self.layout.action.encode_batch(chunks)
        pictures = sample.pictures(ix, frames, c.views, c.history)
        changes = self.augmenter.changes(numbers) if self.augmenter else [None] * len(frames)
        out = []
        for i, (frame, number) in enumerate(zip(frames.tolist(), numbers.tolist())):
            prompt = self.prompt(dataset, sample.instruction(ix, frame, self.sampler.seed, number), states[i])
            sequence = self.layout.build(images=len(pictures[i]), prompt=prompt, action_tokens=tokens[i])
            out.append(pack.Item(number, dataset, frame, sequence, pictures[i], states[i], chunks[i], masks[i], changes[i]))
        return out

    def start(self, item: pack.Item, which: int):
        """Asks a far store for one of an item's pictures; see sample.start."""
        return sample.start(self.indexes[item.dataset], item.pictures[which])

    def pixels(self, item: pack.Item, which: int, out: np.ndarray, asked=None) -> None:
        """Reads (or waits for what was `asked`), decodes, resizes and augments one of an item's pictures into `out`.
        Raises: images.UndecodableImage."""
        at, c = item.pictures[which], self.config
        change = self.augmenter.of_view(item.change, at.view) if item.change and c.augment.where == "host" else None
        size, resize = c.data.image_size, c.data.resize
        sample.pixels(self.indexes[item.dataset], at, size=size, resize=resize, change=change, out=out, asked=asked)

    def sample(self, dataset: int, frame: int, sample_id: int = 0):
        """A whole types.Sample in robot units, for people, oracles and evaluation."""
        c = self.config.data
        return sample.make(
            self.indexes[dataset],
            frame,
            steps=self.steps(dataset),
            dataset=dataset,
            sample_id=sample_id,
            size=c.image_size,
            wanted=c.views,
            history=c.history,
            resize=c.resize,
            seed=self.sampler.seed,
        )
