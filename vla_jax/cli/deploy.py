"""Commands about an exported policy: serve, spec, dry-run."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from vla_jax.cli.arguments import command, positive, words
from vla_jax.types import UserError


def add(commands) -> None:
    serve = command(commands, "serve", _serve, "answer robots over a websocket, as openpi's client speaks it")
    spec = command(commands, "spec", _spec, "what an exported policy is sent and sends: units, frames, ranges")
    dry = command(commands, "dry-run", _dry_run, "a chunk for one observation, drawn and not sent to anything")
    for p in (serve, spec, dry):
        p.add_argument("export", metavar="EXPORT", help="a folder made by `vla-jax export`")
        limits = p.add_argument_group("limits", "what actions are kept within (docs/robot.md); on by default")
        limits.add_argument("--no-limits", action="store_true", help="send what the model says")
        limits.add_argument("--range", default="quantile", choices=("quantile", "minmax", "off"), help="of training (default: quantile)")
        limits.add_argument("--margin", type=float, default=0.05, help="by which q01..q99 is widened, of its width (default: 0.05)")
        limits.add_argument(
            "--rate",
            default="seen",
            choices=("seen", "cross", "off"),
            help="most change a step of absolute dimensions (default: seen in training)",
        )
        limits.add_argument("--cross-s", type=float, default=1.0, help="rate cross: least seconds from q01 to q99 (default: 1)")
        limits.add_argument(
            "--max-step", action="append", default=[], type=_pair, metavar="DIM=X", help="most change a step, in the robot's units"
        )
    for p in (serve, spec):
        p.add_argument(
            "--prompt-tokens",
            type=positive,
            default=64,
            metavar="N",
            help="of the longest instruction that is served; longer ones are refused (default: 64, some 24 English words or more)",
        )
    for p in (spec, dry):
        p.add_argument("--robot", default="", help="of several in the export")
    for p in (serve, dry):
        p.add_argument("--head", default="", choices=("", "tokens", "flow"), help="(default: flow where it was trained)")
    serve.add_argument("--robots", type=words, default=(), metavar="A,B", help="of the export (default: all)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    serve.add_argument("--port", type=_port, default=8000, help="0: any that is free (default: 8000)")
    serve.add_argument(
        "--token-file", default="", metavar="FILE", help="clients must show what it holds; else the environment's VLA_SERVE_TOKEN"
    )
    serve.add_argument("--max-batch", type=positive, default=8, help="observations in one call of the model (default: 8)")
    serve.add_argument("--queue", type=positive, default=64, help="requests that may wait; others are told to come again (default: 64)")
    serve.add_argument("--max-mb", type=positive, default=16, help="of one message (default: 16)")
    serve.add_argument("--timeout-s", type=float, default=30.0, help="of a request (default: 30)")
    serve.add_argument("--connections", type=positive, default=64, help="at once (default: 64)")
    serve.add_argument(
        "--malformed", default="repair", choices=("repair", "hold", "raise"), help="what is sent where the tokens are no chunk"
    )
    serve.add_argument(
        "--key",
        action="append",
        default=[],
        type=_pair,
        metavar="VIEW=KEY",
        help="what a client calls a view, or the state (KEY+KEY joins)",
    )
    dry.add_argument("--image", action="append", default=[], type=_pair, metavar="VIEW=FILE", help="JPEG or PNG")
    dry.add_argument("--state", required=True, metavar="X,Y,..", help="in the order of `vla-jax spec` (a minus first: --state=-1,2)")
    dry.add_argument("--prompt", required=True)
    dry.add_argument("--out", required=True, metavar="FILE.svg")


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not (key and sign and value):
        raise argparse.ArgumentTypeError(f"is {text!r}; write NAME=VALUE")
    return key, value


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {text!r}")
    return int(text)


def _limits(args):
    from vla_jax.console import say
    from vla_jax.deploy.limits import Settings

    if args.no_limits:
        say("limits are OFF: a wrong answer of the model reaches the robot as it is")
        return None
    try:
        most = {name: float(value) for name, value in args.max_step}
    except ValueError as e:
        raise UserError(f"--max-step is DIM=NUMBER: {e}") from e
    return Settings(range=args.range, margin=args.margin, rate=args.rate, cross_s=args.cross_s, max_step=most)


def _serve(args) -> int:
    from vla_jax import distributed

    try:
        from vla_jax.deploy import serve, served
    except ModuleNotFoundError as e:
        raise UserError(f"serving needs the extra `serve`: pip install 'vla-jax[serve]' ({e.name} is missing)") from e
    if not 0 < args.timeout_s < 3600:
        raise UserError(f"--timeout-s is {args.timeout_s:g}; give seconds above 0 and below 3600")
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(serve.Settings)}
    token, limit = serve.read_token(args.token_file), _limits(args)
    distributed.keep_compiled()
    names = {view: tuple(keys.split("+")) for view, keys in args.key}
    how = {"malformed": args.malformed, "names": names, "limit": limit, "prompt_tokens": args.prompt_tokens}
    robots = served.load(args.export, robots=args.robots, head=args.head, **how)
    return serve.run(robots, serve.Settings(**fields), token)


def _spec(args) -> int:
    from vla_jax.deploy import policy, served, sheet

    limit, found = _limits(args), policy.load_all(args.export)
    if args.robot and args.robot not in found:
        raise UserError(f"robot {args.robot!r} is not in {args.export}; it has: {', '.join(found)}")
    shown = [found[args.robot]] if args.robot else list(found.values())
    limits = [served.limits_of(p, limit, shown) if limit else None for p in shown]
    print("\n\n".join(sheet.text(p, most, prompt_tokens=args.prompt_tokens) for p, most in zip(shown, limits)))
    return 0


def _dry_run(args) -> int:
    import numpy as np

    from vla_jax import distributed
    from vla_jax.deploy import observation, policy, served, sheet

    out = Path(args.out).expanduser()
    if out.suffix != ".svg" or not out.absolute().parent.is_dir():
        raise UserError(f"--out is {args.out}; it must end in .svg and lie in a folder that exists")
    distributed.keep_compiled()
    limit, robot = _limits(args), policy.Policy.load(args.export, robot=args.robot, head=args.head)
    try:
        state = np.array([float(x) for x in args.state.split(",")], np.float32)
        message = {"images": {v: sheet.read_picture(f) for v, f in args.image}, "state": state, "prompt": args.prompt}
        message = observation.with_history([message], robot.history)  # as at the start of an episode
        seen = observation.of(message, robot, {})
    except ValueError as e:
        raise UserError(f"{e}. `vla-jax spec {args.export}` shows what is expected.") from e
    ((chunk, valid),) = robot.act([seen])
    sent = chunk
    if limit:
        sent, _ = served.limits_of(robot, limit)(chunk, state=state)
    said = f"{robot.card.name}: {args.prompt!r}, {robot.steps} steps at {robot.card.control_hz:g} Hz{'' if valid else '; NOT WELL FORMED'}"
    out.write_text(sheet.picture(robot, chunk, sent, title=said))
    wide = max(len(d.name) for d in robot.card.action.dims)
    print(said)
    if outside := observation.outside(robot, state):
        print(f"  OUTSIDE of all that training had: {', '.join(outside)} of the state; `vla-jax spec` shows the ranges")
    for i, d in enumerate(robot.card.action.dims):
        changed = "" if np.array_equal(chunk[:, i], sent[:, i]) else f"  (the model: {' '.join(f'{x:.4g}' for x in chunk[:, i])})"
        print(f"  {d.name:<{wide}} {d.unit:<5} {' '.join(f'{x:.4g}' for x in sent[:, i])}{changed}")
    print(f"wrote {out}")
    return 0
