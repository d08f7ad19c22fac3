"""Runs that are stopped, hang, or find their checkpoints damaged; one process here, several in test_faults.py."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_jax.train import checksums, interruption


def plain(x: np.ndarray) -> int:
    """The rule of checksums in numpy and Python integers, one element after another."""
    bits = x.view(f"u{x.dtype.itemsize}").reshape(-1) if x.dtype != bool else x.reshape(-1)
    total = 0
    for i, b in enumerate(bits):
        x = int(b) ^ (i * 0x9E3779B1 + 0x7F4A7C15) % 2**32
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        total += x ^ x >> 16
    return total % 2**32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint32", "bool", "uint8"])
def test_checksums_against_plain_python(dtype):
    x = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 7)) * 9).astype(dtype))
    assert checksums.of({"a": jnp.asarray(x), "b": {"c": jnp.asarray(x[0, 0, 0])}}) == {"a": plain(x), "b/c": plain(x[0, 0, :1])}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), at=st.integers(0, 104), bit=st.integers(0, 31))
def test_any_flipped_bit_is_seen(seed, at, bit):
    x = np.random.default_rng(seed).integers(0, 2**32, (3, 5, 7), dtype=np.uint32)
    y = x.copy()
    y.reshape(-1)[at] ^= np.uint32(1 << bit)
    assert checksums.of({"x": jnp.asarray(x)}) != checksums.of({"x": jnp.asarray(y)})


def test_changes_of_several_elements_are_seen():
    """The highest bits, which a plain weighted sum loses: two signs, all signs; one bit of two elements; elements that changed places."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 32)).astype(np.float32)
    of = lambda y: checksums.of([jnp.asarray(y)])["0"]
    odd = [-x, x[::-1].copy(), x * np.where(rng.random(x.shape) < 0.5, 1, -1).astype(np.float32)]
    for bit in range(32):
        for _ in range(8):
            bits = x.copy().view(np.uint32).reshape(-1)
            bits[rng.choice(bits.size, 2, replace=False)] ^= np.uint32(1 << bit)
            odd.append(bits.view(np.float32).reshape(x.shape))
    assert of(x) not in {of(y) for y in odd}


def test_checksums_do_not_depend_on_the_division():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = np.random.default_rng(1).normal(size=(8, 12)).astype(np.float32)
    spec = lambda *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)))
    assert {checksums.of([spec(*axes)])["0"] for axes in ((), ("a",), (None, "b"), ("b", "a"), (("a", "b"),))} == {plain(x)}


def test_what_does_not_move_ends_with_its_stacks():
    """In a process of its own, which is really ended."""
    program = """
import threading, time
from vla_jax.train.interruption import Watch
with Watch(0.4) as watch:
    for step in range(4):
        watch.beat(step, "fine")
        time.sleep(0.2)
    watch.beat(7, "waiting for a batch")
    def stuck_here():
        time.sleep(60)
    threading.Thread(target=stuck_here, daemon=True).start()
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == interruption.HUNG, done.stderr
    assert "step 7, waiting for a batch" in done.stderr and "stuck_here" in done.stderr and "train.hang_s=0.4" in done.stderr


def test_a_watch_that_is_left_or_off_ends_nothing():
    ended = []
    with interruption.Watch(0.05, end=ended.append):
        pass
    with interruption.Watch(0.0, end=ended.append):
        time.sleep(0.2)
    time.sleep(0.2)
    assert not ended
    with interruption.Watch(0.05, end=ended.append) as watch:
        watch._thread.join(5)
    assert ended == [interruption.HUNG]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_and_handlers_are_put_back(number, capsys):
    before = signal.getsignal(number)
    with interruption.Interruption() as asked:
        assert not asked.reached(1)
        os.kill(os.getpid(), number)
        assert asked.reached(2) and asked.reached(3)
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(1)
    assert signal.getsignal(number) is before
    assert signal.Signals(number).name in capsys.readouterr().err


def test_no_handlers_off_the_main_thread():
    before, found = signal.getsignal(signal.SIGTERM), []

    def work():
        with interruption.Interruption() as asked:
            found.append((asked.reached(1), signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, True)]


def test_versions_are_agreed(monkeypatch):
    from vla_jax import distributed
    from vla_jax.types import UserError

    distributed.agree_versions()
    other = lambda mine: [mine, {**mine, "jax": "0.1"}, {k: v for k, v in mine.items() if k != "optax"}]
    monkeypatch.setattr(distributed, "gather_json", lambda value: other(json.loads(json.dumps(value))))
    with pytest.raises(UserError, match=r"jax is .* on process 0, 0.1 on process 1; optax is .* on process 0, missing on process 2"):
        distributed.agree_versions()
