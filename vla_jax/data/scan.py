"""The one pass over a shard: records are checked, parsed and standardised by the card into a part of the step index.

Run as a program it is one of several workers on a machine: `python -m vla_jax.data.scan JOB.json` scans the shards that the
job names and leaves a part for each. A worker ends with its parent, however that ended.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import json
import os
import signal
import sys
import threading
import zlib
from pathlib import Path

import numpy as np

from vla_jax.data import cards, filters, records, rlds, standardize
from vla_jax.data.cards import DatasetCard
from vla_jax.data.records import CorruptRecord, Example
from vla_jax.data.rlds import EPISODE, Feature
from vla_jax.data.store import Store

LOST = "behind a broken record"  # episodes of a shard that cannot be reached any more
FEWER = "announced but not there"  # episodes that dataset_info.json counts and a whole shard does not have
_LARGEST = 1e18  # a number beyond it is no robot's, and its square no float32


def cores() -> int:
    """Those that this process may use: of all, where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shard(store: Store, name: str, expected: int, card: DatasetCard, features: dict[str, Feature]) -> dict:
    """One shard -> its part of the index: the arrays of `index.FRAME` and `index.EPISODE`, and "said": {texts, sets
    (each a list of text numbers), skipped {cause: episodes}, filtered {filter: episodes}, surplus (whole records beyond the
    expected number, which are used like the others)}."""
    rows: dict[str, list] = collections.defaultdict(list)
    skipped, filtered = collections.Counter(), collections.Counter()
    texts, sets = _Numbered(), _Numbered()
    wanted = _wanted(card)
    seen, whole, broken = 0, 0, ""
    for found in records.read_all(store, name, expected):
        seen += 1
        if isinstance(found, CorruptRecord):
            skipped[found.cause] += 1
            broken = found.cause
            continue
        whole += 1
        where, payload, crc = found
        try:
            made = episode(Example(payload, wanted), card, features)
        except CorruptRecord as e:
            skipped[e.cause] += 1
            continue
        except (ValueError, TypeError, IndexError, OverflowError):  # whatever else a record may hold: no bad one ends a scan
            skipped["cannot be parsed"] += 1
            continue
        if reason := filters.left_out(card.filters, made["fields"], action=made["action"], labelled=any(made["language"])):
            filtered[reason] += 1
            continue
        if card.language and not any(made["language"]):
            skipped["no language"] += 1
            continue
        for key in ("action", "state", "image"):
            rows[key].append(made[key])
        rows["language"].append(np.array([sets.number(tuple(texts.number(t) for t in said)) for said in made["language"]], np.int32))
        rows["episode_steps"].append(len(made["action"]))
        rows["episode_offset"].append(where)
        rows["episode_crc"].append(crc)
    if seen < expected:
        skipped[broken if broken == "unreadable shard" else LOST if broken else FEWER] += expected - seen
    surplus = max(0, whole - expected)
    a, s, v = len(card.action.dims), len(card.state.dims), len(card.views)
    empty = {"action": (0, a), "state": (0, s), "image": (0, v, 2), "language": (0,)}
    dtypes = {"action": np.float32, "state": np.float32, "image": np.uint32, "language": np.int32}
    out = {k: np.concatenate(rows[k]) if rows[k] else np.zeros(shape) for k, shape in empty.items()}
    out = {k: x.astype(dtypes[k]) for k, x in out.items()}
    for key, dtype in (("episode_steps", np.int64), ("episode_offset", np.int64), ("episode_crc", np.uint32)):
        out[key] = np.array(rows[key], dtype)
    return out | {
        "said": {"texts": texts.items, "sets": sets.items, "skipped": dict(skipped), "filtered": dict(filtered), "surplus": surplus}
    }


def _wanted(card: DatasetCard) -> frozenset[str]:
    inside = [k for k in card.keys() if not k.startswith(EPISODE)]
    return frozenset(
        [f"steps/{k}" for k in [*inside, "is_first"]] + [k.removeprefix(EPISODE) for k in card.keys() if k.startswith(EPISODE)]
    )


