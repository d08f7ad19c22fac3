"""From what a step computes, moves and sends to how long it takes: the bounds of a chip, and one stated guess of how near it comes."""

from __future__ import annotations

import dataclasses

from vla_jax.hardware import GIB, Chip

# Of the peak, while matrix products run. MaxText publishes 58 % MFU for Gemma 2B on v5e-256 with some recomputation besides; this project's
# 3B step reaches 0.60 of an H200's own matrix product, recomputation counted (docs/bench/model.jsonl).
EFFICIENCY = 0.65


@dataclasses.dataclass(frozen=True)
class Step:
    """Of one step. model, hardware: FLOP by flops.RULE and as programmed, over all devices; state_bytes: of parameters, optimizer and EMA
    on a device; weight_bytes: of all weights in the compute dtype; passes: how often they are gathered; ici, dcn: bytes that a device
    receives from its slice and from others."""

    model: float
    hardware: float
    devices: int
    state_bytes: float
    weight_bytes: float
    passes: int
    ici: float
    dcn: float

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds that each part takes by itself at the chip's limits."""
        traffic = 2 * self.state_bytes + 2 * self.weight_bytes * self.passes  # read and written; gathered weights are, too
        return {
            "compute": self.hardware / self.devices / chip.peak,
            "memory": traffic / chip.hbm_rate,
            "ici": self.ici / (2 * chip.link),  # one ring, both ways
            "dcn": self.dcn / chip.dcn,
        }

    def seconds(self, chip: Chip) -> tuple[float, float]:
        """(the largest bound, the predicted step): the latter with EFFICIENCY on the compute and all else hidden behind it, or the other
        way round."""
        bounds = self.bounds(chip)
        return max(bounds.values()), max(bounds["compute"] / EFFICIENCY, bounds["memory"], bounds["ici"], bounds["dcn"])


ASSUMPTIONS = (
    f"matrix products at {EFFICIENCY:.0%} of peak while they run, and the largest of compute, memory, ICI and DCN hides the others",
    "ICI: every byte over one ring in both directions, though a torus has two or three; memory: state and gathered weights, no activations",
    "MFU: matrix products of all slots of the batch, no recomputation; HFU: with it",
)


def table(r: dict) -> str:
    """The report of train.compile_check, for people."""
    rows: list[tuple[str, str]] = []
    add = lambda name, text: rows.append((name, text))
    gib = lambda b: f"{b / GIB:.2f} GiB"
    add("config", r["config"])
    cores = "" if r["chips"] == r["devices"] else f" of {r['devices'] // r['chips']} devices"
    each = "chip" if not cores else "device"
    add(
        "chips",
        f"{r['chips']} x {r['chip']}{cores}" + (f" in {r['slices']} slices" if r["slices"] > 1 else "") + f", mesh {_mesh(r['mesh'])}",
    )
    add("model", f"{r['preset']}, {r['parameters'] / 1e9:.2f}B parameters, remat {r['remat']}, {r['optimizer']}")
    add(
        "batch",
        f"{r['rows']} rows of {r['length']} tokens and {r['images']} images" + (f", in {r['parts']} parts" if r["parts"] > 1 else ""),
    )
    m = r["memory"]
    add(f"memory a {each}", "")
    for kind in ("parameters", "optimizer", "ema", "batch", "activations"):
        if m.get(kind):
            add(f"  {kind}", gib(m[kind]))
    add("  together", f"{gib(m['total'])} of {gib(m['hbm'])}" + ("" if r["fits"] else ": DOES NOT FIT"))
    if m.get("host"):
        add("  on the host", gib(m["host"]))
    for leaf in r["replicated"][:6]:
        add(
            "  not divided",
            f"{leaf['path']} {tuple(leaf['shape'])}: {leaf['axis']}={leaf['ways']} does not divide it, +{gib(leaf['bytes'])}",
        )
    if len(r["replicated"]) > 6:
        add("", f"and {len(r['replicated']) - 6} more, +{gib(sum(x['bytes'] for x in r['replicated'][6:]))}")
    if r["better_mesh"]:
        add("  better", f"{_mesh(r['better_mesh'])}: state of {gib(r['better_mesh']['state_bytes'])} a {each} instead of {gib(m['state'])}")
    f = r["flops"]
    add("FLOP a step", f"{f['model'] / 1e12:,.0f} T of the model, {f['hardware'] / 1e12:,.0f} T as programmed")
    if r["collectives"]:
        add(f"received a {each}", "")
        for kind, (ici, dcn) in r["collectives"].items():
            add(f"  {kind}", gib(ici) + (f", and {gib(dcn)} from other slices" if dcn else ""))
    if r["fits"]:
        t = r["bounds"]
        add("bounds", ", ".join(f"{k} {v * 1e3:,.0f} ms" for k, v in t.items() if v))
        add("roofline", f"{r['roofline_s'] * 1e3:,.0f} ms a step")
        add("predicted", f"{r['step_s'] * 1e3:,.0f} ms a step, MFU {r['mfu']:.0%}, HFU {r['hfu']:.0%}")
        add("", f"{r['samples_per_s']:,.0f} samples/s of about {r['sample_tokens']:.0f} tokens, {r['tokens_per_s']:,.0f} tokens/s")
        add("the run", f"{r['steps']:,} steps: {r['days']:.2f} days, {r['chip_hours']:,.0f} chip-hours")
    if r.get("largest_rows"):
        add("largest batch", f"{r['largest_rows']} rows fit: {r['largest_rows'] // (r['devices'] // r['mesh']['tensor'])} a {each}")
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in rows]
    return "\n".join(lines + [f"assumed: {a}" for a in ASSUMPTIONS if r["fits"]])


def _mesh(sizes: dict) -> str:
    return " ".join(f"{axis}={sizes[axis]}" for axis in ("data", "fsdp", "tensor"))


def advice(r: dict) -> str:
    """What to say of a report that does not fit."""
    m = r["memory"]
    found = [
        f"  {x['change']}: {x['report']['samples_per_s']:,.0f} samples/s predicted, {x['report']['memory']['total'] / GIB:.1f} GiB"
        for x in r.get("remedies", [])
    ]
    said = f"{r['config']} does not fit on {r['chips']} x {r['chip']}: {r['why']}"
    if found:
        return "\n".join([f"{said}. Each of these fits, and was compiled; the fastest first:", *found])
    if m["state"] > 0.8 * m["hbm"]:
        need = int(r["chips"] * m["state"] / (0.6 * m["hbm"])) + 1
        return f"{said}. Parameters and optimizer alone take {m['state'] / GIB:.1f} of {m['hbm'] / GIB:.1f} GiB a chip: take {need} chips or more, or a smaller model."
    return f"{said}. Nothing that was tried fits: take more chips, a smaller model or shorter rows (pack.length, pack.images)."
