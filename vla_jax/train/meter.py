"""Where a run's time goes, and what it achieves: shares of the wall clock, rates, utilisation, memory."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from vla_jax import distributed, hardware
from vla_jax.models import flops
from vla_jax.models.presets import VLAConfig
from vla_jax.train import metrics

_IMPORTED = time.perf_counter()


class Meter:
    """Counts seconds by what the loop waits for; what is left of the wall clock is the device's.

    started: when the run began, whichever process that was, as its checkpoint says, else its first line; productive: seconds of steps
    whose result is still there.
    """

    def __init__(self, workdir: Path, productive: float = 0.0, started: float = 0.0):
        # one clock for all
        self.started = distributed.broadcast_json(started or metrics.began(workdir) or time.time() - productive)
        self.productive = productive
        self._window()

    def _window(self) -> None:
        self._since, self._spent, self.steps = time.perf_counter(), {"data": 0.0, "checkpoint": 0.0, "eval": 0.0, "compile": 0.0}, 0

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """what: data, checkpoint, eval, or compile (of the first step)."""
        before = time.perf_counter()
        yield
        self._spent[what] += time.perf_counter() - before

    def first(self) -> dict:
        """What the first step waited for, in seconds: {batch_s, compile_s}."""
        return {"batch_s": self._spent["data"], "compile_s": self._spent["compile"]}

    def so_far(self) -> float:
        """Productive seconds up to now."""
        return self.productive + max(time.perf_counter() - self._since - sum(self._spent.values()), 0.0)

    def window(self) -> dict:
        """Of the steps since the last call, of which the last one's results have been read: {step_s, time: shares of the wall clock
        (data, checkpoint, eval, compile, device), goodput, seconds, productive}. goodput is the share of the time since the run began
        that went into steps that count: not into waiting, compiling, being away, or steps that were lost and done again."""
        wall = time.perf_counter() - self._since
        device = max(wall - sum(self._spent.values()), 0.0)
        self.productive += device
        shares = {name: s / wall for name, s in (*self._spent.items(), ("device", device))}
        steps, since_start = max(self.steps, 1), max(time.time() - self.started, 1e-9)
        self._window()
        return {"step_s": device / steps, "seconds": wall, "time": shares, "goodput": min(self.productive / since_start, 1.0)}


def utilisation(cfg: VLAConfig, work: dict, seconds: float) -> dict:
    """{model_tflops: a second and device, by flops.RULE; mfu: its share of the chip's peak, where that is known}, of one step."""
    rate = flops.model(cfg, work) / seconds / jax.device_count()
    chip = hardware.of_kind(jax.devices()[0].device_kind)
    return {"model_tflops": rate / 1e12} | ({"mfu": rate / chip.peak} if chip else {})


def age() -> float:
    """Seconds since this process began, before its imports; since this module was imported where the system does not tell."""
    try:
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - began
    except (OSError, ValueError, IndexError):
        return time.perf_counter() - _IMPORTED


def memory() -> dict:
    """Largest so far, in GiB: this process's on the host, and on its fullest device where the device tells."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB on Linux
    out = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / hardware.GIB}
    told = [d.memory_stats() or {} for d in jax.local_devices()]
    if peaks := [t["peak_bytes_in_use"] for t in told if "peak_bytes_in_use" in t]:
        out["device_gib"] = max(peaks) / hardware.GIB
    return out


class Profile:
    """A trace of some steps for TensorBoard's profiler or Perfetto. Use as a context manager."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, self._steps, self._running = folder, steps or (0, 0), False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *exc) -> None:
        self._stop()

    def before(self, step: int) -> None:
        if self._steps[0] <= step <= self._steps[1] and not self._running:  # a run that went on from between them, too
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, results) -> None:
        if self._running and step >= self._steps[1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
