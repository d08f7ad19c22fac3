"""Commands about runs: train, eval, runs, export, import, compile-check, launch, config, demo, study."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from vla_jax import config, launch
from vla_jax.cli.arguments import command, folder, positive, span, words
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
    p.add_argument("--robot", default="", metavar="NAME", help="a card of the run: lerobot is of one robot; native then has that one alone")
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
    p.add_argument("--jobs", type=positive, default=2, metavar="N", help="arms at a time, a process for each (default: 2)")
    p.add_argument("--out", default="", metavar="FILE", help="append the JSON lines here, too")
    p.add_argument("--plot", default="", metavar="FILE.svg", help="draw what was measured")


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

    run_dir, at, step = args.run_dir.rpartition("@")
    if not at or "/" in step:  # no step, or the folder's own
        run_dir, step = args.run_dir, ""
    elif not step.isdigit():
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
    lines = run.main(Path(args.workdir), quick=args.quick, out=Path(args.out) if args.out else None, only=args.only, jobs=args.jobs)
    print(page.table(lines))
    if args.plot:
        page.picture(lines, Path(args.plot))
    return 0
