"""A run, compiled for TPUs that are not there: does it fit, what does it send, how long will it take (after MaxText's train_compile).

Nothing is read but the config and the cards that it names: no data, no weights, no TPU. The compiler is the real one (package libtpu).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
import time

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from vla_jax import hardware, sharding, tree
from vla_jax.config import Config
from vla_jax.data import mixture, sample, stream
from vla_jax.hardware import GIB, Chip
from vla_jax.models import attention, flops, presets, vla
from vla_jax.models.presets import VLAConfig
from vla_jax.sharding import RULES
from vla_jax.tokens import files, text
from vla_jax.train import collectives, optim, roofline, state, step
from vla_jax.types import Batch, UserError

_ACTION_TOKENS = 4  # of a chunk, for each dimension: what FAST needs for one second (docs/tokens.md)
_PROMPT = 48  # tokens of a description and a task
_FULL = 0.95  # of a packed row


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the cards of a mixture say of a batch: the largest chunk steps, action and state dims, how many datasets; token ids; and the
    tokens, images and targets of a sample, on average."""

    chunk: int
    action: int
    state: int
    datasets: int
    vocab: int
    sample_tokens: float
    sample_images: float
    sample_targets: float


def shapes(config: Config, patches: int) -> Shapes:
    """From config and cards alone. Raises: UserError for cards or text models that are not there, and for samples that no row can hold
    (what they take is known about, before there is data)."""
    d, t, mix = config.data, config.tokens, mixture.load(config.data.mixture)
    words, fitted = text.load(t.text_model).vocab_size, t.action_vocab
    if t.action_path:
        fitted = files.load(t.action_path).vocab_size
    share, p = [w / sum(mix.weights) for w in mix.weights], config.pack
    images = [len([v for v in d.views if v in card.views]) * d.history for card in mix.cards]
    chunks = [sample.chunk_steps(card.control_hz, d.chunk_s, d.max_chunk) for card in mix.cards]
    of_chunk = [_ACTION_TOKENS * len(c.action.dims) if t.action == "fast" else k * len(c.action.dims) for k, c in zip(chunks, mix.cards)]
    said = 0 if config.train.objective == "flow" else 1
    targets = [said * of for of in of_chunk]
    tokens = [n * patches + _PROMPT + of for n, of in zip(images, targets)]
    for what, each, most in (("images", images, p.images), ("tokens", tokens, p.length), ("targets", targets, p.targets)):
        if max(each) > most:
            about = "" if what == "images" else "about "
            key = "length" if what == "tokens" else what
            name = mix.cards[each.index(max(each))].name
            raise UserError(f"a sample of {name} has {about}{max(each)} {what} but pack.{key} is {most}. Raise --config.pack.{key}.")
    sizes = max(len(card.action.dims) for card in mix.cards), max(len(card.state.dims) for card in mix.cards) * d.history
    if config.model.expert != "none" and max(sizes) > config.model.expert_dims:
        raise UserError(
            f"the mixture has actions of {sizes[0]} and states of {sizes[1]} numbers, more than model.expert_dims {config.model.expert_dims}. "
            "Raise --config.model.expert_dims."
        )
    return Shapes(
        chunk=max(chunks),
        action=sizes[0],
        state=sizes[1],
        datasets=len(mix.cards),
        vocab=words + (0 if t.layout == "openpi" else fitted),
        sample_tokens=sum(s * n for s, n in zip(share, tokens)),
        sample_images=sum(s * n for s, n in zip(share, images)),
        sample_targets=sum(s * n for s, n in zip(share, targets)),
    )


def abstract_batch(config: Config, found: Shapes, mesh) -> Batch:
    """A batch of the config as shapes, divided over the mesh."""
    p, size, place = config.pack, config.data.image_size, sharding.batch_sharding(mesh)
    b, g = p.rows, p.samples
    row, robot = (b, p.length), (b, g, found.chunk, found.action)
    ints = dict.fromkeys(("tokens", "segment", "position", "block", "target"), (row, jnp.int32))
    ints |= {"dataset": ((b, g), jnp.int32), "chunk": ((b, g), jnp.int32), "images": ((b, p.images, size, size, 3), jnp.uint8)}
    floats = {"loss_weight": (row, jnp.float32), "state": ((b, g, found.state), jnp.float32), "actions": (robot, jnp.float32)}
    all_of = ints | floats | {"action_mask": (robot, jnp.bool_)}
    return Batch(**{name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype) in all_of.items()})


