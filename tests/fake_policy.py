"""A policy without a model, for tests of what stands around it: as fast or slow, as right or wrong as a test wants."""

import threading
import time

import numpy as np

from vla_jax.data import cards, stats
from vla_jax.deploy import limits
from vla_jax.deploy.served import Served, limits_of
from vla_jax.types import Dim


class FakePolicy:
    """Answers with `act`: every number of the chunk is the sum of the state. calls: of how many observations each call was."""

    def __init__(self, name="tabletop_arm", *, hold=None, seconds=0.0):
        self.card, self.views, self.history = cards.load(name), tuple(cards.load(name).views), 1
        self.image_size, self.steps, self.resize = 48, 2, "linear"
        self.hold, self.seconds, self.calls = hold, seconds, []
        rng = np.random.default_rng(0)
        self.stats = {k: stats.of(rng.normal(size=(100, len(d))).astype(np.float32)) for k, d in self._dims().items()}

    def _dims(self) -> dict[str, tuple[Dim, ...]]:
        return {"state": self.card.state.dims, "action": self.card.action.dims}

    def spec(self):
        return {
            "robot": self.card.robot,
            "control_hz": self.card.control_hz,
            "images": dict.fromkeys(self.views, "uint8"),
            "action": {"steps": self.steps, "dims": [vars(d) for d in self.card.action.dims]},
        }

    def lengths(self, *, lag, instruction):
        return range(32, 32 + instruction + 1, 32)

    def tokens(self, observation):
        """One a character."""
        return 10 + len(observation["prompt"]), len(observation["prompt"])

    def act(self, observations, *, malformed="repair", length=0):
        assert threading.current_thread().name == "model"
        if observations[0]["prompt"].startswith("block"):  # warming up
            return [(np.zeros((self.steps, len(self.card.action.dims)), np.float32), True)] * len(observations)
        self.calls.append([o["prompt"] for o in observations])
        if self.hold is not None:
            assert self.hold.wait(20)
        time.sleep(self.seconds)
        if any(o["prompt"] == "break" for o in observations):
            raise RuntimeError("the model broke")
        out = []
        for o in observations:
            value = np.nan if o["prompt"] == "nan" else float(o["state"].sum())
            out.append((np.full((self.steps, len(self.card.action.dims)), value, np.float32), o["prompt"] != "odd"))
        return out


def served(policy, *, limit=None, names=None, malformed="repair"):
    return Served(policy, limits_of(policy, limit) if isinstance(limit, limits.Settings) else None, names or {}, malformed)


def observation(total=0.0, prompt="push", **more):
    """For tabletop_arm; `total` is what its answer is made of."""
    images = {v: np.zeros((8, 9, 3), np.uint8) for v in ("base", "wrist")}
    return {"images": images, "state": np.array([total, 0, 0], np.float32), "prompt": prompt, **more}


if __name__ == "__main__":  # a process of its own: fake_policy.py SECONDS
    import sys

    from vla_jax.deploy import serve

    sys.exit(
        serve.run(
            {"tabletop_arm": served(FakePolicy(seconds=float(sys.argv[1])))}, serve.Settings(port=0, max_batch=2), serve.read_token("")
        )
    )
