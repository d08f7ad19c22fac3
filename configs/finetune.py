"""vla-jax train --config=configs/finetune.py:how=lora --config.model.init=runs/demo/export --config.data.root=DIR --workdir=runs/omni

A trained policy, taught a new robot. Fork me: copy this file, put your card in data/cards (`vla-jax data draft`), name it below, and go through
the three parts from top to bottom. how: full, lora, expert or frozen; mix=true trains on the data of before, too.

Here: the policy of `vla-jax demo` learns tabletop_omni, which has another number of action dimensions, another rate and another camera than
its three robots. DIR holds what `python -m vla_jax.tabletop.record DIR --robots tabletop_omni` writes.
"""

from vla_jax.config import default


def get_config(arg: str = "how=full"):
    asked = {"how": "full", "mix": "false"} | dict(item.partition("=")[::2] for item in arg.split(",") if item)
    if set(asked) != {"how", "mix"} or asked["how"] not in ("full", "lora", "expert", "frozen") or asked["mix"] not in ("true", "false"):
        raise ValueError(f"{arg!r}: write how=full|lora|expert|frozen and, if you like, ,mix=true")
    c = default()

    # 1. What has to be as it was in the policy: its train config, or `config` in its policy.json, says it. The first four are compared and a
    # difference is refused; another value of the others loses robots that are not trained on here (the run says which, and why).
    c.model.preset = "demo"
    c.tokens.layout = "native"
    c.tokens.state = "continuous"
    c.data.history = 1
    c.data.image_size = 48
    c.data.chunk_s = 0.25  # a robot of another rate has another number of steps in it
    c.data.views = ("base", "wrist", "side")  # cameras may come behind those of before; a robot sees those that its card has
    c.tokens.describe = False
    c.tokens.action = "fast"
    c.model.dtype = "float32"

    # 2. The data. A card for the new robot; a mixture of old and new (data/mixtures/tabletop_omni_and_before.yaml) where the old is not to
    # be forgotten. A robot that the policy knows keeps the statistics that it was trained with, a new one gets those of its own data.
    # Text model and action tokenizer come with the policy: leave their settings empty. Rarely worth it, and costly, since the rows of
    # its tokens begin anew (robots of before keep theirs): tokens.refit = True, if what `vla-jax tokens inspect` says of the new robot's error is too much.
    c.data.mixture = "tabletop_omni_and_before" if asked["mix"] == "true" else "tabletop_omni"
    c.data.holdout = 0.05
    c.pack.rows, c.pack.group = 4, 1
    c.pack.length, c.pack.images, c.pack.samples, c.pack.targets = 192, 8, 8, 60

    # 3. What is trained. The rate is that of pretraining, which a small model and 300 steps stand; for a large one take a third or less.
    c.train.steps = 300
    c.train.lr = 1e-3
    c.train.warmup = 20
    if asked["how"] == "full":
        c.train.lr_decay = 1.0  # below 1, lower layers change less: 0.9 for a dozen of them (Bao et al., "BEiT", 2021)
    elif asked["how"] == "lora":
        c.train.lora_rank, c.train.lora_alpha = 16, 32.0
        c.train.lora_also = ("state/.*", "img/head/.*")  # small, and new to this robot: trained whole
        c.train.lr = 3e-3
    elif asked["how"] == "expert":
        # The decoder stays as it is, and an action expert learns to read it. One that the policy has is taken, else it begins anew.
        c.model.expert = "demo"
        c.train.objective = "flow"
        c.train.freeze = ("img/.*", "llm/.*", "state/.*")
    else:
        c.train.freeze = ("img/.*",)  # the robot's pictures look like those of before
    c.train.save_every = 300
    c.train.log_every = 20
    c.train.eval_every = 100  # on held-out episodes: few demonstrations are soon known by heart
    c.train.keep_best = 1
    return c