def shape_of(x, place=None) -> jax.ShapeDtypeStruct:
    """Of an array or of its description; place: its sharding, if not its own."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place or getattr(x, "sharding", None))


def devices(topology: str, slices: int):
    """The described TPUs. Raises: UserError where libtpu is not installed or knows no such topology."""
    try:
        import libtpu  # noqa: F401
    except ImportError as e:
        raise UserError(
            "compile-check compiles for TPUs with the package libtpu, which is not installed (0.6 GB; no TPU is needed): "
            "pip install -c constraints.txt 'vla-jax[tpu]', and set JAX_PLATFORMS=cpu where there is no TPU."
        ) from e
    from jax.experimental import topologies

    # ask no metadata server, leave other processes their TPUs, and complain of no host that is missing
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for key, value in (quiet | {"TPU_ACCELERATOR_TYPE": "v5litepod-16"}).items():
        os.environ.setdefault(key, value)
    try:
        more = {"num_slices": slices} if slices > 1 else {}
        sides = hardware.topology(topology)[1]
        if 1 in sides[:2]:  # less than a host
            more["chips_per_host_bounds"] = (*sides, 1)[:3]
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except Exception as e:
        raise UserError(
            f"--topology {topology}: {' '.join(str(e).split())[:300]}. Sides are multiples of a host's 2x2, such as 4x4."
        ) from e


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a topology, before it is compiled."""

    config: Config
    cfg: VLAConfig
    chip: Chip
    mesh: jax.sharding.Mesh
    found: Shapes
    slices: int

    @classmethod
    def make(cls, config: Config, topology: str, slices: int = 1, *, where: str = "config") -> Plan:
        """Raises: UserError for whatever training would refuse of shapes and mesh."""
        chip, _ = hardware.topology(topology)
        sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
        mesh = sharding.make_mesh(*sizes, devices=devices(topology, slices), where=where)
        sharding.check_batch(config.pack.rows, mesh, parts=config.train.accumulate, where=where)
        stream.groups(config)
        found = shapes(config, presets.tokens_per_image(config.model.preset, config.data.image_size))
        cfg = state.model_config(config, vocab=found.vocab, state_dim=found.state)
        with jax.set_mesh(mesh):
            attention.check(cfg)
        return cls(config, cfg, chip, mesh, found, slices)

    def changed(self, config: Config) -> Plan:
        """Another config on the same chips, divided as it says."""
        mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=list(self.mesh.devices.flat))
        sharding.check_batch(config.pack.rows, mesh, parts=config.train.accumulate)
        cfg = state.model_config(config, vocab=self.found.vocab, state_dim=self.found.state)
        return dataclasses.replace(self, config=config, cfg=cfg, mesh=mesh)

    def state_on(self, mesh):
        """(abstract TrainState, its shardings)."""
        return state.shardings(self.cfg, optim.make(self.config.train), mesh, with_ema=self.config.train.ema > 0)

    @functools.cached_property
    def state(self):
        """The same on the plan's own mesh."""
        return self.state_on(self.mesh)

    @functools.cached_property
    def batch(self) -> Batch:
        return abstract_batch(self.config, self.found, self.mesh)

    @functools.cached_property
    def kept(self) -> dict[str, float]:
        """{parameters, optimizer, ema, batch}: bytes on one device before and after a step."""
        return state_bytes(*self.state) | {"batch": _bytes(self.batch, jax.tree.map(lambda x: x.sharding, self.batch))}

    def step(self, cfg: VLAConfig | None = None):
        tx, where = optim.make(self.config.train), self.state[1]
        return step.make_train_step(self.config, cfg or self.cfg, tx, self.mesh, where, datasets=self.found.datasets)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """temp, host: bytes of a device's buffers besides its state, and of what waits in the host's memory; text: the program; error: why
    it does not fit; temp is then what the compiler asked for, 0 if it did not say."""

    temp: float
    host: float
    text: str
    seconds: float
    error: str = ""


