"""Commands that measure: bench data, step, tokens, decode, attention, serve, faults, restart, goodput."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from vla_jax.bench import goodput
from vla_jax.cli.arguments import command, counts, folder, positive, words


def add(commands) -> None:
    bench = commands.add_parser("bench", help="measure, as ratios against a ceiling of the same run")
    bench = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    data = command(bench, "data", _bench_data, "pictures a second of the data path on generated RLDS sets, and what it costs besides")
    data.add_argument(
        "--root", required=True, metavar="DIR", help="folder that holds bridge_dataset/1.0.0; the sets are made of its frames"
    )
    data.add_argument("--sets", type=words, default=None, metavar="A,B", help="of jpeg256, jpeg480, png256, png480 (default: all)")
    data.add_argument("--cores", type=counts, default=(1, 2), metavar="N,M", help="measure on this many cores (default: 1,2)")
    data.add_argument("--peers", action="store_true", help="also tensorflow-datasets on the same files")
    data.add_argument("--seconds", type=float, default=2.0, help="length of one window (default: 2)")
    data.add_argument("--frames", type=positive, default=0, help="smaller sets, to try it out")
    step = command(bench, "step", _bench_step, "a config's training step: time, FLOP/s, memory, parts", takes_config=True)
    step.add_argument("--batch", default="data", metavar="KIND", help="data, or made-up samples: full, padded or packed (default: data)")
    step.add_argument(
        "--beside", action="append", default=[], metavar="WHAT", help="measured in turns with it: full_loss, padded, or group.key=value"
    )
    step.add_argument("--parts", action="store_true", help="also encoder, decoder, loss and optimizer by themselves")
    step.add_argument("--peer", default="", metavar="FILE", help="another program that prints JSON lines with `ms` and `samples_s`")
    step.add_argument("--peer-arguments", default="", metavar="TEXT", help="for it, as one word")
    tokens = command(bench, "tokens", _bench_tokens, "chunks a second of the action tokenizers, beside HF's `tokenizers`")
    decode = command(bench, "decode", _bench_decode, "one more token of a decoder, against the bound of memory")
    decode.add_argument("--preset", default="3b", help="the model (default: 3b)")
    decode.add_argument("--dtype", default="bfloat16", help="of weights and activations (default: bfloat16)")
    decode.add_argument("--rows", type=counts, default=(1, 8), metavar="N,M", help="robots asked for at once (default: 1,8)")
    decode.add_argument("--prompt", type=positive, default=640, help="tokens of the prompt, 256 of them an image (default: 640)")
    decode.add_argument("--tokens", type=positive, default=72, help="decoded tokens (default: 72)")
    serve = command(bench, "serve", _bench_serve, "an exported policy served under load, beside the bare model")
    serve.add_argument("export", metavar="EXPORT")
    serve.add_argument("--robot", default="", help="of several in the export")
    serve.add_argument("--requests", type=positive, default=4000, help="of all clients together (default: 4000)")
    serve.add_argument("--clients", type=positive, default=8, help="at once (default: 8)")
    serve.add_argument("--wrong", type=float, default=0.1, help="share of requests that are no observation (default: 0.1)")
    serve.add_argument("--max-batch", type=positive, default=8, help="of the server (default: 8)")
    serve.add_argument("--out", default="", metavar="FILE", help="append the JSON lines here")
    attention = command(bench, "attention", _bench_attention, "this device's attention kernels, beside plain XLA")
    attacked = command(
        bench, "faults", _bench_faults, "a small run of real processes, killed, stopped and damaged, against an undisturbed one"
    )
    attacked.add_argument("--n", type=positive, default=10, help="faults, each to a run of its own (default: 10)")
    attacked.add_argument("--processes", type=positive, default=2, help="of 4 devices together (default: 2)")
    attacked.add_argument("--seed", type=int, default=0)
    attacked.add_argument("--only", type=words, default=(), metavar="A,B", help="of the faults")
    attacked.add_argument(
        "--workdir", default="runs/faults", type=folder, metavar="DIR", help="for data and runs; those that were lost stay"
    )
    attacked.add_argument("--out", default="", metavar="FILE", help="append the JSON lines here")
    again = command(bench, "restart", _bench_restart, "what a start, a restart and a checkpoint cost a small run of real processes")
    again.add_argument("--preset", default="demo", help="the model (default: demo)")
    again.add_argument("--processes", type=positive, default=1, help="of 4 devices together (default: 1)")
    again.add_argument("--workdir", default="runs/restart", type=folder, metavar="DIR", help="for data and runs")
    week = command(bench, "goodput", _bench_goodput, "what a run loses to machines that come and go: a simulation, of what is assumed here")
    for f in dataclasses.fields(goodput.Fleet):
        kind = int if f.type == "int" else float
        week.add_argument(f"--{f.name.replace('_', '-')}", type=kind, default=f.default, help=f"default: {f.default:g}")
    week.add_argument("--days", type=float, default=7.0, help="default: 7")
    week.add_argument("--seed", type=int, default=0)
    for p in (data, step, tokens, decode, attention, again):
        p.add_argument("--repeats", type=positive, default=5)
        p.add_argument("--out", default="", metavar="FILE", help="append the JSON lines here")


def _bench_data(args) -> int:
    from vla_jax.bench import data, run

    lines = []
    where = {"sets": args.sets or data.SETS, "cores": args.cores, "seconds": args.seconds, "frames": args.frames}
    for line in run.data(args.root, repeats=args.repeats, peers=data.PEERS if args.peers else (), **where):
        _show(line, args.out)
        lines.append(line)
    print(data.table(lines), file=sys.stderr)
    return 0


def _bench_step(args) -> int:
    from vla_jax.bench import run

    options = {"batch": args.batch, "beside": tuple(args.beside), "parts": args.parts, "peer": args.peer}
    for line in run.step(args.config, repeats=args.repeats, where=args.config_spec, peer_arguments=args.peer_arguments, **options):
        _show(line, args.out)
    return 0


def _bench_tokens(args) -> int:
    from vla_jax.bench import run, tokens

    lines = []
    for line in run.tokens(repeats=args.repeats):
        _show(line, args.out)
        lines.append(line)
    print(tokens.table(lines), file=sys.stderr)
    return 0


def _bench_decode(args) -> int:
    from vla_jax.bench import run

    shape = {"preset": args.preset, "dtype": args.dtype, "rows": args.rows, "prompt": args.prompt, "tokens": args.tokens}
    for line in run.decode(repeats=args.repeats, **shape):
        _show(line, args.out)
    return 0


def _bench_faults(args) -> int:
    from vla_jax.bench import faults
    from vla_jax.bench.run import stamp

    line = {}
    for line in faults.run(Path(args.workdir), n=args.n, processes=args.processes, seed=args.seed, only=args.only):
        _show({"bench": "faults", **line, **stamp()}, args.out)
    return 1 if line["lost"] else 0


def _bench_restart(args) -> int:
    from vla_jax.bench import restart
    from vla_jax.bench.run import stamp

    for line in restart.run(Path(args.workdir).resolve(), preset=args.preset, processes=args.processes, repeats=args.repeats):
        _show({"bench": "restart", **line, **stamp()}, args.out)
    return 0


def _bench_goodput(args) -> int:
    fleet = goodput.Fleet(**{f.name: getattr(args, f.name) for f in dataclasses.fields(goodput.Fleet)})
    found = goodput.simulate(fleet, days=args.days, seed=args.seed)
    assumed = dataclasses.asdict(fleet) | {"days": args.days, "seed": args.seed}
    print(json.dumps({"bench": "goodput", "simulated": True, **found, "assumed": assumed}))
    return 0


def _bench_serve(args) -> int:
    from vla_jax.bench import run

    load = {"requests": args.requests, "clients": args.clients, "wrong": args.wrong, "max_batch": args.max_batch}
    line = {}
    for line in run.serve(args.export, robot=args.robot, **load):
        _show(line, args.out)
    return 1 if line["lost"] or line["different"] else 0


def _bench_attention(args) -> int:
    from vla_jax.bench import run

    for line in run.attention(repeats=args.repeats):
        _show(line, args.out)
    return 0


def _show(line: dict, file: str) -> None:
    """A result as one JSON line, at once, and appended to `file` if one is named."""
    print(json.dumps(line), flush=True)
    if file:
        with open(file, "a") as f:
            f.write(json.dumps(line) + "\n")
