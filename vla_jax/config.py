"""One run's configuration: defaults here, values from a config file, overrides from the command line, then frozen.

A config file defines `get_config(arg: str = "") -> ml_collections.ConfigDict`; it starts from `default()`, which is
locked, so that a misspelt key fails where it stands. Config files are Python and are executed: run only those you trust.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import typing

from vla_jax import paths
from vla_jax.types import UserError


@dataclasses.dataclass(frozen=True)
class Data:
    root: str = ""  # folder or URL that holds <dataset>/<version>/; empty: what VLA_DATA_ROOT says
    mixture: str = ""  # name in data/mixtures, a path to one, or the name of a single card
    index_dir: str = (
        ""  # where step indexes are kept, a folder or gs://; empty: the user's cache folder, of a run at gs://x/runs/a gs://x/runs/index
    )
    holdout: float = 0.1  # fraction of episodes never trained on; evaluation reads only these
    chunk_s: float = 1.0  # an action chunk spans this time, so robots differ in its number of steps
    max_chunk: int = 50  # steps; caps chunk_s * control_hz
    image_size: int = 224  # pixels; images are resized to a square
    views: tuple[str, ...] = ("base", "wrist", "wrist_right", "side")  # the order of cameras; those a card lacks are skipped
    history: int = 1  # steps that are seen: 2 adds the pictures and the state of the step before
    resize: str = "linear"  # linear | antialias (slower; for pictures that shrink much)
    refit_stats: bool = False  # take statistics of the data also for robots whose ones model.init brings
    max_skipped: float = 0.1  # share of a dataset's episodes (when indexed) or samples (when drawn) that may be bad before it is refused
    threads: int = 0  # decoding threads per process; 0: one a core
    read_ahead: int = 512  # pictures asked for before they are needed, per process, where data.root is a URL
    prefetch: int = 2  # batches made ahead; more where read_ahead needs them


@dataclasses.dataclass(frozen=True)
class Augment:
    crop: float = 1.0  # smallest share of the picture's area that a random crop keeps; 1: no crop
    crop_wrist: bool = False  # crop cameras on a wrist, too
    brightness: float = 0.0  # largest change, as a share of the full range
    contrast: float = 0.0  # factor 1 - contrast .. 1 + contrast
    saturation: float = 0.0
    hue: float = 0.0  # largest turn, as a share of the circle
    where: str = "host"  # host (on the decoding threads) | device


@dataclasses.dataclass(frozen=True)
class Pack:
    rows: int = 8  # rows in the global batch
    group: int = 4  # rows packed together; a host makes whole groups
    length: int = 1024  # tokens in a row
    images: int = 4  # images in a row
    samples: int = 4  # samples in a row
    targets: int = 128  # predicted tokens in a row


@dataclasses.dataclass(frozen=True)
class Tokens:
    layout: str = "native"  # native | openpi (pi0-FAST's convention); see tokens/sequence.py
    text_model: str = ""  # SentencePiece .model; empty: that of model.init, else this project's default one; tiny: its small one
    action: str = "fast"  # fast | bins (of one width) | quantile (bins that hold equally many numbers)
    action_vocab: int = 512  # of what is fitted on the training episodes of the mixture: FAST's vocabulary, or the number of bins
    action_scale: float = 10.0  # DCT coefficients are rounded after multiplying by this
    action_path: str = (
        ""  # a fitted tokenizer (JSON), or the folder of a published FAST one; empty: that of model.init, else fit one; kept in the workdir
    )
    refit: bool = False  # fit one also where model.init brings one, with ids of its own; robots outside the mixture go on to speak theirs
    state: str = "continuous"  # continuous (one projected token) | text (bins in the prompt) | none
    describe: bool = True  # layout native: say control rate and action space in the prompt, not the robot's name alone
    limit: int = 0  # most text tokens: of the prompt (native) or of prompt and actions (openpi; there 250); 0: as many as there are


@dataclasses.dataclass(frozen=True)
class Model:
    preset: str = "debug"  # vla_jax/models/presets.py
    init: str = ""  # a folder of `vla-jax export` or `vla-jax import` to begin with; empty: random weights
    expert: str = "none"  # action expert: none | a size of models/presets.py, with :ada behind it for pi0.5's norms
    expert_dims: int = 32  # numbers of its actions and states; robots with fewer are filled up
    dtype: str = "bfloat16"  # of activations; parameters, norms and softmax are float32
    vocab: int = 0  # rows of the embedding, at least; 0: as many as there are tokens (PaliGemma has 257152)
    remat: str = "none"  # what the backward pass computes again: none | full | attention | dots | offload (models/layers.py)
    attention: str = "auto"  # auto | xla | cudnn (GPU) | splash (TPU)


@dataclasses.dataclass(frozen=True)
class Mesh:
    data: int = 1  # copies of the weights; with several slices a multiple of their number, since slices are far apart
    fsdp: int = -1  # over which weights are divided; -1: all remaining devices
    tensor: int = 1  # over which heads and MLPs are divided


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = 1000
    seed: int = 0
    objective: str = "tokens"  # tokens (cross-entropy of action tokens) | flow (the expert's velocities) | both
    insulate: bool = True  # with both: no gradient of the velocities reaches the decoder
    flow_weight: float = 1.0  # of the flow loss beside that of the tokens
    lora_rank: int = 0  # adapters on the weights of lora_on are trained instead of them; 0: all weights are
    lora_alpha: float = 16.0
    lora_on: tuple[str, ...] = ("llm/layers/attn/.*", "llm/layers/mlp/.*")  # regular expressions on paths of parameters
    lora_also: tuple[str, ...] = ("state/.*", "expert/.*")  # trained whole beside the adapters, where the model has them
    freeze: tuple[str, ...] = ()  # parameters that are not trained, likewise
    optimizer: str = "adamw"  # adamw | adafactor | muon
    lr: float = 3e-4
    lr_vision: float = 1.0  # times lr, for the image encoder
    lr_language: float = 1.0  # times lr, for the decoder and the embedding
    lr_expert: float = 1.0  # times lr, for the action expert and the projection of the robot's state
    lr_decay: float = 1.0  # from each layer of encoder and decoder to the one below it; what lies behind the last layer has 1
    lr_end: float = 0.1  # final learning rate as a fraction of lr (cosine)
    warmup: int = 100
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    moment_dtype: str = "float32"  # of the first moment: float32 | bfloat16
    clip: float = 1.0  # largest norm of the whole gradient
    z_loss: float = 0.0  # weight of log(sum of exp of logits)^2 beside the loss of the tokens
    ema: float = 0.0  # decay; 0: none is kept
    accumulate: int = 1  # parts of a batch that are computed one after another: the same step, less memory
    spike: float = 0.0  # a step is skipped when its gradient's norm is this many times the running mean; 0: only if it is not finite
    max_skips: int = 20  # so many skipped steps in a row end the run
    log_every: int = 10
    eval_every: int = 0  # 0: only after the last step
    eval_batches: int = 4
    eval_frames: int = 0  # held-out frames of each dataset whose actions are generated, too, and compared in robot units
    wandb: str = ""  # a project of Weights & Biases to log to; empty: none
    save_every: int = 1000
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # also those of every so many steps; 0: none
    keep_best: int = 0  # also so many with the lowest held-out loss, of those saved at a step that was evaluated; 0: none
    save_timeout_s: float = 600.0  # that processes wait for one another to finish a checkpoint; then it is given up
    hang_s: float = 1800.0  # a process in which nothing moves for so long ends, to be started again; 0: never
    allow_new_mixture: bool = False  # resume although the data changed


# What a number may be; otherwise integers are 1 or more, and floats 0 or more.
_RANGES = {
    "data.holdout": (0.0, 0.9),
    "data.chunk_s": (0.01, 60.0),
    "data.max_chunk": (2, math.inf),
    "data.max_skipped": (0.0, 1.0),
    "data.threads": (0, 1024),
    "augment.crop": (0.05, 1.0),
    "augment.brightness": (0.0, 1.0),
    "augment.contrast": (0.0, 1.0),
    "augment.saturation": (0.0, 1.0),
    "augment.hue": (0.0, 0.5),
    "tokens.action_vocab": (2, 65536),
    "tokens.action_scale": (1e-3, 1e6),
    "tokens.limit": (0, math.inf),
    "model.vocab": (0, 1 << 24),
    "mesh.data": (-1, math.inf),
    "mesh.fsdp": (-1, math.inf),
    "mesh.tensor": (-1, math.inf),
    "train.lora_rank": (0, 4096),
    "train.lora_alpha": (1e-9, math.inf),
    "train.flow_weight": (1e-9, math.inf),
    "train.seed": (0, 2**31 - 1),
    "train.lr_decay": (1e-3, 1.0),
    "train.lr_end": (0.0, 1.0),
    "train.warmup": (0, math.inf),
    "train.b1": (0.0, 0.999999),
    "train.b2": (0.0, 0.999999),
    "train.clip": (1e-9, math.inf),
    "train.ema": (0.0, 0.999999),
    "train.eval_every": (0, math.inf),
    "train.keep_every": (0, math.inf),
    "train.keep_best": (0, math.inf),
    "train.eval_frames": (0, math.inf),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Raises: UserError, when made, for a number outside its range."""

    data: Data = Data()
    augment: Augment = Augment()
    pack: Pack = Pack()
    tokens: Tokens = Tokens()
    model: Model = Model()
    mesh: Mesh = Mesh()
    train: Train = Train()

    def __post_init__(self):
        for key, value in flatten(dataclasses.asdict(self)).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                low, high = _RANGES.get(key, (1, math.inf) if isinstance(value, int) else (0.0, math.inf))
                if not (low <= value <= high and math.isfinite(value)):
                    raise UserError(
                        f"{key} is {value}; it must be {f'from {low:g} to {high:g}' if high < math.inf else f'at least {low:g}'}"
                    )
        for key, value, allowed in (
            ("data.resize", self.data.resize, ("linear", "antialias")),
            ("augment.where", self.augment.where, ("host", "device")),
            ("train.optimizer", self.train.optimizer, ("adamw", "adafactor", "muon")),
            ("train.moment_dtype", self.train.moment_dtype, ("float32", "bfloat16")),
            ("train.objective", self.train.objective, ("tokens", "flow", "both")),
            ("tokens.layout", self.tokens.layout, ("native", "openpi")),
            ("tokens.action", self.tokens.action, ("fast", "bins", "quantile")),
            ("tokens.state", self.tokens.state, ("continuous", "text", "none")),
        ):
            if value not in allowed:
                raise UserError(f"{key} is {value!r}; allowed: {', '.join(allowed)}")
        if self.train.objective != "tokens" and self.model.expert == "none":
            raise UserError(f"train.objective={self.train.objective} needs an action expert: set --config.model.expert")
        if self.pack.rows % self.train.accumulate:
            raise UserError(f"pack.rows {self.pack.rows} is not divisible by train.accumulate {self.train.accumulate}")
        if 0 < self.train.spike <= 1:
            raise UserError(f"train.spike {self.train.spike:g} would skip ordinary steps; use 3 or more, or 0 for none")
        if self.pack.targets > self.pack.length:
            raise UserError(f"pack.targets {self.pack.targets} is above pack.length {self.pack.length}; lower --config.pack.targets")

    def digest(self) -> str:
        """Identifies what a checkpoint's shapes and learning depend on. Where data lies and how fast it is read do not count, and
        which data it is has a fingerprint of its own (Source.fingerprint)."""
        d = dataclasses.asdict(self)
        for key in ("root", "index_dir", "threads", "read_ahead", "prefetch", "max_skipped", "mixture", "holdout"):
            d["data"].pop(key)
        for key in ("log_every", "eval_every", "eval_batches", "eval_frames", "wandb", "save_every", "allow_new_mixture"):
            d["train"].pop(key)
        for key in (
            "steps",
            "accumulate",
            "spike",
            "max_skips",
            "keep",
            "keep_every",
            "keep_best",
            "hang_s",
            "save_timeout_s",
            "moment_dtype",
        ):
            d["train"].pop(key)
        for group, key in (
            ("model", "init"),
            ("model", "attention"),
            ("model", "remat"),
            ("tokens", "action_path"),
            ("tokens", "text_model"),
        ):  # where or how, not what: files are compared by content
            d[group].pop(key)
        d.pop("mesh")
        return hashlib.sha256(json.dumps(d, sort_keys=True).encode()).hexdigest()[:16]