def compiled(plan: Plan) -> Compiled:
    """Raises: UserError for lack of stack; what the compiler raises, except for lack of memory."""
    if not has_stack(plan.chip):
        raise UserError(
            f"the compiler for {plan.chip.name} needs more stack than this process has: `ulimit -s unlimited` first, and again."
        )
    before = time.perf_counter()
    given = jax.tree.map(shape_of, *plan.state)
    made = plan.step()  # before the mesh is set: nothing can be computed on devices that are not there
    with jax.set_mesh(plan.mesh):
        lowered = made.lower(given, plan.batch)
        try:
            done = lowered.compile()
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            asked = re.search(r"\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of", str(e))
            number, unit = (asked[1] or asked[3], asked[2] or asked[4]) if asked else ("0", "G")
            temp = float(number) * 1024 ** ("KMGT".index(unit) + 1)
            return Compiled(temp, 0.0, "", time.perf_counter() - before, str(e).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2][:300])
    m = done.memory_analysis()
    temp = m.temp_size_in_bytes + max(m.output_size_in_bytes - m.alias_size_in_bytes, 0) + m.generated_code_size_in_bytes
    host = m.host_temp_size_in_bytes + m.host_argument_size_in_bytes
    total, error = temp + sum(plan.kept.values()), ""
    if total > plan.chip.hbm_bytes:
        error = f"state and buffers together are {total / GIB:.2f} GiB, and there are {plan.chip.hbm_bytes / GIB:.2f}"
    return Compiled(float(temp), float(host), "" if error else done.as_text(), time.perf_counter() - before, error)


def has_stack(chip: Chip) -> bool:
    """Whether this process has the stack that the compiler for a chip needs. That for 7x overflows one of the usual size, and of 64 MiB,
    which ends the whole process; a process takes its size from its limits when it starts."""
    import resource

    return chip.name != "tpu7x" or resource.getrlimit(resource.RLIMIT_STACK)[0] == resource.RLIM_INFINITY


def state_bytes(abstract, where) -> dict[str, float]:
    """{parameters, optimizer, ema}: bytes on one chip."""
    parts = {"parameters": "params", "optimizer": "opt_state", "ema": "ema"}
    return {kind: _bytes(getattr(abstract, field), getattr(where, field)) for kind, field in parts.items()}


def _bytes(abstract, where) -> float:
    """Of a tree of arrays, on one device."""
    size = lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return float(sum(map(size, jax.tree.leaves(abstract), jax.tree.leaves(where))))


def replicated(plan: Plan) -> list[dict]:
    """The leaves that a mesh axis of their rule does not divide, with what that costs on each device (parameter, moments and EMA)."""
    shapes = tree.flatten(plan.state[0].params)
    state = state_bytes(*plan.state)
    copies = sum(state.values()) / state["parameters"]
    table, sizes, out = dict(RULES.table), dict(plan.mesh.shape), []
    for path, axes in tree.flatten(vla.logical_axes(plan.cfg)).items():
        shape = shapes[path].shape
        spec = RULES.spec(axes, shape, plan.mesh)
        over = {a for s in spec for a in ((s,) if isinstance(s, str) else s or ())}
        each = math.prod(shape) * 4 * copies / math.prod(sizes[a] for a in over)
        for axis in {a for name in axes for a in table.get(name, ()) if sizes[a] > 1} - over:
            found = {"path": path, "shape": list(shape), "axis": axis, "ways": sizes[axis]}
            out.append(found | {"bytes": each * (1 - 1 / sizes[axis])})
    return sorted((x for x in out if x["bytes"] > 1 << 20), key=lambda x: -x["bytes"])


