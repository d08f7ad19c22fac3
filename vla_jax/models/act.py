"""From observations to action chunks with a trained model: what evaluation and the deployed policy share."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vla_jax.models import decode, incremental, vla
from vla_jax.models.decode import GREEDY, Language, Sampling
from vla_jax.models.presets import VLAConfig
from vla_jax.tokens.sequence import Layout, Prompt
from vla_jax.types import PAD, Batch, UserError

MULTIPLE = 32  # prefix lengths are padded up to this, so that few shapes are compiled


def padded(tokens: int) -> int:
    """The length that so many tokens of a prefix are padded to."""
    return -(-tokens // MULTIPLE) * MULTIPLE


@dataclasses.dataclass(frozen=True)
class Request:
    """One observation: images u8[h w 3] in the order of the card's views, state f32[s] normalised, the full prompt,
    and the shape (steps, dims) of the wanted chunk."""

    images: list[np.ndarray]
    state: np.ndarray
    prompt: Prompt
    steps: int
    dims: int


class Actor:
    """Answers batches of requests with normalised action chunks. Compiled once per padded shape.

    head: tokens (the decoder's action tokens) or flow (the action expert, in `flow_steps` steps). mesh: of the devices over which
    `params` lie divided; every process of it then makes the same calls.
    """

    def __init__(
        self,
        cfg: VLAConfig,
        layout: Layout,
        params: dict,
        *,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        head: str = "tokens",
        flow_steps: int = 10,
        mesh: jax.sharding.Mesh | None = None,
    ):
        if head not in ("tokens", "flow") or head == "flow" and not cfg.expert:
            raise UserError(f"head is {head!r}; this model has: tokens{', flow' if cfg.expert else ''}")
        self.cfg, self.mesh, self._sampling = cfg, mesh, sampling
        self.head, self._key, self._calls = head, jax.random.key(seed), 0
        integrate = functools.partial(decode.integrate, cfg, steps=flow_steps)
        self._integrate = jax.jit(integrate, static_argnames=("chunk",), out_shardings=self._whole())
        self._speak(layout)
        with self._placed():
            self.params = jax.jit(functools.partial(vla.cast, cfg))(params)
            self._layers = jax.jit(functools.partial(incremental.prepare, cfg))(self.params) if head == "tokens" else None

    def speaking(self, layout: Layout) -> Actor:
        """The same weights, for robots whose sequences have another layout."""
        if layout is self.layout:
            return self
        other = copy.copy(self)
        other._speak(layout)
        return other

    def _speak(self, layout: Layout) -> None:
        self.layout, self.language = layout, Language.of(layout)
        generate = functools.partial(decode.generate, self.cfg, language=self.language, sampling=self._sampling)
        self._generate = jax.jit(generate, static_argnames=("steps",), out_shardings=self._whole())

    def _whole(self):
        """Answers lie whole on every process."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())

    def __call__(self, requests: list[Request], *, malformed: str = "repair", length: int = 0) -> list[tuple[np.ndarray, bool]]:
        """-> for each request (normalised chunk f32[steps dims], whether the tokens were a well-formed chunk). What comes back where
        they were not is as `malformed` says (tokens.actions: repair or raise). length: prefixes are padded to at least so many tokens."""
        rows = 1 << (len(requests) - 1).bit_length()  # few batch sizes are compiled
        self._calls += 1
        key = jax.random.fold_in(self._key, self._calls)
        if self.head == "flow":
            dims = np.array([[r.dims] for r in requests] + [[0]] * (rows - len(requests)), np.int32)
            with self._placed():
                batch = self._batch(requests, rows, length)
                chunks = np.asarray(self._integrate(self.params, batch, key, chunk=max(r.steps for r in requests), dims=dims))
            return [(chunks[i, 0, : r.steps, : r.dims], True) for i, r in enumerate(requests)]
        budget = np.array([r.steps * r.dims for r in requests] + [0] * (rows - len(requests)), np.int32)
        steps = self.language.longest(int(budget.max()))
        with self._placed():
            batch = self._batch(requests, rows, length)
            ids, ended = self._generate(self.params, batch, budget=budget[:, None], steps=steps, key=key, layers=self._layers)
        out = []
        for i, r in enumerate(requests):
            tokens = self.layout.action_tokens(np.asarray(ids[i, 0]))
            chunk, valid = self.layout.action.decode(tokens, steps=r.steps, dims=r.dims, malformed=malformed)
            out.append((chunk, valid and bool(ended[i, 0])))
        return out

    def _placed(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _batch(self, requests: list[Request], rows: int, length: int) -> Batch:
        prefixes = [self.layout.prefix(images=len(r.images), prompt=r.prompt) for r in requests]
        n = padded(max(length, *map(len, prefixes)))
        m, size = max(len(r.images) for r in requests), self.cfg.image_size
        images = np.zeros((rows, m, size, size, 3), np.uint8)
        tokens, segment = np.full((rows, n), PAD, np.int32), np.zeros((rows, n), np.int32)
        width = self.cfg.state_dim or max(len(r.state) for r in requests)
        state, chunk = np.zeros((rows, 1, width), np.float32), np.ones((rows, 1), np.int32)
        for i, (request, prefix) in enumerate(zip(requests, prefixes)):
            tokens[i, : len(prefix)], segment[i, : len(prefix)] = prefix, 1
            state[i, 0, : len(request.state)], chunk[i, 0] = request.state, request.steps
            for j, image in enumerate(request.images):
                images[i, j] = image
        position = np.broadcast_to(np.arange(n, dtype=np.int32), (rows, n))
        return Batch(
            images=images,
            tokens=tokens,
            segment=segment,
            position=position,
            block=np.zeros((rows, n), np.int32),
            state=state,
            chunk=chunk,
        )
