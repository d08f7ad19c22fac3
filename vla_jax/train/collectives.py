"""What a compiled program sends between devices: read from its text, loops counted as often as they run."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERATION = re.compile(rf"= (?P<out>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>.*)$")
_BETWEEN = re.compile(r"= (?P<out>.*?) send\(.*_xla_megascale_transfer_type=\"(?P<kind>\w+)\"")
_CALLED = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """bytes: what a device receives each time; times: how often in a run of the program; across: whether a group of devices that take
    part spans several slices; dtypes: of what is sent; name: of the operation in the model that asked for it."""

    kind: str
    bytes: float
    times: int
    group: int
    across: bool
    dtypes: tuple[str, ...]
    name: str


def read(text: str, devices: int, slices: int = 1) -> list[Collective]:
    """The collectives in a compiled program's text (jax.stages.Compiled.as_text), of so many devices, those of a slice in a row.

    A collective that the compiler has split into steps beside other work (asynchronous fusions) stands there several times under one
    channel, and counts once. What crosses slices is sent through the host: an operation `send` that says which collective it is. The
    TPU's reduce-scatters are fusions of that name around an all-reduce, and count as what they are.
    """
    bodies, entry = _computations(text)
    times = _multiplicity(bodies, entry)
    found, seen = [], set()
    for name, lines in bodies.items():
        for line in lines:
            if times.get(name) and (between := _BETWEEN.search(line)):
                found.append(_between(between, line, times[name], slices))
            match = _OPERATION.search(line)
            if not match or not times.get(name):
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            if channel and (match["kind"], channel[1]) in seen:
                continue
            if channel:
                seen.add((match["kind"], channel[1]))
            found.append(_collective(match, line, times[name], devices, slices, scattered="all-reduce-scatter" in name))
    return [c for c in found if c.bytes]


def _collective(match, line: str, times: int, devices: int, slices: int, *, scattered: bool) -> Collective:
    kind, out = match["kind"], match["out"]
    groups = _groups(line, devices)
    size = max(map(len, groups))
    arrays = _arrays(out)
    if match["start"]:  # (what goes in, what comes out, and handles)
        arrays = [a for a in arrays if a != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    total = _size(arrays)
    others = (size - 1) / size if size > 1 else 0.0
    moved = {
        "all-gather": total * others,
        "reduce-scatter": total * (size - 1),  # what comes out is a device's part alone
        "all-reduce": 2 * total * others,
        "all-to-all": total * others,
        "collective-permute": float(total),
    }[kind]
    if scattered and kind == "all-reduce":
        kind, moved = "reduce-scatter", total * others
    per_slice = devices // slices
    across = any(len({d // per_slice for d in group}) > 1 for group in groups)
    named = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, moved, times, size, across, tuple(sorted({d for d, _ in arrays})), named[1] if named else "")


def _between(match, line: str, times: int, slices: int) -> Collective:
    """What hosts exchange for a device: a sum of its part over the slices, there and back; or the parts of the others."""
    kind = match["kind"].lower().replace("_", "-")
    arrays = [a for a in _arrays(match["out"]) if a != ("u32", "")]
    moved = _size(arrays) * (slices - 1) * (2 / slices if kind == "all-reduce" else 1)
    named = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, moved, times, slices, True, tuple(sorted({d for d, _ in arrays})), named[1] if named else "")


def _arrays(out: str) -> list[tuple[str, str]]:
    """(dtype, dims) of each array in an operation's result."""
    plain = re.sub(r"/\*.*?\*/", "", re.sub(r"\{[^{}]*\}", "", out))
    return [(dtype, dims) for dtype, dims in _ARRAY.findall(plain) if dtype in _BYTES]


def _size(arrays: list[tuple[str, str]]) -> float:
    return float(sum(_BYTES[dtype] * math.prod(int(d) for d in dims.split(",") if d) for dtype, dims in arrays))


def _groups(line: str, devices: int) -> list[list[int]]:
    """The devices that take part together. Three ways of writing them: listed, a reshaped count, and axes of a mesh."""
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](T\(([\d,]+)\))?", line):
        ints = lambda s: [int(n) for n in s.split(",")]
        ids = np.arange(devices).reshape(ints(counted[2]))
        ids = ids.transpose(ints(counted[4])) if counted[3] else ids
        return ids.reshape(ints(counted[1])).tolist()
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? ?\{([^}]*)\}", line):
        axes = {name: int(size) for name, size in re.findall(r"'([\w.-]+)'=(\d+)", mesh[1])}
        over = [name.strip().strip("'").partition(":")[0] for name in mesh[2].split(",")]
        ids = np.arange(devices).reshape(list(axes.values()))
        order = [i for i, name in enumerate(axes) if name not in over] + [i for i, name in enumerate(axes) if name in over]
        return ids.transpose(order).reshape(-1, math.prod(axes[name] for name in over)).tolist()
    return [list(range(devices))]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _multiplicity(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs. A loop runs as often as its condition's constant says (all of ours count from zero)."""
    calls: dict[str, list[tuple[str, int]]] = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    order: list[str] = []
    seen: set[str] = set()
    stack = [(entry, iter(calls[entry]))]
    seen.add(entry)
    while stack:  # callers before what they call
        name, left = stack[-1]
        step = next(left, None)
        if step is None:
            order.append(name)
            stack.pop()
        elif step[0] not in seen:
            seen.add(step[0])
            stack.append((step[0], iter(calls[step[0]])))
    times = dict.fromkeys(order, 0) | {entry: 1}
    for name in reversed(order):
        for called, n in calls[name]:
            times[called] += times[name] * n
    return times


def _calls(lines: list[str], bodies: dict[str, list[str]]):
    for line in lines:
        named = dict(_CALLED.findall(line))
        trips = _trips(line, bodies.get(named.get("condition", ""), []), bodies.get(named.get("body", ""), [])) if " while(" in line else 1
        for called in (*named.values(), *(b.strip().lstrip("%") for b in ",".join(_BRANCHES.findall(line)).split(",") if b)):
            if called in bodies:
                yield called, trips


def _trips(line: str, condition: list[str], body: list[str]) -> int:
    """Times around a loop: its limit, from the condition, over what the body adds to the counter (unrolled loops take several at a time)."""
    if known := re.search(r"known_trip_count[^\d]*(\d+)", line):
        return int(known[1])
    limit = max((int(n) for text in condition for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)), default=1)
    counter = next((m[1] for text in condition if (m := re.search(r"[su]32\[\]\S* get-tuple-element\(.*index=(\d+)", text))), None)
    last = next((text for text in body if "ROOT" in text and " tuple(" in text), "")
    after = re.findall(r"%([\w.-]+)", last.partition(" tuple(")[2].partition("), ")[0])
    if counter is None or int(counter) >= len(after):
        return limit
    values = {m[1]: int(m[2]) for text in body if (m := re.search(r"%([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)", text))}
    added = next((text for text in body if f"%{after[int(counter)]} = " in text), "")
    steps = [values[name] for name in re.findall(r"%([\w.-]+)", added.partition(" add(")[2].partition(")")[0]) if name in values]
    return -(-limit // max(steps[0] if steps else 1, 1))