def better_mesh(plan: Plan) -> dict | None:
    """The division of the same chips into data and fsdp with the least state on each, where that is a tenth less than now, or more."""
    sizes = dict(plan.mesh.shape)
    now, n = sum(state_bytes(*plan.state).values()), sizes["data"] * sizes["fsdp"]
    best = None
    for fsdp in (f for f in range(n, 0, -1) if n % f == 0 and (n // f) % plan.slices == 0):
        mesh = AbstractMesh((n // fsdp, fsdp, sizes["tensor"]), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
        total = sum(state_bytes(*plan.state_on(mesh)).values())
        if best is None or total < best["state_bytes"]:
            best = {"data": n // fsdp, "fsdp": fsdp, "tensor": sizes["tensor"], "state_bytes": total}
    return best if best and best["state_bytes"] < 0.9 * now else None


def report(plan: Plan, done: Compiled, *, where: str = "config") -> dict:
    """Everything about a compiled plan, as JSON; roofline.table shows it."""
    config, cfg, count = plan.config, plan.cfg, plan.mesh.size
    abstract, kept = plan.state[0], sum(state_bytes(*plan.state).values())
    memory = plan.kept | {"state": kept, "activations": done.temp, "host": done.host, "hbm": plan.chip.hbm_bytes}
    memory["total"] = sum(plan.kept.values()) + done.temp
    fits, lost = not done.error, replicated(plan)
    pack = config.pack
    slots = flops.slots(
        cfg,
        pack.rows,
        length=pack.length,
        images=pack.images,
        targets=pack.targets if config.train.objective != "flow" else 0,
        samples=pack.samples if config.train.objective != "tokens" else 0,
        steps=plan.found.chunk,
    )
    model = flops.model(cfg, slots)
    hard = flops.traced(plan.step(dataclasses.replace(cfg, attention="xla")), abstract, plan.batch)
    sent = collectives.read(done.text, count, plan.slices) if fits else []
    by_kind = {
        k: [sum(c.bytes * c.times for c in sent if c.kind == k and c.across == far) for far in (False, True)] for k in collectives.KINDS
    }
    by_kind = {k: v for k, v in by_kind.items() if sum(v)}
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
    weights = parameters * jnp.dtype(cfg.dtype).itemsize / plan.mesh.shape["tensor"]
    passes = config.train.accumulate * (3 if cfg.remat in ("none", "dots") else 4)  # forward, again, backward, gradient
    far = sum(v[1] for v in by_kind.values())
    one = roofline.Step(model, hard, count, kept, weights, passes, sum(v[0] for v in by_kind.values()), far)
    bound, seconds = one.seconds(plan.chip)
    f, most = plan.found, lambda slots, each: slots / each if each else math.inf
    per_row = min(
        pack.samples, most(pack.images, f.sample_images), most(pack.targets, f.sample_targets), _FULL * pack.length / f.sample_tokens
    )
    samples = pack.rows * max(per_row, 1.0) / seconds  # one sample always fits: see shapes
    hours = config.train.steps * seconds / 3600
    return {
        "config": where,
        "chip": plan.chip.name,
        "chips": count // plan.chip.cores,
        "devices": count,
        "slices": plan.slices,
        "mesh": dict(plan.mesh.shape),
        "preset": config.model.preset,
        "parameters": parameters,
        "remat": cfg.remat,
        "optimizer": config.train.optimizer,
        "rows": pack.rows,
        "length": pack.length,
        "images": pack.images,
        "parts": config.train.accumulate,
        "fits": fits,
        "why": done.error,
        "memory": memory,
        "replicated": lost,
        "better_mesh": better_mesh(plan) if lost or not fits else None,
        "flops": {"model": model, "hardware": hard},
        "collectives": by_kind,
        "bounds": one.bounds(plan.chip),
        "roofline_s": bound,
        "step_s": seconds,
        "mfu": model / count / seconds / plan.chip.peak,
        "hfu": hard / count / seconds / plan.chip.peak,
        "samples_per_s": samples,
        "sample_tokens": plan.found.sample_tokens,
        "tokens_per_s": samples * plan.found.sample_tokens,
        "steps": config.train.steps,
        "days": hours / 24,
        "chip_hours": hours * count / plan.chip.cores,
        "compile_s": done.seconds,
    }
