"""The command line. Nothing heavy is imported before a command runs, so that --help answers at once."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vla_jax import __version__, config
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
    return _parser().parse_args(rest), overrides


class _Parser(argparse.ArgumentParser):
    """argparse with our exit code and the nearest known option in the message."""

    def error(self, message: str):
        import difflib

        word = message.split()[-1].partition("=")[0] if "unrecognized" in message else ""
        if "invalid choice: " in message:
            word = message.split("invalid choice: ")[1].split("'")[1]
        known = [o for a in self._actions for o in (*a.option_strings, *map(str, a.choices or ()))]
        near = difflib.get_close_matches(word, known, n=1)
        raise UserError(f"{message}.{f' Did you mean {near[0]}?' if near else ''} See `{self.prog} --help`.")


def _folder(name: str) -> str:
    if not name:
        raise argparse.ArgumentTypeError("is empty; name a folder")
    return name


def _positive(number: str) -> int:
    if not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {number!r}")
    return int(number)


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for word in text.split(",") if word))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(word) for word in _words(text)) or (1,)


def _bounded(key: str):
    """A setting of the data group, within the bounds that the config states."""

    def number(text: str) -> float:
        try:
            return getattr(config.Config(data=config.Data(**{key: float(text)})).data, key)
        except (ValueError, UserError) as e:
            raise argparse.ArgumentTypeError(str(e)) from e

    return number


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vla-jax", description="Pretraining of Vision-Language-Action models in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text, *, parent=commands, takes_config=False, workdir=False):
        p = parent.add_parser(name, help=text, description=text, allow_abbrev=False)
        p.set_defaults(run=run, takes_config=takes_config)
        if takes_config:
            p.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config file; override its values with --config.x.y=z")
        if workdir:
            p.add_argument("--workdir", required=True, type=_folder, metavar="DIR", help="where the run is kept")
        return p

    command("train", _train, "train, or go on from the newest checkpoint in the workdir", takes_config=True, workdir=True)
    p = command("eval", _eval, "token and action metrics of a run on held-out episodes", takes_config=True, workdir=True)
    p.add_argument("--frames", type=_positive, default=64, help="held-out frames per dataset for the action error")
    p = command("export", _export, "a checkpoint -> a folder that acts on its own")
    p.add_argument("run_dir", metavar="RUN[@STEP]", help="the workdir of a run, and optionally a step of it")
    p.add_argument("out", metavar="OUT")
    command("config", _config, "print the resolved config and where each value comes from", takes_config=True)
    p = command("demo", _demo, "the whole way on a small tabletop world: record, index, train, export, act")
    p.add_argument("--workdir", default="runs/demo", type=_folder, metavar="DIR")
    p.add_argument("--steps", type=_positive, help="training steps (default: as in configs/demo.py)")
    p.add_argument("--episodes", type=_positive, default=400, help="recorded per robot")
    p.add_argument("--trials", type=_positive, default=24, help="closed-loop episodes per robot")
    bench = commands.add_parser("bench", help="measure, as ratios against a ceiling of the same run")
    bench = bench.add_subparsers(dest="what", required=True, metavar="WHAT")
    p = command("data", _bench_data, "pictures a second of the data path on generated RLDS sets, and what it costs besides", parent=bench)
    p.add_argument("--root", required=True, metavar="DIR", help="folder that holds bridge_dataset/1.0.0; the sets are made of its frames")
    p.add_argument("--sets", type=_words, default=None, metavar="A,B", help="of jpeg256, jpeg480, png256, png480 (default: all)")
    p.add_argument("--cores", type=_counts, default=(1, 2), metavar="N,M", help="measure on this many cores (default: 1,2)")
    p.add_argument("--peers", action="store_true", help="also tensorflow-datasets on the same files")
    p.add_argument("--seconds", type=float, default=2.0, help="length of one window (default: 2)")
    p.add_argument("--frames", type=_positive, default=0, help="smaller sets, to try it out")
    step = command("step", _bench_step, "model FLOP/s of a config's training step", parent=bench, takes_config=True)
    for each in (p, step):
        each.add_argument("--repeats", type=_positive, default=5)
        each.add_argument("--out", default="", metavar="FILE", help="append the JSON lines here")

    data = commands.add_parser("data", help="cards, indexes, statistics").add_subparsers(dest="action", required=True, metavar="ACTION")
    command("list", _data_list, "cards and mixtures that there are", parent=data)
    p = command("draft", _data_draft, "a first draft of a dataset's card, from what it says of itself", parent=data)
    p.add_argument("dataset", metavar="NAME/VERSION")
    p.add_argument("--root", required=True, metavar="DIR", help="folder that holds <dataset>/<version>/")
    for name, run, text in (
        ("check", _data_check, "hold a card against a dataset's features.json"),
        ("index", _data_index, "index the datasets of a card or mixture in place"),
        ("stats", _data_stats, "statistics of the training episodes, as JSON"),
        ("inspect", _data_inspect, "the first frames of an episode, in robot units"),
        ("report", _data_report, "one HTML page: weights, warnings, pictures, actions and distributions"),
    ):
        p = command(name, run, text, parent=data)
        p.add_argument("mixture", metavar="CARD|MIXTURE")
        p.add_argument("--root", required=True, metavar="DIR", help="folder that holds <dataset>/<version>/")
        p.add_argument("--index-dir", default="", metavar="DIR")
        p.add_argument("--holdout", type=_bounded("holdout"), default=config.Data.holdout)
        p.add_argument(
            "--max-skipped",
            type=_bounded("max_skipped"),
            default=config.Data.max_skipped,
            help="share of bad episodes above which a dataset is refused",
        )
        p.add_argument("--workers", type=int, default=0, help="scanning processes (0: one a core)")
        if name == "inspect":
            p.add_argument("--episode", type=int, default=0)
            p.add_argument("--steps", type=_positive, default=5)
        if name == "report":
            p.add_argument("--out", required=True, metavar="FILE.html")
            p.add_argument(
                "--config", default="", metavar="FILE[:ARG]", help="config whose chunk, tokens, holdout and max_skipped are shown"
            )
            p.set_defaults(holdout=None, max_skipped=None)

    tokens = commands.add_parser("tokens", help="the action tokenizer").add_subparsers(dest="action", required=True, metavar="ACTION")
    p = command("fit", _tokens_fit, "fit FAST on a config's mixture", parent=tokens, takes_config=True)
    p.add_argument("--out", required=True, metavar="FILE.json")
    command("inspect", _tokens_inspect, "length and error of the action tokens, per dataset", parent=tokens, takes_config=True)
    return parser


def _train(args) -> int:
    from vla_jax import distributed

    line = distributed.initialize()
    if distributed.is_main():
        print(line)
    from vla_jax.train import loop

    loop.train(loop.prepare(args.config, args.workdir, where=args.config_spec))
    return 0


def _eval(args) -> int:
    from vla_jax.train import evaluate

    print(json.dumps(evaluate.run(args.config, args.workdir, frames=args.frames, where=args.config_spec), indent=1))
    return 0


def _export(args) -> int:
    from vla_jax.deploy import export

    run_dir, _, step = args.run_dir.partition("@")
    if step and not step.isdigit():
        raise UserError(f"{args.run_dir}: what follows @ is a step number, got {step!r}")
    print(f"exported to {export.export(run_dir, args.out, step=int(step) if step else None)}")
    return 0


def _config(args) -> int:
    print(config.render(args.config, args.origin))
    return 0


def _demo(args) -> int:
    from vla_jax import demo

    return demo.main(Path(args.workdir), steps=args.steps, episodes=args.episodes, trials=args.trials)


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

    _show(run.step(args.config, repeats=args.repeats, where=args.config_spec), args.out)
    return 0


def _show(line: dict, file: str) -> None:
    """A result as one JSON line, at once, and appended to `file` if one is named."""
    print(json.dumps(line), flush=True)
    if file:
        with open(file, "a") as f:
            f.write(json.dumps(line) + "\n")


def _data_list(args) -> int:
    from vla_jax import paths
    from vla_jax.data import cards, mixture

    for name in cards.names():
        card = cards.load(name)
        print(
            f"card     {name:24} {card.version:8} {card.control_hz:g} Hz, {len(card.views)} views, {len(card.action.dims)}-D actions, {card.robot}"
        )
    for path in sorted((paths.assets("data") / "mixtures").glob("*.yaml")):
        mix = mixture.load(path.stem)
        print(f"mixture  {path.stem:24} {', '.join(f'{c.name} {w:g}' for c, w in zip(mix.cards, mix.weights))}")
    return 0


def _data_draft(args) -> int:
    from vla_jax.data import draft, rlds

    name, _, version = args.dataset.partition("/")
    if not name or not version or "/" in version:
        raise UserError(f"{args.dataset!r} must be NAME/VERSION, the dataset's folders below --root, as in bridge_dataset/1.0.0")
    print(draft.draft(rlds.dataset_dir(args.root, name, version), name, version), end="")
    return 0


def _data_check(args) -> int:
    from vla_jax.data import cards, mixture, rlds

    for card in mixture.load(args.mixture).cards:
        place = rlds.dataset_dir(args.root, card.name, card.version)
        cards.check(card, place)
        print(f"{card.name}: fits {place}")
    return 0


def _indexes(args):
    from tqdm import tqdm

    from vla_jax.data import build, mixture

    for card in mixture.load(args.mixture).cards:
        show = lambda shards, total, name=card.name: tqdm(shards, total=total, desc=name, unit="shard")
        yield build.ensure(
            card, args.root, args.index_dir, holdout=args.holdout, max_skipped=args.max_skipped, workers=args.workers, progress=show
        )


def _data_index(args) -> int:
    for ix in _indexes(args):
        size = sum(f.stat().st_size for f in ix.path.iterdir())
        skipped = ", ".join(f"{n} x {why}" for why, n in {**ix.skipped, **ix.filtered}.items()) or "nothing"
        print(
            f"{ix.card.name}: {ix.episodes} episodes, {ix.frames} frames, skipped {skipped}; {size / ix.frames:.0f} bytes a frame at {ix.path}"
        )
    return 0


def _data_stats(args) -> int:
    from vla_jax.data import stats

    print(json.dumps({ix.card.name: stats.to_json(stats.compute(ix, args.holdout)) for ix in _indexes(args)}, indent=1))
    return 0


def _data_inspect(args) -> int:
    import numpy as np

    for ix in _indexes(args):
        if not 0 <= args.episode < ix.episodes:
            raise UserError(f"{ix.card.name} has episodes 0..{ix.episodes - 1}, not {args.episode}")
        first, end = (int(ix.episode_start[args.episode + i]) for i in (0, 1))
        print(
            f"{ix.card.name} episode {args.episode}: {end - first} steps at {ix.card.control_hz:g} Hz, {' | '.join(ix.instructions(first))!r}"
        )
        print(f"  views: {', '.join(f'{v} ({int(ix.image[first, i, 1])} bytes)' for i, v in enumerate(ix.views))}")
        for label, spec, values in (("state", ix.card.state, ix.state), ("action", ix.card.action, ix.action)):
            print(f"  {label}: " + ", ".join(f"{d.name} [{d.unit}, {d.frame}, {d.kind}]" for d in spec.dims))
            for row in np.asarray(values[first : min(first + args.steps, end)]):
                print("    " + " ".join(f"{x:9.4f}" for x in row))
    return 0


def _data_report(args) -> int:
    import dataclasses

    from vla_jax.data import mixture, report

    out = Path(args.out)
    if out.is_dir() or out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {out} must be a file that ends in .html")
    c = config.load(args.config)[0] if args.config else config.Config()
    for key in ("holdout", "max_skipped"):
        if getattr(args, key) is None:
            setattr(args, key, getattr(c.data, key))
    where = {k: getattr(args, k) for k in ("root", "mixture", "index_dir", "holdout", "max_skipped")}
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, **where))
    found = report.write(mixture.load(args.mixture), list(_indexes(args)), c, out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {len(found)} warnings")
    return 0


def _open_tokens(args, path=None):
    from vla_jax.data import source
    from vla_jax.models import presets

    c = args.config
    return source.open_source(c, tokens_per_image=presets.tokens_per_image(c.model.preset, c.data.image_size), tokenizer_path=path)


def _tokens_fit(args) -> int:
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists. Give a new file.")
    action = _open_tokens(args, out).layout.action
    print(f"{out}: vocabulary {action.vocab_size} ({action.alphabet} coefficients, {len(action.merges)} merges), scale {action.scale:g}")
    return 0


def _tokens_inspect(args) -> int:
    from vla_jax.data import source

    for row in source.token_report(_open_tokens(args)):
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
