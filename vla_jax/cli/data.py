"""Commands about data: cards, indexes, statistics, the report."""

from __future__ import annotations

import json
from pathlib import Path

from vla_jax import config
from vla_jax.cli.arguments import bounded, command, folder, positive
from vla_jax.types import UserError


def add(commands) -> None:
    data = commands.add_parser("data", help="cards, indexes, statistics").add_subparsers(dest="action", required=True, metavar="ACTION")
    command(data, "list", _data_list, "cards and mixtures that there are")
    p = command(data, "draft", _data_draft, "a first draft of a dataset's card, from what it says of itself")
    p.add_argument("dataset", metavar="NAME/VERSION")
    p.add_argument("--root", required=True, metavar="DIR", help="folder that holds <dataset>/<version>/")
    p = command(data, "convert", _data_convert, "LeRobot v2/v3 or HDF5 demonstrations to RLDS, with a first draft of a card")
    p.add_argument("source", metavar="SRC", help="a LeRobot dataset, an HDF5 file, or a folder of such files")
    p.add_argument("out", metavar="OUT", type=folder, help="data root; OUT/NAME/VERSION must not exist")
    p.add_argument("--name", required=True, help="of the dataset: letters, digits and _")
    p.add_argument("--version", default="1.0.0")
    p.add_argument("--format", default="", choices=("lerobot", "hdf5"), help="found out if not given")
    p.add_argument("--layout", default="", choices=("robomimic", "libero", "aloha"), help="of HDF5 files; found out if not given")
    p.add_argument("--episodes", type=positive, metavar="N", help="only the first N")
    pictures = p.add_mutually_exclusive_group()
    pictures.add_argument("--quality", type=positive, default=95, help="of JPEGs made from pixels or video (default 95)")
    pictures.add_argument("--png", action="store_true", help="PNG instead: larger, nothing is lost")
    p.add_argument("--prompt", default="", metavar="TEXT", help="the instruction of episodes that have none")
    p.add_argument("--rotate", action="store_true", help="turn every picture by 180 degrees, as published LIBERO sets are")
    for name, run, text in (
        ("check", _data_check, "hold a card against a dataset's features.json"),
        ("index", _data_index, "index the datasets of a card or mixture in place"),
        ("stats", _data_stats, "statistics of the training episodes, as JSON"),
        ("inspect", _data_inspect, "the first frames of an episode, in robot units"),
        ("report", _data_report, "one HTML page: weights, warnings, pictures, actions and distributions"),
    ):
        p = command(data, name, run, text)
        p.add_argument("mixture", metavar="CARD|MIXTURE")
        p.add_argument("--root", required=True, metavar="DIR", help="folder that holds <dataset>/<version>/")
        p.add_argument("--index-dir", default="", metavar="DIR")
        p.add_argument("--holdout", type=bounded("holdout"), default=config.Data.holdout)
        p.add_argument(
            "--max-skipped",
            type=bounded("max_skipped"),
            default=config.Data.max_skipped,
            help="share of bad episodes above which a dataset is refused",
        )
        p.add_argument("--workers", type=int, default=0, help="scanning processes (0: one a core)")
        if name == "inspect":
            p.add_argument("--episode", type=int, default=0)
            p.add_argument("--steps", type=positive, default=5)
        if name == "report":
            p.add_argument("--out", required=True, metavar="FILE.html")
            p.add_argument(
                "--config", default="", metavar="FILE[:ARG]", help="config whose chunk, tokens, holdout and max_skipped are shown"
            )
            p.set_defaults(holdout=None, max_skipped=None)


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


def _data_convert(args) -> int:
    from tqdm import tqdm

    from vla_jax.data import convert

    if args.quality > 100:
        raise UserError(f"--quality {args.quality} is above 100, the best that JPEG has; --png loses nothing")
    place, out = Path(args.source).expanduser(), Path(args.out).expanduser()
    done = convert.convert(
        place,
        out,
        args.name,
        version=args.version,
        form=args.format,
        layout=args.layout,
        episodes=args.episodes,
        quality=None if args.png else args.quality,
        prompt=args.prompt,
        rotate=args.rotate,
        progress=lambda read, total: tqdm(read, total=total, desc=args.name, unit="episode"),
    )
    print(convert.report(done, out))
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
