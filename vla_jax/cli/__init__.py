"""The command line. Nothing heavy is imported before a command runs, so that --help answers at once."""

from __future__ import annotations

import sys

from vla_jax import __version__, config
from vla_jax.cli import data, runs, tokens
from vla_jax.cli.arguments import Parser
from vla_jax.types import UserError


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 2 the user's error (one message, no traceback), 1 ours."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # `vla-jax data list | head`
        sys.stderr.close()
        return 0
    except UserError as e:
        print(f"vla-jax: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        if e.filename is None:  # not about a path that somebody named
            raise
        print(f"vla-jax: {e.filename}: {e.strerror}. Check the path and its permissions.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vla-jax: interrupted", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
    args, overrides = _parse(argv)
    args.argv = argv
    if getattr(args, "takes_config", False):
        args.config_spec = args.config
        args.config, args.origin = config.load(args.config, overrides)
    elif overrides:
        raise UserError(f"{args.command} takes no --config.* overrides")
    return args.run(args) or 0


def _parse(argv: list[str]):
    """Splits off `--config.x.y=z` (also `--config.x.y z`), which argparse cannot know, from the rest."""
    overrides, rest, i = [], [], 0
    while i < len(argv):
        if argv[i].startswith("--config."):
            item = argv[i].removeprefix("--config.")
            if "=" not in item and i + 1 < len(argv):
                i += 1
                item = f"{item}={argv[i]}"
            overrides.append(item)
        else:
            rest.append(argv[i])
        i += 1
    return parser().parse_args(rest), overrides


def parser() -> Parser:
    made = Parser(prog="vla-jax", description="Pretraining of Vision-Language-Action models in JAX.", allow_abbrev=False)
    made.add_argument("--version", action="version", version=__version__)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (runs, data, tokens):
        room.add(commands)
    return made
