"""The command line. Nothing heavy is imported before a command runs, so that --help answers at once."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

from vla_jax import __version__, config, distributed
from vla_jax.cli import bench, data, deploy, rollouts, runs, tokens
from vla_jax.cli.arguments import Parser
from vla_jax.console import say
from vla_jax.types import WRONG_PATH, Interrupted, UserError


def program() -> int:
    """`main`, as a process of its own. One of several that fails, perhaps alone, ends at once: at its exit jax would wait for the others,
    who wait for it in a collective. Where all end together, done or stopped on request, jax sees to it that none takes the others with it."""
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    if code not in (0, _resumable()) and distributed.several():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, or stopped on request and saved (VLA_RESUMABLE_EXIT: another one for that); 2 the user's error (one message,
    no traceback); 1 ours, or one that may pass (one message)."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:  # `vla-jax data list | head`
        sys.stderr.close()
        return 0
    except Interrupted as e:
        if distributed.is_main():
            say(str(e))
        return _resumable()
    except UserError as e:
        print(f"vla-jax: {e}", file=sys.stderr)
        return 1 if e.passes else 2
    except OSError as e:
        if e.filename is None or e.errno not in WRONG_PATH:  # not about a path that somebody named
            raise
        print(f"vla-jax: {e.filename}: {e.strerror}. Check the path and its permissions.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vla-jax: interrupted", file=sys.stderr)
        return 130


def _resumable() -> int:
    """What a run that saved on request exits with; 0 where the environment says something that cannot be, which `_main` refuses."""
    text = os.environ.get("VLA_RESUMABLE_EXIT") or "0"
    return int(text) if text.isdecimal() and int(text) < 256 and int(text) not in (1, 2, 124) else 0


def _main(argv: list[str]) -> int:
    args, overrides = _parse(argv)
    if (asked := os.environ.get("VLA_RESUMABLE_EXIT", "")) not in ("", "0") and not _resumable():
        raise UserError(f"VLA_RESUMABLE_EXIT={asked}: write an exit code from 3 to 255 that is not 124 (a hang)")
    args.argv = argv
    if getattr(args, "takes_config", False):
        args.config_spec = args.config
        args.config, args.origin = config.load(args.config, overrides)
        args.overridden = bool(overrides)
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
    for room in (runs, deploy, rollouts, data, tokens, bench):
        room.add(commands)
    return made
