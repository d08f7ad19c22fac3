"""The mesh, and the one table that says over which of its axes each logical axis of an array is divided."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vla_jax.types import Batch, UserError

# here, where every user of JAX passes, so that types.py needs no JAX
jax.tree_util.register_dataclass(Batch, [f.name for f in dataclasses.fields(Batch)], [])

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes. A logical axis that is not named here is replicated."""

    table: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("batch", BATCH),
        ("embed", ("fsdp",)),
        ("vocab", ("tensor",)),
        ("heads", ("tensor",)),
        ("mlp", ("tensor",)),
    )

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
        """Where a mesh axis does not divide a dimension, that dimension is replicated."""
        sizes, table, used = dict(mesh.shape), dict(self.table), set()
        out = []
        for axis, dim in zip(axes, shape, strict=True):
            over = tuple(a for a in table.get(axis, ()) if sizes[a] > 1 and a not in used)
            if not over or dim % math.prod(sizes[a] for a in over):
                out.append(None)
                continue
            used.update(over)
            out.append(over if len(over) > 1 else over[0])
        return PartitionSpec(*out)


RULES = Rules()


def make_mesh(data: int, fsdp: int, tensor: int, *, where: str = "config"):
    """A mesh over all devices of all processes; one of the sizes may be -1.

    Raises: UserError when the sizes do not multiply to the number of devices.
    """
    sizes, total = [data, fsdp, tensor], jax.device_count()
    if any(s < 1 and s != -1 for s in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {dict(zip(AXES, sizes))}: sizes are positive, one of them may be -1 ({where})")
    if -1 in sizes:
        rest = math.prod(s for s in sizes if s > 0)
        sizes[sizes.index(-1)] = max(total // rest, 1)
    if math.prod(sizes) != total:
        raise UserError(
            f"mesh data*fsdp*tensor = {' * '.join(map(str, sizes))} = {math.prod(sizes)}, but there are {total} devices ({where}). Set one axis to -1 to fill it."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def check_batch(rows: int, mesh, *, where: str = "config") -> None:
    """Raises: UserError with the nearest sizes when the rows do not divide over data*fsdp."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    n = data * fsdp
    if rows % n:
        near = sorted({max(n, rows // n * n), (rows // n + 1) * n})
        raise UserError(
            f"batch of pack.rows = {rows} is not divisible by data*fsdp = {data}*{fsdp} = {n} (mesh in {where}). Nearest: {', '.join(map(str, near))}."
        )


def batch_sharding(mesh) -> NamedSharding:
    """Rows over data and fsdp, all else replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def constrain(x, axes: tuple[str | None, ...]):
    """Asks the compiler to lay an activation out by the rules, where a mesh is set (jax.set_mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, RULES.spec(axes, x.shape, mesh))
