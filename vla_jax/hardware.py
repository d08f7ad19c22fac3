"""What a chip can do, as its maker says: the ceilings that a step is held against. No JAX."""

from __future__ import annotations

import dataclasses
import math

from vla_jax.types import UserError

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Of one JAX device, of which a chip has `cores` (one, but for 7x). peak: bfloat16 FLOP/s of matrix products; hbm_bytes, hbm_rate: size
    and bytes/s of its memory; link: bytes/s one way to a neighbour, of which there are two along each of `torus` dimensions; dcn: bytes/s
    one way to other slices, a device's share of its host's network; slice: chips of the largest slice."""

    name: str
    kinds: tuple[str, ...]  # jax.Device.device_kind
    peak: float
    hbm_bytes: float = 0
    hbm_rate: float = 0
    link: float = 0
    torus: int = 0
    dcn: float = 0
    slice: int = 0
    cores: int = 1


# Google's specifications of Cloud TPU v5e, v5p, v6e and 7x. Per-link rates are the published bidirectional total of a chip, divided by
# links and directions. HBM is what the compiler lets a program have (it says so where a program does not fit).
TPUS = {
    "v5e": Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 819e9, 50e9, 2, 3.1e9, 256),
    "v5p": Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765e9, 100e9, 3, 6.2e9, 6144),
    "v6e": Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1640e9, 100e9, 2, 12.5e9, 256),
    "tpu7x": Chip("tpu7x", ("TPU7x", "TPU v7x"), 2307e12 / 2, 94.7 * GIB, 7370e9 / 2, 50e9, 3, 6.2e9, 9216, cores=2),
}
# NVIDIA's dense bfloat16 rates: of the SXM boards, and before them of the others that have the same beginning of a name
GPUS = {
    "H100 PCIe": Chip("H100 PCIe", ("NVIDIA H100 PCIe",), 756e12),
    "H100 NVL": Chip("H100 NVL", ("NVIDIA H100 NVL",), 835e12),
    "H200 NVL": Chip("H200 NVL", ("NVIDIA H200 NVL",), 835e12),
    "A100": Chip("A100", ("NVIDIA A100",), 312e12),
    "H100": Chip("H100", ("NVIDIA H100",), 989e12),
    "H200": Chip("H200", ("NVIDIA H200",), 989e12),
    "B200": Chip("B200", ("NVIDIA B200",), 2250e12),
}


def of_kind(kind: str) -> Chip | None:
    """The chip of a jax.Device.device_kind; None for a CPU and whatever is not in the tables."""
    found = next((c for c in TPUS.values() if kind in c.kinds), None)
    return found or next((c for c in GPUS.values() if kind.startswith(c.kinds[0])), None)


def topology(text: str) -> tuple[Chip, tuple[int, ...]]:
    """`v5e:8x8` -> (the chip, (8, 8)). Raises: UserError."""
    name, _, shape = text.partition(":")
    sides = shape.split("x")
    if name not in TPUS or not all(s.isdecimal() and int(s) for s in sides):
        raise UserError(f"--topology {text!r}: write a chip and its sides, such as v5e:8x8 or v5p:4x4x4; chips: {', '.join(TPUS)}")
    if len(sides) != TPUS[name].torus:
        raise UserError(f"--topology {text!r}: {name} is connected in {TPUS[name].torus} dimensions, and this has {len(sides)}")
    if (chips := math.prod(map(int, sides))) > TPUS[name].slice:
        raise UserError(
            f"--topology {text!r} is {chips:,} chips, and the largest slice of {name} has {TPUS[name].slice:,}: take several, with --slices"
        )
    return TPUS[name], tuple(map(int, sides))
