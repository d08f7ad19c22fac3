"""Words for whoever reads the log."""

from __future__ import annotations

import contextlib
import sys


def say(text: str) -> None:
    """A line on stderr, at once; a log that cannot be written, on a full disk say, costs no run."""
    with contextlib.suppress(OSError):
        print(f"vla-jax: {text}", file=sys.stderr, flush=True)
