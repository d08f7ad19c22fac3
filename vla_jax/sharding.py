"""The mesh, and the one table that says over which of its axes each logical axis of an array is divided."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
        ("replica", ("data",)),  # rows as all devices that share one copy of the weights see them
        ("embed", ("fsdp",)),
        ("vocab", ("tensor",)),
        ("logits", ("tensor", "fsdp")),  # the vocabulary, where probabilities are made
        ("heads", ("tensor",)),
        ("mlp", ("tensor",)),
    )

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
        """Mesh axes that do not divide a dimension are left out, the last first: over them it is replicated."""
        sizes, table, used = dict(mesh.shape), dict(self.table), set()
        out = []
        for axis, dim in zip(axes, shape, strict=True):
            over = tuple(a for a in table.get(axis, ()) if sizes[a] > 1 and a not in used)
            while dim % math.prod(sizes[a] for a in over):
                over = over[:-1]
            used.update(over)
            out.append(over if len(over) > 1 else over[0] if over else None)
        return PartitionSpec(*out)


RULES = Rules()


def divided(data: int, fsdp: int, tensor: int, *, devices: int, slices: int = 1, where: str = "config") -> tuple[int, int, int]:
    """The sizes of the axes over so many devices; one of them may be -1. Of several slices, which reach each other over the data centre's
    network only, `data` takes the way between them.

    Raises: UserError when the sizes do not multiply to the number of devices, or an axis other than data would cross slices.
    """
    sizes = [data, fsdp, tensor]
    if any(s < 1 and s != -1 for s in sizes) or sizes.count(-1) > 1:
        raise UserError(f"mesh {dict(zip(AXES, sizes))}: sizes are positive, one of them may be -1 ({where})")
    if -1 in sizes:
        rest = math.prod(s for s in sizes if s > 0)
        sizes[sizes.index(-1)] = max(devices // rest, 1)
    if math.prod(sizes) != devices:
        raise UserError(
            f"mesh data*fsdp*tensor = {' * '.join(map(str, sizes))} = {math.prod(sizes)}, but there are {devices} devices ({where}). Set one axis to -1 to fill it."
        )
    if sizes[0] % slices:
        raise UserError(
            f"mesh.data is {sizes[0]}, and the {devices} devices are {slices} slices: it must be a multiple of {slices}, so that neither "
            f"fsdp nor tensor crosses the network between them ({where}). Set --config.mesh.data={slices} --config.mesh.fsdp=-1."
        )
    return tuple(sizes)


def make_mesh(data: int, fsdp: int, tensor: int, *, devices=None, where: str = "config"):
    """A mesh over all devices of all processes (or those given), divided as `divided` says. Raises: UserError as it does."""
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
    sizes = divided(data, fsdp, tensor, devices=len(devices), slices=slices, where=where)
    from jax.experimental import mesh_utils

    # one side of a torus may have to serve two axes: 16 x 16 chips as 4 x 64
    inner, split = (sizes[0] // slices, *sizes[1:]), {"allow_split_physical_axes": True}
    if slices == 1:
        made = mesh_utils.create_device_mesh(inner, devices, **split)
    else:
        made = mesh_utils.create_hybrid_device_mesh(inner, (slices, 1, 1), devices, **split)
    return Mesh(made, AXES, axis_types=(AxisType.Auto,) * 3)


def check_batch(rows: int, mesh, *, parts: int = 1, where: str = "config") -> None:
    """parts: train.accumulate. Raises: UserError with the nearest sizes when the rows do not divide over parts and data*fsdp."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    n = data * fsdp * parts
    if rows % n:
        near = sorted({max(n, rows // n * n), (rows // n + 1) * n})
        by = "data*fsdp" + ("*train.accumulate" if parts > 1 else "")
        product = f"{data}*{fsdp}" + (f"*{parts}" if parts > 1 else "")
        raise UserError(
            f"batch of pack.rows = {rows} is not divisible by {by} = {product} = {n} (mesh in {where}). Nearest: {', '.join(map(str, near))}."
        )


def batch_sharding(mesh) -> NamedSharding:
    """Rows over data and fsdp, all else replicated."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def divides(axis: str, size: int) -> bool:
    """Whether all mesh axes of a logical axis divide a dimension of this size, on the mesh that is set; True without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or size % math.prod(mesh.shape[a] for a in dict(RULES.table)[axis]) == 0


def constrain(x, axes: tuple[str | None, ...]):
    """Asks the compiler to lay an activation out by the rules, where a mesh is set (jax.set_mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, RULES.spec(axes, x.shape, mesh))
