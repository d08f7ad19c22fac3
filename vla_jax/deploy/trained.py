"""What a checkpoint holds for those who only use it: weights and all that says what its numbers mean. Every export begins here."""

from __future__ import annotations

import base64
import dataclasses
import functools
from pathlib import Path

import numpy as np

from vla_jax import config as configs
from vla_jax import tree
from vla_jax.config import Config
from vla_jax.data import cards, sample, stats
from vla_jax.data.cards import DatasetCard
from vla_jax.data.stats import Normalizer
from vla_jax.models import presets
from vla_jax.models.presets import VLAConfig
from vla_jax.tokens import files
from vla_jax.tokens.sequence import Layout
from vla_jax.tokens.text import TextTokenizer
from vla_jax.types import Dim, Stats, UserError

DTYPES = ("f32", "bf16")


@dataclasses.dataclass(frozen=True)
class Robot:
    """One dataset's card and statistics, with the shape of its observations and chunks under a run's settings."""

    card: DatasetCard
    stats: dict[str, Stats]  # state, action
    views: tuple[str, ...]
    steps: int
    image_size: int
    history: int

    @classmethod
    def of(cls, config: Config, raw: dict, numbers: dict, *, where: str) -> Robot:
        """raw, numbers: a card and statistics as JSON. Raises: UserError for a card that is none; what odd statistics raise (files.ODD)."""
        card, data = cards.from_dict(raw, where=where), config.data
        steps = sample.chunk_steps(card.control_hz, data.chunk_s, data.max_chunk)
        views = tuple(v for v in data.views if v in card.views)
        return cls(card, stats.from_json(numbers), views, steps, data.image_size, data.history)

    def spec(self) -> dict:
        """What to send and what comes back, for people and for checks."""
        shape = [self.image_size, self.image_size, 3]
        return {
            "robot": self.card.robot,
            "control_hz": self.card.control_hz,
            "images": {v: f"uint8 RGB [h, w, 3], resized to {shape}" for v in self.views},
            "history": {
                "steps": self.history,
                "sent": "of the step n before now: images 'base@-n' where there is one; states oldest first",
            },
            "state": [dataclasses.asdict(d) for d in self.card.state.dims],
            "action": {"steps": self.steps, "dims": [dataclasses.asdict(d) for d in self.card.action.dims]},
        }

    def quantiles(self, group: str) -> dict[str, np.ndarray]:
        """Statistics f32[dims] whose q01 and q99 give, by the field's formula 2 (x - q01) / (q99 - q01) - 1, what training saw: binary
        dimensions 0 and 1, and half a unit on each side of the mean where nothing varied, so that it normalises to 0."""
        s, dims = self.stats[group], _dims(self.card, group)
        n = Normalizer.make(s, dims)
        low, high = (np.where(n.constant, s.mean + side, x).astype(np.float32) for side, x in ((-0.5, n.low), (0.5, n.high)))
        return {"mean": s.mean, "std": s.std, "min": s.min, "max": s.max, "q01": low, "q99": high}


def _dims(card: DatasetCard, group: str) -> tuple[Dim, ...]:
    return (card.state if group == "state" else card.action).dims


@dataclasses.dataclass(frozen=True)
class Trained:
    """params: f32 by path, adapters merged; weights: `ema` or `params`, which of the two kept ones they are."""

    run: Path
    step: int
    weights: str
    params: dict[str, np.ndarray]
    config: Config
    cfg: VLAConfig
    layout: Layout  # of the robots that it was trained on
    robots: tuple[Robot, ...]
    meta: object  # train.checkpoint.Meta, raw

    def named(self, robot: str) -> Robot:
        """Raises: UserError for a robot that is not there, or none where there are several."""
        found = [r for r in self.robots if r.card.name == robot or not robot]
        if len(found) != 1:
            raise UserError(
                f"{f'robot {robot!r} is not in this run' if robot else 'this format is of one robot: say which with --robot'}; "
                f"there are: {', '.join(r.card.name for r in self.robots)}"
            )
        return found[0]

    def cast(self, dtype: str) -> dict[str, np.ndarray]:
        """The parameters in f32, or those that a forward pass in bfloat16 rounds anyway in bfloat16."""
        if dtype == "f32":
            return self.params
        import jax

        from vla_jax.models import vla

        half = functools.partial(vla.cast, dataclasses.replace(self.cfg, dtype="bfloat16"))
        shapes = tree.unflatten({p: jax.ShapeDtypeStruct(w.shape, w.dtype) for p, w in self.params.items()})
        kinds = tree.flatten(jax.eval_shape(half, shapes))
        return {path: w.astype(kinds[path].dtype) for path, w in self.params.items()}


def model_config(config: Config, *, vocab: int, state_dim: int) -> VLAConfig:
    """The model that a run's settings describe, to act with; vocab: rows of its embedding. Raises: UserError."""
    return presets.resolve(
        config.model.preset,
        vocab=vocab,
        image_size=config.data.image_size,
        state_dim=state_dim,
        dtype=config.model.dtype,
        remat="none",
        expert=config.model.expert,
        expert_dims=config.model.expert_dims,
    )


def read(workdir: str | Path, *, step: int | None = None, ema: bool | None = None) -> Trained:
    """A step of a run (None: the newest) and its weights (ema: None takes the running mean where one was kept).

    Raises: UserError when there is none, it is damaged, or it has no such weights.
    """
    from vla_jax.models import lora
    from vla_jax.train import workdir as workdirs
    from vla_jax.train.checkpoint import Checkpointer, Damaged  # here, so that a robot's program loads no Orbax

    workdir = workdirs.place(workdir)
    workdirs.is_run(workdir)
    checkpoints = Checkpointer(workdir)
    try:
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise UserError(f"{workdir}/checkpoints holds no finished checkpoint yet.")
        meta, weights = checkpoints.meta(step), checkpoints.weights(step, ema)
        params = lora.merge(checkpoints.params(step, ema=ema), meta.config["train"].get("lora_alpha", 0.0))
    except Damaged as e:
        raise UserError(f"{e}. Export another step: RUN@STEP, with one of {checkpoints.steps()}.") from e
    finally:
        checkpoints.close()
    config = configs.from_dict(meta.config, where=f"{workdir}/checkpoints/{step}")
    cfg = model_config(config, vocab=max(meta.vocab, config.model.vocab), state_dim=meta.state_dim)
    text, action = TextTokenizer(base64.b64decode(meta.text_model)), files.from_json(meta.action_tokenizer)
    layout = Layout.of(config.tokens, text, action, cfg.tokens_per_image, behind=meta.behind)
    robots = tuple(Robot.of(config, raw, numbers, where=str(workdir)) for raw, numbers in zip(meta.cards, meta.stats))
    flat = {path: np.asarray(w) for path, w in tree.flatten(params).items()}
    return Trained(workdir, step, weights, flat, config, cfg, layout, robots, meta)
