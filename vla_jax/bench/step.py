"""The training step against this machine's own matrix product: all of it, and its parts."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from vla_jax.config import Config
from vla_jax.types import UserError


def run(
    config: Config, *, repeats: int, where: str, batch: str = "data", beside: tuple[str, ...] = (), parts: bool = False
) -> Iterator[dict]:
    """A line for the config's step, and one for each of `beside`, measured in turns with it.

    batch: `data` (the first batch of the config's data) or a kind of bench.batches. beside: `full_loss` (logits at every position),
    `padded` (with batch=packed: such samples, each in a row of three cameras), or a `group.key=value` of the config. parts: also the
    time of encoder, decoder, loss and optimizer, each compiled by itself. Variants of one model and optimizer train the same state, which
    is in memory once. Raises: UserError.
    """
    base = _Step(_rows(config, batch), where, batch, "")
    measured = [base, *(_Step(*_changed(config, batch, what), what, base) for what in beside)]
    for _ in range(repeats + 1):
        for one in measured:
            one.once()
    for one in measured:
        line = one.line()
        if one is not base:
            line["samples_per_s_to_first"] = round(one.samples / one.ms() / (base.samples / base.ms()), 3)
            line["step_ms_to_first"] = round(one.ms() / base.ms(), 3)
        if parts:
            line["parts_ms"] = one.parts(repeats)
        yield line


def _rows(config: Config, batch: str) -> Config:
    """The config with rows as the batch has them. Raises: UserError."""
    from vla_jax.bench import batches
    from vla_jax.models import presets

    if batch == "data":
        return config
    return batches.shaped(config, batch, presets.tokens_per_image(config.model.preset, config.data.image_size))


def _changed(config: Config, batch: str, what: str) -> tuple[Config, str, str]:
    """(config, what its line says, kind of batch) of a variant."""
    if what in ("padded", "packed", "full"):
        return _rows(config, what), f"rows {what}", what
    if what == "full_loss":
        config = _rows(config, batch)
        return dataclasses.replace(config, pack=dataclasses.replace(config.pack, targets=config.pack.length)), what, batch
    key, _, value = what.partition("=")
    group, _, name = key.partition(".")
    old = getattr(getattr(config, group, None), name, None)
    if old is None or not value or (group == "pack" and batch != "data"):
        raise UserError(f"--beside {what!r}: full_loss, padded, packed, full, or a setting of the config such as model.remat=full")
    made = dataclasses.replace(getattr(config, group), **{name: _parsed(old, value, what)})
    return _rows(dataclasses.replace(config, **{group: made}), batch), what, batch


def _parsed(old, value: str, what: str):
    """A setting's value from text, of the type that it has."""
    try:
        if isinstance(old, bool):
            return {"true": True, "false": False}[value.lower()]
        return tuple(value.split(",")) if isinstance(old, tuple) else type(old)(value)
    except (ValueError, KeyError) as e:
        raise UserError(f"--beside {what!r}: the value must be of type {type(old).__name__}") from e


class _Step:
    """A compiled step with its state and batch."""

    def __init__(self, config: Config, where: str, batch: str, beside: str, other: _Step | None = None):
        import jax

        from vla_jax import sharding
        from vla_jax.bench import batches
        from vla_jax.data import feed
        from vla_jax.models import flops
        from vla_jax.train import compile_check, loop, optim, state, step

        self.where, self.kind, self.beside, black = where, batch, beside, 0
        if batch == "data":
            from vla_jax.data.stream import Stream

            with tempfile.TemporaryDirectory(prefix="vla-jax-bench-") as scratch:  # for a tokenizer that is fitted
                ready = loop.prepare(config, scratch, where=where)
            self.mesh, self.cfg, datasets = ready.mesh, ready.cfg, len(ready.source.names)
            with Stream(ready.source) as stream:
                made = next(stream)[0]
        else:
            self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, where=where)
            sharding.check_batch(config.pack.rows, self.mesh, parts=config.train.accumulate, where=where)
            self.cfg, datasets = state.model_config(config, vocab=config.model.vocab or 1024, state_dim=1), 1
            made = batches.make(config, batch, patches=self.cfg.tokens_per_image, vocab=self.cfg.vocab)
            black = batches.black(made, self.cfg.tokens_per_image)
        self.config, self.tx = config, optim.make(config.train)
        ema = config.train.ema > 0
        abstract, self.place = state.shardings(self.cfg, self.tx, self.mesh, with_ema=ema)
        described = lambda state: jax.tree.map(lambda x: (x.shape, x.dtype), state)
        same = other and other.mesh == self.mesh and described(abstract) == described(other.held[0])
        self.held = other.held if same else [state.create(self.cfg, self.tx, self.mesh, seed=0, with_ema=ema)]
        train_step = step.make_train_step(config, self.cfg, self.tx, self.mesh, self.place, datasets=datasets)
        self.work = {
            k: int(v) for k, v in jax.device_get(jax.jit(step.work)(dataclasses.replace(made, sample_id=None, change=None))).items()
        }
        self.samples, self.batch = self.work["samples"], feed.to_device(made, self.mesh)
        pack = config.pack
        flow = config.train.objective != "tokens"
        steps = made.actions.shape[2]
        targets = pack.targets if config.train.objective != "flow" else 0
        sizes = {"length": pack.length, "images": pack.images, "targets": targets}
        slots = flops.slots(self.cfg, pack.rows, **sizes, samples=pack.samples if flow else 0, steps=steps)
        self.work["patches"] -= black * self.cfg.tokens_per_image
        self.work["tokens"] -= black * self.cfg.tokens_per_image
        plain = step.make_train_step(
            config, dataclasses.replace(self.cfg, attention="xla"), self.tx, self.mesh, self.place, datasets=datasets
        )
        self.flops = {
            "real": flops.model(self.cfg, flops.with_expert(self.work, steps) if flow else self.work),
            "slots": flops.model(self.cfg, slots),
            "programmed": flops.traced(plain, abstract, jax.tree.map(compile_check.shape_of, self.batch)),
        }
        with jax.set_mesh(self.mesh):
            before = time.perf_counter()
            self.step = train_step.lower(self.held[0], self.batch).compile()
            self.compile_s = time.perf_counter() - before
        m = self.step.memory_analysis()
        self.needs = (m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes) if m else 0
        self.times, self.ceilings = [], []

    def once(self) -> None:
        """A step, and right behind it the machine's own matrix product: on a shared machine both vary."""
        import jax

        from vla_jax.bench.run import product_rate

        with jax.set_mesh(self.mesh):
            before = time.perf_counter()
            self.held[0], measured = self.step(self.held[0], self.batch)
            jax.block_until_ready((self.held[0].params, measured))
            self.times.append(time.perf_counter() - before)
        self.ceilings.append(product_rate(self.config.model.dtype, 1))

    def ms(self) -> float:
        return median(self.times[1:]) * 1e3

    def line(self) -> dict:
        import jax

        from vla_jax import hardware
        from vla_jax.models import flops
        from vla_jax.train import meter

        model, pack, seconds, count = self.config.model, self.config.pack, self.ms() / 1e3, jax.device_count()
        ceiling = median(self.ceilings[1:])
        chip = hardware.of_kind(jax.devices()[0].device_kind)
        rates = {name: n / seconds / count for name, n in self.flops.items()}
        out = {
            "config": self.where,
            "beside": self.beside,
            "batch": self.kind,
            "preset": model.preset,
            "dtype": model.dtype,
            "remat": model.remat,
            "attention": model.attention,
            "optimizer": self.config.train.optimizer,
            "rows": [pack.rows, pack.length],
            "images": pack.images,
            "targets": pack.targets,
            "devices": f"{count} x {jax.devices()[0].device_kind}",
            "step_ms": round(self.ms(), 1),
            "samples_per_s": round(self.samples / seconds, 1),
            "tokens_per_s": round(self.work["tokens"] / seconds),
            "slots_used": round(self.work["tokens"] / (pack.rows * pack.length), 3),
            "tflops": {name: round(rate / 1e12, 4) for name, rate in rates.items()},
            "ceiling_tflops": round(ceiling / 1e12, 4),
            "of_ceiling": {name: round(rate / ceiling, 3) for name, rate in rates.items()},
            "rule": flops.RULE,
            "needs_gib": round(self.needs / hardware.GIB, 2),
            "peak_gib": round(meter.memory().get("device_gib", 0.0), 2),
            "compile_s": round(self.compile_s, 1),
        }
        if chip:
            out |= {"mfu": round(rates["real"] / chip.peak, 4), "mfu_slots": round(rates["slots"] / chip.peak, 4)}
            out |= {"hfu": round(rates["programmed"] / chip.peak, 4), "peak_tflops": chip.peak / 1e12}
        return out

    def parts(self, repeats: int) -> dict[str, float]:
        """ms of each, forward and backward, compiled by itself; `rest` is what they leave of the step (embeddings, masks, norms)."""
        import jax
        import jax.numpy as jnp
        import optax

        from vla_jax.bench.run import seconds
        from vla_jax.models import vla
        from vla_jax.train import losses

        cfg, b, pack, params = self.cfg, self.batch, self.config.pack, self.held[0].params
        square = lambda x: jnp.square(x.astype(jnp.float32)).sum()
        shape = (pack.rows, pack.length, cfg.language.width)
        hidden = jax.device_put(jnp.ones(shape, cfg.dtype), jax.sharding.NamedSharding(self.mesh, self.batch.tokens.sharding.spec))
        images = jax.jit(lambda x: x.reshape(-1, *x.shape[2:]))(b.images)

        def loss(hidden, table):
            found = losses.token_loss(hidden, table, b.target, b.loss_weight, targets=pack.targets, logit_cap=cfg.language.logit_cap)
            return (found["nll"] * found["weight"]).sum()

        def update(grads, state, params):
            updates, state = self.tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        grad = lambda fn, *which: jax.jit(jax.grad(fn, which or 0))
        with jax.set_mesh(self.mesh):
            out = {
                "vision": seconds(repeats, grad(lambda p: square(vla.encode(cfg, p, images))), params),
                "decoder": seconds(
                    repeats, grad(lambda p, x: square(vla.decode(cfg, p, x, b.segment, b.position, b.block)), 0, 1), params, hidden
                ),
                "loss": seconds(repeats, grad(loss, 0, 1), hidden, vla.embedding(params)),
                "optimizer": seconds(repeats, jax.jit(update), params, self.held[0].opt_state, params),
            }
        out = {name: round(s * 1e3, 1) for name, s in out.items()}
        return out | {"rest": round(self.ms() - sum(out.values()), 1)}


def peer(program: str, arguments: str) -> list[dict]:
    """Runs another program's step on this machine, and gives its JSON lines. Raises: UserError when it fails."""
    from vla_jax.train import metrics

    if not Path(program).is_file():
        raise UserError(f"--peer {program}: no such file. Name a program that prints JSON lines with `ms` and `samples_s`.")
    command = [sys.executable, program, *shlex.split(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in metrics.parse(done.stdout) if "ms" in line]
    if done.returncode or not lines:
        raise UserError(f"--peer {shlex.join(command)} ended with {done.returncode}: {' '.join(done.stderr.split())[-400:]}")
    return [{"peer": Path(program).name, "arguments": arguments, **line} for line in lines]
