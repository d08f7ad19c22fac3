"""From this host's numpy rows to one global array on the mesh."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from vla_jax.sharding import batch_sharding
from vla_jax.types import Batch


def to_device(batch: Batch, mesh) -> Batch:
    """This process's rows of every field -> global arrays, rows over data and fsdp. `sample_id` stays behind (i64)."""
    sharding = batch_sharding(mesh)
    batch = dataclasses.replace(batch, sample_id=None)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def gather_states(states: np.ndarray) -> np.ndarray:
    """The stream states of all hosts, i64[groups ..], from each host's share. Bytes travel, since i64 would be cut to i32."""
    if jax.process_count() == 1:
        return states
    from jax.experimental import multihost_utils

    raw = multihost_utils.process_allgather(np.frombuffer(states.tobytes(), np.uint8))
    return np.frombuffer(np.asarray(raw).tobytes(), np.int64).reshape(-1, *states.shape[1:])
