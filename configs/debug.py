"""vla-jax train --config=configs/debug.py:bridge --config.data.root=DATA --workdir=runs/debug

The smallest run: a debug-size model on one dataset, on CPU, in under a minute. The argument names the card or mixture.
"""

from vla_jax.config import default


def get_config(arg: str = "bridge"):
    c = default()
    c.data.mixture = {"bridge": "bridge_dataset", "": "bridge_dataset"}.get(arg, arg)
    c.data.image_size = 48
    c.data.views = ("base",)
    c.model.preset = "debug"
    c.model.dtype = "float32"
    # 20 training episodes: longer chunks and a larger vocabulary would only be learned by heart
    c.data.chunk_s = 0.5
    c.data.holdout = 0.2
    c.tokens.text_model = "tiny"
    c.tokens.action_vocab = 24
    c.tokens.action_scale = 4.0
    c.pack.rows = 8
    c.pack.length = 256
    c.pack.images = 4
    c.pack.samples = 4
    c.pack.targets = 160
    c.train.steps = 60
    c.train.lr = 2e-3
    c.train.warmup = 20
    c.train.save_every = 30
    return c
