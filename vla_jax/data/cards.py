"""Dataset cards: what a robot's numbers mean, and how its recorded fields become state and action vectors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import yaml

from vla_jax import paths
from vla_jax.data import filters, records, rlds, standardize
from vla_jax.data.store import Store
from vla_jax.types import Dim, UserError

UNITS = ("m", "rad", "1", "m/s", "rad/s", "N", "N m")
FRAMES = ("base", "ee", "joint", "world")
KINDS = ("delta", "absolute", "velocity", "binary")
VIEWS = ("base", "side", "side_2", "side_3", "wrist", "wrist_right", "finger")
_MOST = 1 << 28  # numbers in one field of a step; more is a slip in features.json
FIRST_STEPS = ("keep", "drop_if_idle")
GRIPPERS = ("open_high", "closed_high", "relative", "none", "unknown")  # the sense of the number as it was recorded


@dataclasses.dataclass(frozen=True)
class Spec:
    """A state or action vector: the ops that make it (see standardize.py) and the meaning of each dimension."""

    ops: tuple[dict, ...]
    dims: tuple[Dim, ...]


@dataclasses.dataclass(frozen=True)
class DatasetCard:
    """One dataset. Key paths are relative to a step, those behind `episode:` to the episode; `views` maps a canonical
    camera name to its raw key; `gripper` says in which sense state and action recorded it (the ops turn it: 1 = open)."""

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
    gripper: dict[str, str]
    state: Spec
    action: Spec
    filters: tuple[dict, ...]
    bgr: tuple[str, ...] = ()  # views whose red and blue were recorded the wrong way round
    first_step: str = "keep"  # keep | drop_if_idle: recorded before the robot was told to move, with an action of zeros

    @property
    def digest(self) -> str:
        """Changes exactly when what is read or what it means changes; index and statistics are keyed by it."""
        d = dataclasses.asdict(self)
        for key in ("source", "licence", "citation"):
            d.pop(key)
        return hashlib.sha256(json.dumps(d, sort_keys=True).encode()).hexdigest()[:16]

    def vectors(self) -> list[str]:
        """The keys of numbers that state and action are made of."""
        return list(dict.fromkeys([*standardize.keys(self.state.ops), *standardize.keys(self.action.ops)]))

    def keys(self) -> list[str]:
        """Every raw key that the card reads."""
        return list(dict.fromkeys([*self.views.values(), *self.language, *self.vectors(), *filters.keys(self.filters)]))


def load(name: str) -> DatasetCard:
    """A card by name, file name or path. Raises: UserError with the field at fault."""
    path = paths.find("data", name if name.endswith((".yaml", ".yml")) else f"cards/{name}.yaml")
    return from_dict(read_yaml(path, "card"), where=str(path))


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a key stand twice and keeps the last; in a card or a mixture that is a slip. An alias is never needed there, and a few of them
    unfold to more than memory holds."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if isinstance(key, str) and keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str):
    """Raises: UserError when the file is no YAML, or a mapping in it has a key twice."""
    try:
        loader = _UniqueKeys(path.read_text())
        return loader.get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        raise UserError(f"{what} {path} is not valid YAML: {e}") from e


def names() -> list[str]:
    return sorted(p.stem for p in (paths.assets("data") / "cards").glob("*.yaml"))


def from_dict(raw: dict, *, where: str) -> DatasetCard:
    """A parsed YAML card -> DatasetCard. Raises: UserError naming file, field and what is expected."""
    if not isinstance(raw, dict):
        raise UserError(f"card {where} must be a mapping of fields")
    fields = [f.name for f in dataclasses.fields(DatasetCard)]
    raw = {"bgr": [], "first_step": "keep", **raw}
    wrong = sorted(map(str, set(raw) - set(fields))), sorted(set(fields) - set(raw))
    if any(wrong):
        raise UserError(f"card {where}: unknown fields {wrong[0]}, missing fields {wrong[1]}. A card has: {', '.join(fields)}.")
    hz = raw["control_hz"]
    if not isinstance(hz, (int, float)) or isinstance(hz, bool) or not 0 < hz < math.inf:
        raise UserError(f"card {where}: control_hz is {hz!r}; it must be a positive number of actions a second")
    for key, kind in (("views", dict), ("gripper", dict), ("language", list), ("splits", list), ("bgr", list)):
        if not isinstance(raw[key], kind):
            raise UserError(f"card {where}: {key} must be a {kind.__name__}, got {raw[key]!r}")
    for key in ("views", "gripper", "language", "splits", "bgr"):
        odd = [v for v in (raw[key].values() if isinstance(raw[key], dict) else raw[key]) if not isinstance(v, str)]
        if odd or "" in (raw[key].values() if isinstance(raw[key], dict) else raw[key]):
            raise UserError(f"card {where}: {key} holds {odd[0] if odd else ''!r}; it must hold text")
    if not raw["splits"] or len(set(raw["splits"])) < len(raw["splits"]):
        raise UserError(f"card {where}: splits is {raw['splits']!r}; name each split to train on once, as in [train]")
    for key in ("source", "licence", "citation", "robot"):
        if not isinstance(raw[key], str):
            raise UserError(f'card {where}: {key} is {raw[key]!r}; it must be text, "" where nothing is known')
    for key in ("name", "version"):  # they become folders below the data root and the index folder
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", str(raw[key])):
            raise UserError(f"card {where}: {key} is {raw[key]!r}; it names a folder: letters, digits, _ . and - only")
    for view in raw["views"]:
        if view not in VIEWS:
            raise UserError(f"card {where}: view {view!r} is no canonical name; allowed: {', '.join(VIEWS)}")
    if not set(raw["bgr"]) <= set(raw["views"]):
        raise UserError(f"card {where}: bgr is {raw['bgr']!r}; it lists views of the card: {', '.join(raw['views'])}")
    if set(raw["gripper"]) != {"state", "action"} or not set(raw["gripper"].values()) <= set(GRIPPERS):
        raise UserError(f"card {where}: gripper is {raw['gripper']!r}; it must say for state and action one of: {', '.join(GRIPPERS)}")
    if raw["first_step"] not in FIRST_STEPS:
        raise UserError(f"card {where}: first_step is {raw['first_step']!r}; allowed: {', '.join(FIRST_STEPS)}")
    filters.check(raw["filters"], where)
    card = DatasetCard(
        **{k: str(raw[k]) for k in ("name", "version", "source", "licence", "citation", "robot")},
        control_hz=float(hz),
        splits=tuple(raw["splits"]),
        views=dict(raw["views"]),
        language=tuple(raw["language"]),
        gripper=dict(raw["gripper"]),
        state=_spec(raw["state"], f"{where}: state"),
        action=_spec(raw["action"], f"{where}: action"),
        filters=tuple(raw["filters"]),
        bgr=tuple(raw["bgr"]),
        first_step=raw["first_step"],
    )
    if not card.action.dims:
        raise UserError(f"card {where}: action has no dims; a dataset without actions cannot be trained on")
    return card


def _spec(raw, where: str) -> Spec:
    if not isinstance(raw, dict) or set(raw) != {"ops", "dims"}:
        raise UserError(f"card {where} must have exactly the fields ops and dims")
    if not isinstance(raw["ops"], list) or not isinstance(raw["dims"], list) or bool(raw["ops"]) != bool(raw["dims"]):
        raise UserError(f"card {where}: ops and dims must be lists, both empty (nothing was recorded) or neither")
    dims = []
    for i, d in enumerate(raw["dims"]):
        if not isinstance(d, dict) or set(d) != {"name", "unit", "frame", "kind"}:
            raise UserError(f"card {where}.dims[{i}] must have name, unit, frame and kind, got {d!r}")
        if not isinstance(d["name"], str) or not d["name"]:
            raise UserError(f"card {where}.dims[{i}].name is {d['name']!r}; it must be text")
        dim = Dim(**{k: str(v) for k, v in d.items()})
        for value, allowed, key in ((dim.unit, UNITS, "unit"), (dim.frame, FRAMES, "frame"), (dim.kind, KINDS, "kind")):
            if value not in allowed:
                raise UserError(f"card {where}.dims[{i}].{key} is {value!r}; allowed: {', '.join(allowed)}")
        dims.append(dim)
    twice = sorted({d.name for d in dims if [e.name for e in dims].count(d.name) > 1})
    if twice:
        raise UserError(f"card {where}.dims: names must differ, {', '.join(twice)} stands more than once")
    standardize.check(raw["ops"], where)
    return Spec(tuple(raw["ops"]), tuple(dims))


def check(card: DatasetCard, directory: Store | str | Path) -> None:
    """Holds a card against a dataset's own features.json and dataset_info.json.

    Raises: UserError listing every key that is absent or of the wrong kind, and a vector whose length differs from its dims; or
    naming a split that is absent or cannot be read.
    """
    place = directory if isinstance(directory, Store) else Store(directory)
    for split in card.splits:
        records.check_readable(place, rlds.shards(place, split))
    problems = misfits(card, rlds.features(place))
    if problems:
        raise UserError(f"card {card.name} does not fit {directory}:\n  - " + "\n  - ".join(problems))


def misfits(card: DatasetCard, have: dict[str, rlds.Feature]) -> list[str]:
    """What does not fit between a card and the fields that a dataset has, one sentence each."""
    problems = []
    texts = {item["matches"]["key"] for item in card.filters if "matches" in item}
    flags = {item["is_true"] for item in card.filters if "is_true" in item}
    of_steps = {*card.views.values(), *card.language, *card.vectors()}
    for key in card.keys():
        if key.startswith(rlds.EPISODE) and key in of_steps:
            problems.append(f"key {key!r} is the episode's; only filters read those, all else is read from the steps")
        elif key not in have:
            problems.append(f"key {key!r} is not in features.json (it has: {', '.join(sorted(have))})")
        elif key in card.views.values() and not have[key].is_picture:
            problems.append(f"view key {key!r} is {have[key].kind} {have[key].dtype} {list(have[key].shape)}, not an RGB image")
        elif have[key].dtype == "unknown" or (have[key].encoding in ("bytes", "zlib") and have[key].dtype in ("bfloat16", "string")):
            problems.append(f"key {key!r} is stored in a way that is not read ({have[key].kind}, {have[key].dtype} {have[key].encoding})")
        elif key in card.language and have[key].kind == "sequence":
            problems.append(f"language key {key!r} is a list in each step; one text a step is read, so give such texts keys of their own")
        elif math.prod(max(d, 1) for d in have[key].shape) > _MOST:
            problems.append(f"key {key!r} has the shape {list(have[key].shape)}: more than {_MOST} numbers")
        elif key in texts and have[key].dtype != "string":
            problems.append(f"filter matches: key {key!r} is {have[key].kind} {have[key].dtype}, not text")
        elif key in flags and have[key].dtype == "string":
            problems.append(f"filter is_true: key {key!r} is text, not true or false")
        elif key in card.language and have[key].dtype not in ("string", "int32", "int64", "uint8"):
            problems.append(f"language key {key!r} is {have[key].dtype}, not a string")
        elif key in card.vectors() and (have[key].kind != "tensor" or have[key].dtype == "string"):
            problems.append(f"key {key!r} is {have[key].kind} {have[key].dtype}, not numbers")
    if problems:
        return problems
    fields = {k: np.zeros((2, max(1, math.prod(max(d, 1) for d in have[k].shape))), np.float32) for k in card.vectors()}
    for label, spec in (("state", card.state), ("action", card.action)):
        try:
            width = standardize.apply(spec.ops, fields).shape[1]
        except (KeyError, IndexError, ValueError) as e:
            problems.append(f"{label}: ops do not fit the fields ({e})")
            continue
        if width != len(spec.dims):
            problems.append(f"{label} has {width} numbers after its ops but the card names {len(spec.dims)} dims")
    return problems
