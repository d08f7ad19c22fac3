"""vla-jax train --config=configs/oxe_3b.py:size=3b,chips=v5e-256 --config.data.root=gs://bucket/oxe --workdir=/shared/runs/oxe

Pretraining on Open X-Embodiment with one dial: how large a model on which chips. Width, batch, mesh, learning rate and length of the run
follow from these two, each with its derivation below. What it costs: vla-jax compile-check with the same --config and --topology=v5e:16x16.
"""

import math

from vla_jax.config import default

# Rows a device: enough that a step computes for longer than it sends, and few enough that all products fit in memory and need not be made
# again (`vla-jax compile-check`, docs/scaling.md). h200: one was measured at 3B, with remat=full; there no compiler is asked beforehand.
ROWS = {
    "v5e": {"300m": 12, "1b": 8, "3b": 3},
    "v6e": {"300m": 32, "1b": 14, "3b": 8},
    "v5p": {"300m": 64, "1b": 32, "3b": 16},
    "tpu7x": {"300m": 64, "1b": 32, "3b": 16},
    "h200": {"300m": 64, "1b": 32, "3b": 16},
}
SLICE = {"v5e": 256, "v6e": 256, "v5p": 6144, "tpu7x": 9216, "h200": 8}  # chips that are near each other, at most
WIDTH = {"300m": 1024, "1b": 1152, "3b": 2048}  # of the decoder: the presets of vla_jax/models/presets.py
FSDP = 64  # weights are divided this far: 1152, 2048 and 257152 all divide by it, and 12 bytes of state a parameter are then 0.55 GiB at 3B
SAMPLES = (
    100e6  # that the run sees: Octo saw 614 million with 93 million parameters, OpenVLA and pi0 start from a trained decoder and see fewer
)


def get_config(arg: str = "size=3b,chips=v5e-64"):
    given = [item.partition("=")[::2] for item in arg.split(",") if item]
    asked = {"size": "3b", "chips": "v5e-64"} | dict(given)
    if set(asked) != {"size", "chips"} or len(dict(given)) != len(given):
        raise ValueError(f"{arg!r}: write size=NAME,chips=KIND-NUMBER, each at most once")
    size, (kind, _, count) = asked["size"], asked["chips"].partition("-")
    if kind not in ROWS or not count.isdigit() or int(count) < 1 or size not in WIDTH:
        raise ValueError(f"{arg!r}: size is one of {', '.join(WIDTH)}; chips are KIND-NUMBER, KIND one of {', '.join(ROWS)}")
    if int(count) > SLICE[kind] and int(count) % SLICE[kind]:
        raise ValueError(f"{arg!r}: more than {SLICE[kind]} chips of {kind} are several slices of so many: take a multiple of it")
    devices = int(count) * (2 if kind == "tpu7x" else 1)  # a 7x has two cores, each of which JAX calls a device
    c = default()
    c.data.mixture = "octo_oxe_magic_soup"
    c.data.views = ("base", "wrist", "wrist_right")  # three at most, as pi0 has them
    c.model.preset = size
    c.model.vocab = 257152  # PaliGemma's, so that its weights fit (model.init); with a text model of fewer pieces the rest is not used
    c.model.remat = "full" if kind == "h200" else "dots"  # dots: computes next to nothing twice, where that is known to fit

    # A row holds one sample of three cameras, or three of one: 3 * 256 tokens of images and 256 of text, state and actions.
    c.pack.length, c.pack.images, c.pack.samples, c.pack.targets = 1024, 3, 4, 192
    c.pack.rows = devices * ROWS[kind][size]
    c.pack.group = math.gcd(c.pack.rows, 4)

    # Weights are divided over FSDP chips of one slice, or all of it where that is fewer; what is left are copies, which exchange gradients
    # only and so may be slices apart.
    near = devices // -(-int(count) // SLICE[kind])  # devices of one slice
    c.mesh.fsdp = next(n for n in range(min(FSDP, near), 0, -1) if near % n == 0 and FSDP % n == 0)
    c.mesh.data = devices // c.mesh.fsdp

    # Octo's rate, 3e-4 at width 768 and 2,048 samples a step, by 1 / width (Yang et al., "Tensor Programs V", 2022) and the root of the
    # batch (Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", 2022), at most twice it. A row holds 1.8
    # samples of this mixture, on average.
    samples = 1.8 * c.pack.rows
    c.train.lr = 3e-4 * (768 / WIDTH[size]) * min((samples / 2048) ** 0.5, 2.0)
    c.train.steps = max(1000, int(round(SAMPLES / samples, -2)))
    c.train.warmup = min(2000, c.train.steps // 10)
    c.train.weight_decay = 1e-4
    c.train.spike = 8.0
    c.train.log_every, c.train.save_every, c.train.keep = 50, 1000, 3
    c.train.eval_every, c.train.eval_frames = 5000, 32
    return c
