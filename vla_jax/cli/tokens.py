"""Commands about action tokenizers: fit one, and see what it does to each robot."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from vla_jax.cli.arguments import command
from vla_jax.types import UserError


def add(commands) -> None:
    tokens = commands.add_parser("tokens", help="the action tokenizer").add_subparsers(dest="action", required=True, metavar="ACTION")
    fit = command(tokens, "fit", _fit, "fit the tokenizer that a config names on its mixture", takes_config=True)
    fit.add_argument("--out", required=True, metavar="FILE.json")
    see = command(
        tokens,
        "inspect",
        _inspect,
        "the config's tokenizer beside bins: length and error on held-out episodes, per robot",
        takes_config=True,
    )
    see.add_argument("--sweep", action="store_true", help="also FAST of vocabulary 512, 1024, 2048 at scale 5, 10, 20")
    for p in (fit, see):
        p.add_argument("--json", default="", metavar="FILE", help="write the table here, too")
        p.add_argument("--plot", default="", metavar="FILE.png", help="draw error against length")


def _open(args, path=None):
    """(training source, held-out one)."""
    from vla_jax.data import prior, source
    from vla_jax.models import presets

    if args.plot:  # what cannot be written is said before the work
        from vla_jax import report

        report.check_picture(args.plot)
    for name in (args.json, args.plot):
        if name and not Path(name).absolute().parent.is_dir():
            raise UserError(f"the folder of {name} does not exist")
    c = args.config if path is None else dataclasses.replace(args.config, tokens=dataclasses.replace(args.config.tokens, refit=True))
    first = prior.load(c.model.init) if c.model.init else None
    patches = presets.tokens_per_image(c.model.preset, c.data.image_size)
    opened = source.open_source(c, tokens_per_image=patches, tokenizer_path=path, rows=False, prior=first)
    if not c.data.holdout:
        print("data.holdout is 0: measured on the training episodes", file=sys.stderr)
    return opened, opened.held_out() if c.data.holdout else opened


def _fit(args) -> int:
    from vla_jax.data import tokenization

    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists. Give a new file.")
    if args.config.tokens.action_path:
        raise UserError("tokens.action_path names a tokenizer that is fitted already; leave it empty to fit one")
    opened, held_out = _open(args, out)
    print(f"{out}: {tokenization.name(opened.layout.action)}, {out.stat().st_size} bytes")
    return _show(args, tokenization.measure(held_out, opened.layout.action), held_out)


def _inspect(args) -> int:
    from vla_jax.data import tokenization

    opened, held_out = _open(args)
    return _show(args, tokenization.beside(opened, held_out, sweep=args.sweep), held_out)


def _show(args, rows: list[dict], held_out) -> int:
    from vla_jax.data import tokenization

    print("\n".join([tokenization.table(rows), *tokenization.texts(held_out)]))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.plot:
        from vla_jax import report

        report.tokens_picture(rows, Path(args.plot))
    return 0