def episode(example: Example, card: DatasetCard, features: dict[str, Feature]) -> dict:
    """One parsed record -> {action f32[n a], state f32[n s], image i64[n views 2] (offset in the payload and length; 0 where
    this step has no such picture), language: n tuples of the instructions that it has, fields: what filters read}.

    Raises: CorruptRecord with the cause when it cannot be used.
    """
    raw = lambda key: f"steps/{key}"
    spans = {key: _picture_spans(example, raw(key), features[key]) for key in card.views.values()}
    steps = len(example.numbers(raw("is_first"))) if raw("is_first") in example else 0
    for found in spans.values():
        steps = steps or len(found)
    fields = {}
    for key in card.vectors():
        value, width = _numbers(example, raw(key), features[key]), _width(features[key])
        steps = steps or (value.size // width if width else 0)
        if steps and (value.size == 0 or value.size != steps * (width or value.size // steps)):
            raise CorruptRecord("field of another length", f"{key}: {value.size} numbers in {steps} steps")
        fields[key] = value
    if steps == 0:
        raise CorruptRecord("empty episode")
    fields = {key: value.reshape(steps, -1) for key, value in fields.items()}
    for key, found in spans.items():
        if len(found) != steps:
            raise CorruptRecord("field of another length", f"{key}: {len(found)} pictures in {steps} steps")
    try:
        action, state = (standardize.apply(spec.ops, fields, steps) for spec in (card.action, card.state))
    except (IndexError, ValueError) as e:
        raise CorruptRecord("field of another length", str(e)) from e
    if not (np.isfinite(action).all() and np.isfinite(state).all()):
        raise CorruptRecord("NaN or inf in action or state")
    if max(np.abs(action).max(initial=0), np.abs(state).max(initial=0)) > _LARGEST:
        raise CorruptRecord("number beyond 1e18 in action or state")
    image = np.stack([spans[key] for key in card.views.values()], axis=1) if spans else np.zeros((steps, 0, 2), np.int64)
    said = [_texts(example, raw(key), features[key], steps) for key in card.language]
    language = [tuple(dict.fromkeys(t for t in step if t)) for step in zip(*said)] if said else [()] * steps
    first = int(card.first_step == "drop_if_idle" and steps > 1 and _idle(action[0], card))
    made = {"action": action[first:], "state": state[first:], "image": image[first:], "language": language[first:]}
    return made | {"fields": _filter_fields(example, card, features)}


def _idle(action: np.ndarray, card: DatasetCard) -> bool:
    return not any(x for x, dim in zip(action.tolist(), card.action.dims) if dim.kind != "binary")


def _numbers(example: Example, name: str, feature: Feature) -> np.ndarray:
    """A field's numbers, those of an encoded tensor (TFDS encodings bytes and zlib: a value a step) among them."""
    if feature.encoding not in ("bytes", "zlib") or not example.is_bytes(name) or feature.kind != "tensor":
        return example.numbers(name)
    size, out = max(_width(feature), 1) * np.dtype(feature.dtype).itemsize, []
    for at, length in example.spans(name).tolist():
        data = bytes(example.payload[at : at + length])
        try:
            data = records.inflated(data, size) if feature.encoding == "zlib" else data
        except zlib.error as e:
            raise CorruptRecord("field of another type", f"{name}: {e}") from e
        if len(data) != size:
            raise CorruptRecord("field of another length", f"{name}: {len(data)} bytes, not {size}")
        out.append(data)
    return np.frombuffer(b"".join(out), feature.dtype)


def _width(feature: Feature) -> int:
    """Numbers a step; 0 where the shape is not fixed."""
    return 0 if any(d < 1 for d in feature.shape) or feature.kind == "sequence" else int(np.prod(feature.shape, dtype=int))


def _picture_spans(example: Example, name: str, feature: Feature) -> np.ndarray:
    if feature.kind == "tensor" and not example.is_bytes(name):
        return example.number_spans(name, int(np.prod(feature.shape)))
    return example.spans(name)


def _texts(example: Example, name: str, feature: Feature, steps: int) -> list[str]:
    """One instruction per step; integers are the bytes of UTF-8, filled up with zeros (Language Table)."""
    if feature.dtype == "string":
        out = example.texts(name)
    else:
        codes = _numbers(example, name, feature)
        if codes.dtype.kind == "f":
            raise CorruptRecord("field of another type", f"{name} holds floats, not codes of characters")
        if codes.size % steps:
            raise CorruptRecord("field of another length", f"{name}: {codes.size} codes in {steps} steps")
        rows = (codes.reshape(steps, -1) & 0xFF).astype(np.uint8)
        out = [bytes(r).split(b"\0")[0].decode("utf-8", "replace").strip() for r in rows]
    if len(out) == 1 and steps > 1:  # said once for the whole episode
        out = out * steps
    if out and len(out) != steps:
        raise CorruptRecord("field of another length", f"{name}: {len(out)} texts in {steps} steps")
    return out or [""] * steps


def _filter_fields(example: Example, card: DatasetCard, features: dict[str, Feature]) -> dict:
    out = {}
    for key in filters.keys(card.filters):
        name = key.removeprefix(EPISODE) if key.startswith(EPISODE) else f"steps/{key}"
        out[key] = example.texts(name) if features[key].dtype == "string" else _numbers(example, name, features[key])
    return out


class _Numbered:
    """Things by the order in which they were first seen."""

    def __init__(self):
        self._numbers: dict = {}

    def number(self, thing) -> int:
        return self._numbers.setdefault(thing, len(self._numbers))

    @property
    def items(self) -> list:
        return list(self._numbers)


def save(part: dict, path: Path) -> None:
    """All or nothing: a part cut short never has its final name."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    said = np.frombuffer(json.dumps(part["said"]).encode(), np.uint8)
    with open(partial, "wb") as f:
        np.savez(f, **{k: v for k, v in part.items() if k != "said"}, said=said)
    partial.replace(path)


@dataclasses.dataclass(frozen=True)
class Job:
    """What one worker does. shards: (number, file, expected episodes) each."""

    card: dict
    url: str
    parts: str
    shards: list
    parent: int = 0

    def run(self) -> None:
        card, store = cards.from_dict(self.card, where="job"), Store(self.url)
        features = rlds.features(store)
        for number, name, expected in self.shards:
            identity = store.identity(name)  # before it is read: a shard replaced meanwhile is seen when the index is opened
            part = shard(store, name, expected, card, features)
            part["said"]["identity"] = identity
            save(part, Path(self.parts) / f"{number:06d}.npz")
        store.close()


def _die_with_parent(parent: int) -> None:
    """The kernel ends this process when the one with that number ends (Linux); elsewhere a thread sees that it has. It may have
    ended before this was asked for: hence the number, which the parent gives."""
    try:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass

    def watch():
        while os.getppid() == parent:
            threading.Event().wait(1.0)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    _die_with_parent(job.parent)
    job.run()
