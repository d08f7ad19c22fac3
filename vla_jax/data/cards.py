"""Dataset cards: what a robot's numbers mean, and how its recorded fields become state and action vectors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import yaml

from vla_jax import paths
from vla_jax.data import rlds, standardize
from vla_jax.types import Dim, UserError

UNITS, FRAMES, KINDS = ("m", "rad", "1", "m/s", "rad/s"), ("base", "ee", "joint"), ("delta", "absolute", "binary")


@dataclasses.dataclass(frozen=True)
class Spec:
    """A state or action vector: the ops that make it (see standardize.py) and the meaning of each dimension."""

    ops: tuple[dict, ...]
    dims: tuple[Dim, ...]


@dataclasses.dataclass(frozen=True)
class DatasetCard:
    """One dataset. Key paths are relative to a step; `views` maps a canonical camera name to its raw key."""

    name: str
    version: str
    source: str
    licence: str
    citation: str
    robot: str
    control_hz: float
    splits: tuple[str, ...]
    views: dict[str, str]
    language: tuple[str, ...]
    state: Spec
    action: Spec

    @property
    def digest(self) -> str:
        """Changes exactly when what is read or what it means changes; index and statistics are keyed by it."""
        d = dataclasses.asdict(self)
        for key in ("source", "licence", "citation"):
            d.pop(key)
        return hashlib.sha256(json.dumps(d, sort_keys=True).encode()).hexdigest()[:16]

    def keys(self) -> list[str]:
        """Every raw key that the card reads."""
        ops = [*self.state.ops, *self.action.ops]
        picked = [v["key"] if isinstance(v, dict) else v for op in ops for k, v in op.items() if k == "pick"]
        return list(dict.fromkeys([*self.views.values(), *self.language, *picked]))


def load(name: str) -> DatasetCard:
    """A card by name, file name or path. Raises: UserError with the field at fault."""
    path = paths.find("data", name if name.endswith((".yaml", ".yml")) else f"cards/{name}.yaml")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as e:
        raise UserError(f"card {path} is not valid YAML: {e}") from e
    return from_dict(raw, where=str(path))


def names() -> list[str]:
    return sorted(p.stem for p in (paths.assets("data") / "cards").glob("*.yaml"))


def from_dict(raw: dict, *, where: str) -> DatasetCard:
    """A parsed YAML card -> DatasetCard. Raises: UserError naming file, field and what is expected."""
    if not isinstance(raw, dict):
        raise UserError(f"card {where} must be a mapping of fields")
    fields = [f.name for f in dataclasses.fields(DatasetCard)]
    wrong = sorted(set(raw) - set(fields)), sorted(set(fields) - set(raw))
    if any(wrong):
        raise UserError(f"card {where}: unknown fields {wrong[0]}, missing fields {wrong[1]}. A card has: {', '.join(fields)}.")
    hz = raw["control_hz"]
    if not isinstance(hz, (int, float)) or isinstance(hz, bool) or not 0 < hz < math.inf:
        raise UserError(f"card {where}: control_hz is {hz!r}; it must be a positive number of actions a second")
    for key, kind in (("views", dict), ("language", list), ("splits", list)):
        if not isinstance(raw[key], kind):
            raise UserError(f"card {where}: {key} must be a {kind.__name__}, got {raw[key]!r}")
    texts = {k: str(raw[k] or "") for k in ("name", "version", "source", "licence", "citation", "robot")}
    views = {str(k): str(v) for k, v in raw["views"].items()}
    return DatasetCard(
        **texts,
        control_hz=float(hz),
        splits=tuple(map(str, raw["splits"])),
        views=views,
        language=tuple(map(str, raw["language"])),
        state=_spec(raw["state"], f"{where}: state"),
        action=_spec(raw["action"], f"{where}: action"),
    )


def _spec(raw, where: str) -> Spec:
    if not isinstance(raw, dict) or set(raw) != {"ops", "dims"}:
        raise UserError(f"card {where} must have exactly the fields ops and dims")
    if not isinstance(raw["ops"], list) or not isinstance(raw["dims"], list) or not raw["dims"]:
        raise UserError(f"card {where}: ops and dims must be lists, and dims not empty")
    dims = []
    for i, d in enumerate(raw["dims"]):
        if not isinstance(d, dict) or set(d) != {"name", "unit", "frame", "kind"}:
            raise UserError(f"card {where}.dims[{i}] must have name, unit, frame and kind, got {d!r}")
        dim = Dim(**{k: str(v) for k, v in d.items()})
        for value, allowed, key in ((dim.unit, UNITS, "unit"), (dim.frame, FRAMES, "frame"), (dim.kind, KINDS, "kind")):
            if value not in allowed:
                raise UserError(f"card {where}.dims[{i}].{key} is {value!r}; allowed: {', '.join(allowed)}")
        dims.append(dim)
    standardize.check(raw["ops"], where)
    return Spec(tuple(raw["ops"]), tuple(dims))


def check(card: DatasetCard, directory: Path) -> None:
    """Holds a card against a dataset's own features.json.

    Raises: UserError listing every key that is absent or of the wrong kind, and a vector whose length differs from its dims.
    """
    have = rlds.features(directory)
    problems = []
    for key in card.keys():
        if key not in have:
            problems.append(f"key {key!r} is not in features.json (it has: {', '.join(sorted(have))})")
        elif key in card.views.values() and have[key].kind != "image":
            problems.append(f"view key {key!r} is of kind {have[key].kind}, not an image")
        elif key in card.language and have[key].dtype != "string":
            problems.append(f"language key {key!r} is {have[key].dtype}, not a string")
    if not problems:
        for label, spec in (("state", card.state), ("action", card.action)):
            fields = {k: _zeros(f.shape) for k, f in have.items() if f.kind == "tensor" and f.dtype != "string"}
            try:
                width = standardize.apply(spec.ops, fields).shape[1]
            except (KeyError, IndexError, ValueError) as e:
                problems.append(f"{label}: ops do not fit the fields ({e})")
                continue
            if width != len(spec.dims):
                problems.append(f"{label} has {width} numbers after its ops but the card names {len(spec.dims)} dims")
    if problems:
        raise UserError(f"card {card.name} does not fit {directory}:\n  - " + "\n  - ".join(problems))


def _zeros(shape):
    import numpy as np

    return np.zeros((2, int(np.prod([max(d, 1) for d in shape], dtype=int))), np.float32)
