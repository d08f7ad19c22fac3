"""Commands about runs: train, eval, export, config, demo, bench."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from vla_jax import config, launch
from vla_jax.bench import goodput
from vla_jax.cli.arguments import command, counts, folder, positive, span, words
from vla_jax.types import UserError


def add(commands) -> None:
    p = command(commands, "train", _train, "train, or go on from the newest checkpoint in the workdir", takes_config=True, workdir=True)
    p.add_argument("--profile", type=span, default=None, metavar="FIRST:LAST", help="write a trace of these steps to WORKDIR/profile")
    p = command(commands, "eval", _eval, "token and action metrics of a run or an export on held-out episodes", takes_config=True)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", default=None, type=folder, metavar="DIR", help="the run: its newest checkpoint")
    which.add_argument(
        "--export", default=None, type=folder, metavar="DIR", help="an export; of --config only data, mesh and train.eval_batches count"
    )
    p.add_argument("--frames", type=positive, default=64, help="held-out frames per dataset for the action error")
    p.add_argument("--out", default="", metavar="FILE", help="write the JSON here, too")
    p = command(commands, "runs", _runs, "the curves of one run or of several, on a page")
    p.add_argument("run_dirs", nargs="+", metavar="DIR", help="workdirs of runs")
    p.add_argument("--out", required=True, metavar="FILE.html")
    p = command(commands, "export", _export, "a checkpoint -> a folder that acts on its own, or one for openpi, LeRobot or transformers")
    p.add_argument("run_dir", metavar="RUN[@STEP]", help="the workdir of a run, and optionally a step of it")
    p.add_argument("out", metavar="OUT")
    p.add_argument("--format", default="native", choices=("native", "openpi", "lerobot", "hf"), help="default: native (docs/export.md)")
    p.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=None, help="the weights' running mean (default: where one was kept)"
    )
    p.add_argument("--dtype", default="f32", choices=("f32", "bf16"), help="of the matrices (default: f32)")
    p.add_argument("--robot", default="", metavar="NAME", help="a card of the run, for lerobot, which is of one robot")
    p = command(commands, "import", _import, "pretrained weights of others -> a folder for model.init")
    p.add_argument("source", metavar="SRC", help="a file or folder")
    p.add_argument("--format", required=True, choices=("hf", "big_vision", "openpi"))
    p.add_argument("--out", required=True, type=folder, metavar="DIR")
    p.add_argument("--preset", default="3b", help="the model that it is (default: 3b, PaliGemma)")
    p.add_argument("--more", default="", metavar="SRC", help="a second file: SigLIP and Gemma from two")
    p.add_argument("--more-format", default="", choices=("hf", "big_vision", "openpi"), help="of the second file (default: --format)")
    p.add_argument("--image-size", type=positive, default=224, help="positions are resized to it (default: 224)")
    p.add_argument(
        "--vocab", type=positive, default=0, help="rows of the embedding to take (default: all; PaliGemma has 257152 before padding)"
    )
    p = command(
        commands, "compile-check", _compile_check, "a run compiled for TPUs that are not there: memory, time, cost", takes_config=True
    )
    p.add_argument("--topology", required=True, metavar="CHIP:AxB", help="such as v5e:8x8 or v5p:4x4x4")
    p.add_argument("--slices", type=positive, default=1, help="of that topology each, joined by the data centre's network (default: 1)")
    p.add_argument("--quick", action="store_true", help="do not look for the largest batch")
    p.add_argument("--out", default="", metavar="FILE", help="append the report as a JSON line here")
    p.add_argument("--plot", default="", metavar="FILE", help="draw all reports of --out: rate, memory and traffic against chips")
    p = command(commands, "launch", _launch, "start a run on a cluster, with what must agree checked first", takes_config=True)
    p.add_argument("kind", choices=sorted(launch.KINDS), help="where")
    p.add_argument("--workdir", required=True, metavar="DIR", help="where the run is kept, as its hosts see it")
    p.add_argument("--chips", default="", metavar="KIND-N", help="such as v5e-64 or h200-16 (default: the config's own argument chips=..)")
    p.add_argument("--topology", default="", metavar="AxB", help="of one slice, where it is not the usual one")
    p.add_argument("--dry-run", action="store_true", help="print what would be run, and do nothing")
    for f in dataclasses.fields(launch.Options):
        if f.name not in ("config", "workdir"):
            kind = {"action": "store_true"} if f.type == "bool" else {"default": f.default, "type": int if f.type == "int" else str}
            p.add_argument(f"--{f.name.replace('_', '-')}", help=launch.SAYS[f.name], **kind)
    command(commands, "config", _config, "print the resolved config and where each value comes from", takes_config=True)
    p = command(commands, "demo", _demo, "the whole way on a small tabletop world: record, index, train, export, act")
    p.add_argument("--workdir", default="runs/demo", type=folder, metavar="DIR")
    p.add_argument("--steps", type=positive, help="training steps (default: as in configs/demo.py)")
    p.add_argument("--episodes", type=positive, default=400, help="recorded per robot")
    p.add_argument("--trials", type=positive, default=24, help="closed-loop episodes per robot")
    p = command(commands, "study", _study, "what pretraining is worth on that world: fine-tuning against scratch, heads, zero-shot")
    p.add_argument("--workdir", default="runs/study", type=folder, metavar="DIR")
    p.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    p.add_argument("--only", type=words, default=(), metavar="A,B", help="of the arms")
    p.add_argument("--out", default="", metavar="FILE", help="append the JSON lines here, too")
    p.add_argument("--plot", default="", metavar="FILE.svg", help="draw what was measured")
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


def _train(args) -> int:
    from vla_jax import distributed

    line = distributed.initialize()
    if distributed.is_main():
        print(line)
    from vla_jax.train import loop

    distributed.keep_compiled()
    loop.train(loop.prepare(args.config, args.workdir, where=args.config_spec), profile=args.profile)
    return 0


def _eval(args) -> int:
    from vla_jax import distributed

    distributed.initialize()
    from vla_jax.deploy import offline
    from vla_jax.train import evaluate

    of, what = (offline.run, args.export) if args.export else (evaluate.run, args.workdir)
    found = of(args.config, what, frames=args.frames, where=args.config_spec)
    if distributed.is_main():
        print(evaluate.show(found))
        if args.out:
            Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _runs(args) -> int:
    from vla_jax.train import curves

    print(f"wrote {curves.page(args.run_dirs, Path(args.out).expanduser())}")
    return 0


def _export(args) -> int:
    from vla_jax.deploy import export

    run_dir, _, step = args.run_dir.partition("@")
    if step and not step.isdigit():
        raise UserError(f"{args.run_dir}: what follows @ is a step number, got {step!r}")
    how = {"kind": args.format, "ema": args.ema, "dtype": args.dtype, "robot": args.robot}
    print(f"exported to {export.export(run_dir, args.out, step=int(step) if step else None, **how)}")
    return 0


def _import(args) -> int:
    from vla_jax import distributed

    distributed.initialize()
    if Path(args.out).expanduser().exists():
        raise UserError(f"{args.out} exists. Give a new folder.")
    from vla_jax.train import state

    second = {"more": args.more, "more_kind": args.more_format}
    found = state.convert(args.source, args.format, args.out, preset=args.preset, image_size=args.image_size, vocab=args.vocab, **second)
    expert = found.get("expert", {})
    said = f"; with an action expert: model.expert={expert['preset'] or expert}, model.expert_dims={expert['action_dim']}" if expert else ""
    said += f"; positions {found['positions']}" if "positions" in found else ""
    print(f"{args.out}: {found['parameters']:,} parameters, {found['text_vocab']} rows of the embedding{said}")
    return 0


def _compile_check(args) -> int:
    from vla_jax import hardware
    from vla_jax.bench.run import stamp
    from vla_jax.train import compile_check, fitting, metrics, roofline

    if not compile_check.has_stack(hardware.topology(args.topology)[0]):
        return _with_stack(args.argv)
    if args.plot:
        from vla_jax import report

        if not args.out:
            raise UserError("--plot draws what --out has gathered: give --out FILE, too")
        report.check_picture(args.plot)
    if args.out:
        open(args.out, "a").close()  # a folder that is not there is better known now than after minutes of compiling
    made = fitting.run(args.config, args.topology, slices=args.slices, where=args.config_spec, quick=args.quick)
    if args.out:  # before anything is printed, which a closed pipe ends
        with open(args.out, "a") as f:
            f.write(json.dumps({"topology": args.topology, **made, **stamp()}) + "\n")
    print(roofline.table(made))
    if not made["fits"]:
        raise UserError(roofline.advice(made))
    if args.plot:
        report.scaling_picture(metrics.parse(Path(args.out).read_text(errors="replace")), Path(args.plot))
    return 0


def _with_stack(argv: list[str]) -> int:
    """This command in a process of its own, without a limit on its stack. Raises: UserError where that may not be."""
    import resource
    import subprocess

    if resource.getrlimit(resource.RLIMIT_STACK)[1] != resource.RLIM_INFINITY:
        raise UserError("the compiler for tpu7x overflows a stack of the usual size, and this system allows no larger one (`ulimit -Hs`).")
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    command = [sys.executable, "-m", "vla_jax.cli", *argv]
    return subprocess.run(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, free), check=False).returncode


def _launch(args) -> int:
    if args.overridden:
        raise UserError(
            "every host starts the same line, which has no room for --config.x.y=z: put the values into a config file of your own"
        )
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(launch.Options) if f.name != "config"}
    chips = args.chips or next((item[6:] for item in args.config_spec.partition(":")[2].split(",") if item.startswith("chips=")), "")
    if not chips:
        raise UserError("say the machines: --chips=KIND-NUMBER, such as v5e-64, or local with --chips=cpu-N")
    machines = launch.Machines.of(chips, args.topology)
    launch.check(args.config, machines, where=args.config_spec)
    made = launch.render(args.kind, machines, launch.Options(config=args.config_spec, **given))
    if args.dry_run:
        print(made)
        return 0
    return launch.run(made)


def _config(args) -> int:
    print(config.render(args.config, args.origin))
    return 0


def _demo(args) -> int:
    from vla_jax import demo

    return demo.main(Path(args.workdir), steps=args.steps, episodes=args.episodes, trials=args.trials)


def _study(args) -> int:
    from vla_jax import report
    from vla_jax.study import page, run

    if args.plot:
        report.check_picture(args.plot)
    lines = run.main(Path(args.workdir), quick=args.quick, out=Path(args.out) if args.out else None, only=args.only)
    print(page.table(lines))
    if args.plot:
        page.picture(lines, Path(args.plot))
    return 0


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
