"""vla-jax demo, or: vla-jax train --config=configs/demo.py --config.data.root=DIR --workdir=runs/demo

Three small robots at one table, on CPU in a few minutes. DIR holds what `python -m vla_jax.tabletop.record DIR` writes.
"""

from vla_jax.config import default


def get_config(arg: str = ""):
    c = default()
    c.data.mixture = arg or "tabletop"
    c.data.image_size = 48
    c.data.views = ("base", "wrist")
    c.data.chunk_s = 0.25
    c.data.holdout = 0.05
    c.model.preset = "demo"
    c.model.dtype = "float32"
    c.tokens.text_model = "tiny"
    c.tokens.describe = False  # 25 tokens more a sample leave 360 samples a second instead of 640, and three names tell these robots apart
    c.tokens.action_vocab = 32
    c.tokens.action_scale = 4.0
    c.pack.rows = 8
    c.pack.length = 192
    c.pack.images = 8
    c.pack.samples = 8
    c.pack.targets = 60
    c.mesh.data = 2
    c.mesh.fsdp = 2
    c.train.steps = 1450
    c.train.lr = 1e-3
    c.train.warmup = 50
    c.train.save_every = 1450
    c.train.log_every = 20
    return c