def default():
    """A locked `ConfigDict` of all defaults: what a config file starts from."""
    import ml_collections

    cfg = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    return cfg.lock()


def load(spec: str, overrides: typing.Sequence[str] = ()) -> tuple[Config, dict[str, str]]:
    """`path[:arg]` and overrides `x.y=z` -> the frozen Config and, for each key, where its value comes from.

    Raises: UserError for a missing file, an unknown key (with the nearest known one) or a value of the wrong type.
    """
    import ml_collections
    from absl import flags
    from ml_collections import config_flags

    name, _, arg = spec.partition(":")
    path = paths.find("configs", name)
    known = flatten(dataclasses.asdict(Config()))
    for item in overrides:
        key = item.partition("=")[0]
        if "=" not in item or key not in known:
            raise UserError(_unknown(key, known, "the command line") if "=" in item else f"override {item!r} is not key=value")
    argv = ["vla-jax", f"--config={path}" + (f":{arg}" if arg else ""), *(f"--config.{item}" for item in overrides)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    try:
        values(argv)
        raw: ml_collections.ConfigDict = values.config
    except UserError:
        raise
    except Exception as e:  # a config file is a program: whatever it raises is said as one line
        while "Traceback (most recent call last)" in str(e) and e.__context__:  # ml_collections writes one into an error of its own
            e = e.__context__
        raise UserError(f"config {spec}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    if not isinstance(raw, ml_collections.ConfigDict):
        raise UserError(f"config {spec}: get_config returned {type(raw).__name__}, not a ConfigDict; start from vla_jax.config.default()")
    config = from_dict(raw.to_dict(), where=str(path))
    file_values = _file_values(path, arg, known, config, overrides)
    overridden = {item.partition("=")[0] for item in overrides}
    origin = {}
    for key in known:
        if key in overridden:
            origin[key] = "command line"
        else:
            origin[key] = f"{name}{':' + arg if arg else ''}" if file_values[key] != known[key] else "default"
    return config, origin


def _file_values(path, arg, known, config, overrides) -> dict:
    if not overrides:
        return flatten(dataclasses.asdict(config))
    plain, _ = load(f"{path}:{arg}" if arg else str(path))
    return flatten(dataclasses.asdict(plain))


def from_dict(values: dict, *, where: str) -> Config:
    """Nested plain dict -> Config. Raises: UserError for unknown keys and wrong types."""
    return _build(Config, values, where, "")


def _build(cls, values: dict, where: str, prefix: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    out = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(_unknown(prefix + key, [prefix + f for f in fields], where))
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise UserError(f"{prefix + key} in {where} is a group of settings, not {value!r}")
            out[key] = _build(kind, value, where, prefix + key + ".")
        else:
            out[key] = _cast(kind, value, where, prefix + key)
    return cls(**out)


def _cast(kind, value, where, key):
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(kind, type) or not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{key} = {value!r} in {where} must be of type {getattr(kind, '__name__', kind)}")
    return value


def _unknown(key: str, known, where: str) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown config key {key!r} in {where}.{hint} `vla-jax config --config=...` lists all keys."


def flatten(values: dict, prefix: str = "") -> dict[str, typing.Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    out = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(flatten(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = tuple(value) if isinstance(value, list) else value
    return out


def render(config: Config, origin: dict[str, str]) -> str:
    """The resolved config, one `key = value` a line with where the value comes from."""
    flat = flatten(dataclasses.asdict(config))
    lines = [f"{key} = {json.dumps(value)}" for key, value in flat.items()]
    width = max(map(len, lines))
    return "\n".join(f"{line:<{width}}  # {origin[key]}" for line, key in zip(lines, flat))
