"""The parser, and what an argument may be."""

from __future__ import annotations

import argparse

from vla_jax import config
from vla_jax.types import UserError


class Parser(argparse.ArgumentParser):
    """argparse with our exit code and the nearest known option in the message."""

    def error(self, message: str):
        import difflib

        word = message.split()[-1].partition("=")[0] if "unrecognized" in message else ""
        if "invalid choice: " in message:
            word = message.split("invalid choice: ")[1].split("'")[1]
        known = [o for a in self._actions for o in (*a.option_strings, *map(str, a.choices or ()))]
        near = difflib.get_close_matches(word, known, n=1) if word else []
        raise UserError(f"{message}.{f' Did you mean {near[0]}?' if near else ''} See `{self.prog} --help`.")


def folder(name: str) -> str:
    if not name:
        raise argparse.ArgumentTypeError("is empty; name a folder")
    return name


def positive(number: str) -> int:
    if not number.isdigit() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {number!r}")
    return int(number)


def span(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"is {text!r}; write two step numbers, such as 10:12")
    return int(first), int(last)


def words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word for word in text.split(",") if word))


def counts(text: str) -> tuple[int, ...]:
    return tuple(positive(word) for word in words(text)) or (1,)


def bounded(key: str):
    """A setting of the data group, within the bounds that the config states."""

    def number(text: str) -> float:
        try:
            return getattr(config.Config(data=config.Data(**{key: float(text)})).data, key)
        except (ValueError, UserError) as e:
            raise argparse.ArgumentTypeError(str(e)) from e

    return number


def command(parent, name: str, run, text: str, *, takes_config: bool = False, workdir: bool = False) -> argparse.ArgumentParser:
    """Adds the command `name`, which calls run(args)."""
    p = parent.add_parser(name, help=text, description=text, allow_abbrev=False)
    p.set_defaults(run=run, takes_config=takes_config)
    if takes_config:
        p.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config file; override its values with --config.x.y=z")
    if workdir:
        p.add_argument("--workdir", required=True, type=folder, metavar="DIR", help="where the run is kept: a folder, or gs://bucket/path")
    return p
