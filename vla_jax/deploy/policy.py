"""An exported policy: robot units in, robot units out. It undoes, in reverse, what the data side did."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import jax
import numpy as np

from vla_jax import config as configs
from vla_jax import tree
from vla_jax.data import images, sample
from vla_jax.data.cards import DatasetCard
from vla_jax.data.stats import Normalizer
from vla_jax.deploy import export
from vla_jax.deploy.trained import Robot, model_config
from vla_jax.models import presets, vla
from vla_jax.models.act import MULTIPLE, Actor, Request, padded
from vla_jax.models.decode import GREEDY, Sampling
from vla_jax.tokens import files, text
from vla_jax.tokens.actions import MALFORMED
from vla_jax.tokens.sequence import Embodiment, Layout, Prompt
from vla_jax.types import Stats, UserError


@dataclasses.dataclass(frozen=True)
class Policy:
    """Acts for one robot. `card` says what its numbers mean; `malformed` chunks are reported by `act`."""

    card: DatasetCard
    views: tuple[str, ...]
    steps: int
    image_size: int
    resize: str
    history: int
    state: Normalizer
    action: Normalizer
    layout: Layout
    actor: Actor
    stats: dict[str, Stats] | None = None  # of state and action in training, where what acts is to be limited to it

    @classmethod
    def load(cls, folder: str | Path, *, robot: str = "", head: str = "", mesh=None, sampling: Sampling = GREEDY) -> Policy:
        """`robot`: the name of a card in the export; may be left out when there is only one. head, mesh, sampling: see load_all.

        Raises: UserError for a damaged export or an unknown robot.
        """
        found = load_all(folder, head=head, mesh=mesh, sampling=sampling)
        if not robot and len(found) == 1:
            return next(iter(found.values()))
        if robot not in found:
            raise UserError(f"robot {robot!r} is not in {folder}; it has: {', '.join(found)}")
        return found[robot]

    def spec(self) -> dict:
        """What to send and what comes back, for people and for checks."""
        return Robot(self.card, {}, self.views, self.steps, self.image_size, self.history).spec()

    def tokens(self, observation: dict) -> tuple[int, int]:
        """(how many precede the actions, how many of them are the instruction's); those that tokens.limit cuts count, too."""
        prompt, images = self._prompt(observation, self._state(observation)), len(observation["images"])
        before = len(self.layout.prefix(images=images, prompt=prompt)) + self.layout.cut(images=images, prompt=prompt)
        return before, len(self.layout.text.encode(prompt.task))

    def lengths(self, *, lag: int, instruction: int) -> range:
        """The padded lengths of prefixes with pictures of `lag` steps before now, and instructions of up to so many tokens: a model is
        compiled once for each and for each batch size."""
        images, layout, dims = (lag + 1) * len(self.views), self.layout, self.history * len(self.card.state.dims)
        # a state in the prompt has more or fewer tokens; one that needs less than this is padded, one that needs more takes from the room
        empty = [layout.prompt(self._who(), "", np.full(dims, x, np.float32)) for x in (-1, 0, 1)]
        before = [len(layout.prefix(images=images, prompt=p)) for p in empty]
        first, last = padded(min(before)), padded(max(before) + instruction)
        if layout.limit:  # of the text
            last = min(last, padded(images * layout.tokens_per_image + (layout.state == "continuous") + layout.limit))
        return range(first, max(first, last) + 1, MULTIPLE)

    def act(self, observations: list[dict], *, malformed: str = "repair", length: int = 0) -> list[tuple[np.ndarray, bool]]:
        """Each {"images": {view: u8[h w 3]}, "state": f32[s] (with a history of t steps f32[t s]), "prompt": str} -> (actions f32[steps a], well formed).

        malformed: what comes back where the tokens are no chunk: repair (the nearest one), hold (stand still: 0 where a number is a
        change or a speed, else "last_action" f32[a] of the observation, in robot units) or raise. Binary dimensions come back as exactly 0 or 1. length: prefixes are padded to at
        least so many tokens, where there shall be few shapes to compile.
        Raises: ValueError naming what was expected; tokens.actions.MalformedTokens.
        """
        hold = malformed == "hold"
        if malformed not in MALFORMED:
            raise ValueError(f"malformed is {malformed!r}; allowed: {', '.join(MALFORMED)}")
        requests = [self._request(o) for o in observations]
        last = [self._last_action(o) for o in observations] if hold else [None] * len(observations)
        for r in requests:
            if cut := self.layout.cut(images=len(r.images), prompt=r.prompt):
                # without the instruction: Python keeps each text that it has warned by, for ever
                warnings.warn(f"{cut} tokens of an instruction do not fit tokens.limit {self.layout.limit} and are not seen", stacklevel=2)
        kinds = np.array([d.kind for d in self.card.action.dims])
        binary, moves = kinds == "binary", np.isin(kinds, ("delta", "velocity"))
        out = []
        for (chunk, valid), held in zip(self.actor(requests, malformed="repair" if hold else malformed, length=length), last):
            # what is held is the action itself, not what normalising leaves of it
            chunk = np.broadcast_to(np.where(moves, 0, held), chunk.shape) if hold and not valid else self.action.denormalize(chunk)
            out.append((np.where(binary, chunk > 0.5, chunk).astype(np.float32), valid))
        return out

    def _last_action(self, observation: dict) -> np.ndarray:
        """f32[a] in robot units."""
        dims, last = self.card.action.dims, np.asarray(observation.get("last_action", ()), np.float32)
        if last.shape != (len(dims),) or not np.isfinite(last).all():
            raise ValueError(f"last_action must be {len(dims)} finite numbers ({', '.join(d.name for d in dims)}), got {last.tolist()}")
        return last

    def _request(self, observation: dict) -> Request:
        missing = [k for k in ("images", "state", "prompt") if k not in observation]
        missing += [f"images[{v!r}]" for v in self.views if v not in observation.get("images", {})]
        if missing:
            raise ValueError(f"observation lacks {', '.join(missing)}; expected: {self.spec()}")
        state = self._state(observation)
        pixels = []
        names = [sample.lagged(v, lag) for lag in range(self.history - 1, -1, -1) for v in self.views]
        for view in (n for n in names if n in observation["images"]):  # steps before the start have no pictures
            image = np.asarray(observation["images"][view])
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ValueError(f"image {view!r} must be uint8 [h, w, 3], got {image.dtype} {image.shape}")
            pixels.append(images.resize(image, self.image_size, self.resize))
        return Request(pixels, state, self._prompt(observation, state), self.steps, len(self.card.action.dims))

    def _state(self, observation: dict) -> np.ndarray:
        """f32[history * s] normalised."""
        state = np.asarray(observation["state"], np.float32)
        dims = len(self.card.state.dims)
        if state.shape not in ((self.history, dims), (dims,) if self.history == 1 else ()) or not np.isfinite(state).all():
            raise ValueError(
                f"state must be {len(self.card.state.dims)} finite numbers ({', '.join(d.name for d in self.card.state.dims)}), got shape {state.shape}"
            )
        return self.state.normalize(state).reshape(-1)

    def _who(self) -> Embodiment:
        return Embodiment(self.card.name, self.card.control_hz, self.steps, self.card.action.dims)

    def _prompt(self, observation: dict, state: np.ndarray) -> Prompt:
        """state: f32[history * s] normalised."""
        if not isinstance(observation["prompt"], str):
            raise ValueError(f"prompt must be text, got {observation['prompt']!r}")
        said = observation["prompt"].encode("utf-8", "replace").decode()  # half a character would end in SentencePiece
        return self.layout.prompt(self._who(), said, state)


def load_all(folder: str | Path, *, head: str = "", mesh=None, sampling: Sampling = GREEDY) -> dict[str, Policy]:
    """Every robot of an export, sharing one set of weights. head: tokens or flow; empty: flow where that was trained. mesh: of
    `sharding.make_mesh`, to divide a model over several devices (its axis `tensor`: each token then reads a share of the weights on
    each). sampling: of tokens, by temperature and top_k. Raises: UserError."""
    return of(*export.read(folder), head=head, mesh=mesh, sampling=sampling)


def parts(body: dict, params: dict, folder: Path) -> tuple[configs.Config, presets.VLAConfig, dict[str, Robot], dict[str, Layout]]:
    """What export.read has read, understood: nothing is placed on a device. Robots of before a refitted tokenizer have the layout that they were
    trained with. Raises: UserError where it does not hold together."""
    try:
        config = configs.from_dict(body["config"], where=str(folder / "policy.json"))
        words, action = text.load(str(folder / "text.model")), files.load(folder / "action_tokenizer.json")
        patches = presets.tokens_per_image(config.model.preset, config.data.image_size)
        layout_of = lambda action, behind: Layout.of(config.tokens, words, action, patches, behind=int(behind))
        own, spoken = layout_of(action, body["behind"]), {}
        for g in body["earlier"]:
            spoken |= dict.fromkeys(g["robots"], layout_of(files.from_json(g["tokenizer"]), g["behind"]))
        cfg = model_config(config, vocab=body["vocab"], state_dim=body["state_dim"])
        shapes = lambda params: {path: x.shape for path, x in tree.flatten(params).items()}
        if shapes(params) != (wanted := shapes(jax.eval_shape(lambda: vla.init(cfg, jax.random.key(0))))):
            wrong = sorted(shapes(params).items() ^ wanted.items())[0][0]
            raise UserError(f"{folder}: the parameters are not those of the model that policy.json describes; {wrong} differs")
        robots = [
            Robot.of(config, told["card"], told["stats"], where=f"{folder}/robots/{name}.json") for name, told in body["robot"].items()
        ]
        return config, cfg, {r.card.name: r for r in robots}, {r.card.name: spoken.get(r.card.name, own) for r in robots}
    except files.ODD as e:  # whoever changed a file has changed its checksum, too
        raise UserError(f"{folder} is no exported policy: {type(e).__name__}: {str(e)[:200]}") from e


def of(body: dict, params: dict, folder: Path, *, head: str = "", mesh=None, sampling: Sampling = GREEDY) -> dict[str, Policy]:
    """`load_all` of what export.read has read."""
    config, cfg, robots, layouts = parts(body, params, folder)
    if mesh is not None:
        params = jax.device_put(params, vla.shardings(cfg, mesh))
    trained = ("flow", "tokens") if config.train.objective == "both" else (config.train.objective,)
    head = head or trained[0]
    if head not in trained:
        raise UserError(f"head is {head!r}, and {folder} was trained for {' and '.join(trained)} (train.objective)")
    actor = Actor(cfg, next(iter(layouts.values())), params, head=head, mesh=mesh, sampling=sampling)
    actors, out = {id(x): actor.speaking(x) for x in layouts.values()}, {}
    for name, r in robots.items():
        out[name] = Policy(
            card=r.card,
            views=r.views,
            steps=r.steps,
            image_size=r.image_size,
            resize=config.data.resize,
            history=r.history,
            state=Normalizer.make(r.stats["state"], r.card.state.dims),
            action=Normalizer.make(r.stats["action"], r.card.action.dims),
            layout=layouts[name],
            actor=actors[id(layouts[name])],
            stats=r.stats,
        )
    return out
