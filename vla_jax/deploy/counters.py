"""What a server counts, as Prometheus reads it. Written here because prometheus_client's summaries know no quantiles in Python."""

from __future__ import annotations

import collections
import os
import threading
from pathlib import Path

import numpy as np

_QUANTILES = (0.5, 0.9, 0.99)
_WINDOW = 4096  # latest latencies that the quantiles are of


class Counters:
    """Counts and durations by labels. Safe from several threads; of bounded size, since callers choose labels from what they know."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: collections.Counter[tuple] = collections.Counter()
        self._latest: dict[str, collections.deque] = {}
        self._total: collections.Counter[str] = collections.Counter()
        self._seen: collections.Counter[str] = collections.Counter()

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        with self._lock:
            self._counts[(name, tuple(sorted(labels.items())))] += amount

    def took(self, name: str, seconds: float) -> None:
        with self._lock:
            self._latest.setdefault(name, collections.deque(maxlen=_WINDOW)).append(seconds)
            self._total[name] += seconds
            self._seen[name] += 1

    def text(self, gauges: dict[str, float]) -> str:
        """The exposition format, version 0.0.4: counters *_total, summaries *_seconds, and the gauges that are given."""
        with self._lock:
            counts, latest = dict(self._counts), {k: np.array(v) for k, v in self._latest.items()}
            total, seen = dict(self._total), dict(self._seen)
        out = []
        for name in sorted({n for n, _ in counts}):
            out.append(f"# TYPE {name}_total counter")
            out += [f"{name}_total{_labels(labels)} {value:g}" for (n, labels), value in sorted(counts.items()) if n == name]
        for name, values in sorted(latest.items()):
            out.append(f"# TYPE {name}_seconds summary")
            at = np.quantile(values, _QUANTILES)
            out += [f'{name}_seconds{{quantile="{q:g}"}} {v:.6f}' for q, v in zip(_QUANTILES, at)]
            out += [f"{name}_seconds_sum {total[name]:.6f}", f"{name}_seconds_count {seen[name]}"]
        for name, value in sorted(gauges.items()):
            out += [f"# TYPE {name} gauge", f"{name} {value:.17g}"]
        return "\n".join(out) + "\n"


def _labels(labels: tuple) -> str:
    escaped = lambda v: str(v).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return "{" + ",".join(f'{k}="{escaped(v)}"' for k, v in labels) + "}" if labels else ""


def resident_bytes(pid: int | str = "self") -> int:
    """Memory of a process; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
