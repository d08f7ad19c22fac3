"""The command for closed loops: an exported policy in simulators."""

from __future__ import annotations

import argparse
import dataclasses
import math

from vla_jax.cli.arguments import command, folder, positive


def add(commands) -> None:
    p = command(commands, "rollout", _rollout, "an exported policy in the tabletop world, MetaWorld, Push-T or robosuite")
    p.add_argument("export", metavar="EXPORT")
    p.add_argument(
        "--env", required=True, metavar="NAME[:TASK,..]", help="tabletop:ROBOT, metaworld:TASK, pusht, robosuite:Lift (default task: all)"
    )
    p.add_argument("--out", required=True, type=folder, metavar="DIR", help="for rollouts.jsonl, summary.json, videos/ and index.html")
    p.add_argument("--robot", default="", metavar="CARD", help="which of the export's robots acts (default: the environment's card)")
    p.add_argument("--head", default="", choices=("", "tokens", "flow"), help="default: flow where that was trained")
    p.add_argument("--episodes", type=positive, default=20, help="of each task (default: 20)")
    p.add_argument("--seed", type=_whole, default=0, help="of the first scene; no recording has these scenes (default: 0)")
    p.add_argument(
        "--execute", type=_share, default=None, metavar="SHARE", help="of a chunk, before replanning; 0: one step (default: 0.5)"
    )
    p.add_argument(
        "--ensemble",
        type=_number,
        default=None,
        metavar="DECAY",
        help="blend overlapping chunks, weights exp(-DECAY i), oldest first (ACT: 0.01)",
    )
    p.add_argument("--parallel", type=positive, default=8, help="episodes at once, one batch for the policy (default: 8)")
    p.add_argument("--film", type=_whole, default=8, help="episodes of each task that are filmed (default: 8)")
    p.add_argument("--max-steps", type=_whole, default=0, help="an episode's length (default: as the environment has it)")


def _rollout(args) -> int:
    from vla_jax import distributed
    from vla_jax.deploy import closed_loop

    distributed.keep_compiled()
    settings = closed_loop.Settings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(closed_loop.Settings)})
    closed_loop.run(args.export, args.env, args.out, settings, robot=args.robot, head=args.head)
    print(f"wrote {args.out}/index.html")
    return 0


def _whole(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or more, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return number


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from e
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return number
