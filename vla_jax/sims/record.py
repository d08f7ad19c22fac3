"""Records scripted or random episodes of a simulator as RLDS, with TFDS's own writer.

    python -m vla_jax.sims.record OUT --env metaworld:reach-v3,button-press-v3 --episodes 40 [--random] [--seed 0]

writes OUT/<card>/1.0.0/, `--episodes` of each task. TensorFlow and Mesa's rendering end in a segmentation fault when they share a process: this
process writes and never draws; a second one (--stream) draws, and sends each episode through a pipe as an .npz file.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import simplejpeg

from vla_jax.data import cards, write
from vla_jax.sims import environments
from vla_jax.sims.adapter import ACTION, GymEnv
from vla_jax.tabletop.env import EVAL_SEED
from vla_jax.types import UserError

STAY_S = 0.2  # recorded after success, so that the end of a task is in the data
STRIDE = 10_000  # seeds: --seed counts recordings, each with episodes of its own
_LENGTH = struct.Struct("<Q")
_SPAN = 1 << 32  # bytes of an episode; more is no episode


def episode(env: GymEnv, seed: int, *, max_steps: int, random: bool = False) -> dict[str, np.ndarray]:
    """One scripted (or random) episode, as arrays: numbers f32[t n] by field, pictures as JPEG (bytes joined, u8, and `lengths:`), action,
    prompt and success. An action is what was carried out, as the environment takes it."""
    rng = np.random.default_rng([seed, 2])
    env.reset(seed)
    columns: dict[str, list] = {}
    pictures: set[str] = set()
    stayed, tail = 0, round(STAY_S * env.card.control_hz)
    prompt = env.mapping.prompt(env.env)
    while True:
        fields = env.fields()
        space = getattr(env.env, "action_space", None)
        action = rng.uniform(space.low, space.high) if random and space is not None else env.expert(rng)
        for key, x in fields.items():
            if np.asarray(x).dtype == np.uint8:
                pictures.add(key)
                x = simplejpeg.encode_jpeg(x, quality=95, colorsubsampling="444")
            columns.setdefault(key, []).append(x)
        stayed = stayed + 1 if env.success else 0
        last = stayed > tail or env.ended or env.steps == max_steps - 1
        columns.setdefault(ACTION, []).append(env.tell(action))
        if last:
            break
    out = {key: np.stack(rows).astype(np.float32) for key, rows in columns.items() if key not in pictures}
    for key in pictures:
        out[key] = np.frombuffer(b"".join(columns[key]), np.uint8)
        out[f"lengths:{key}"] = np.array([len(x) for x in columns[key]], np.int64)
        out[f"shape:{key}"] = np.array(fields[key].shape, np.int64)
    return {**out, "prompt": np.array(prompt), "success": np.array(stayed > 0), "seed": np.array(seed)}


def stream(out: BinaryIO, env: str, *, episodes: int, seed: int, random: bool) -> None:
    """The drawing side: `episodes` of each task, task by task, each as its length and an .npz file."""
    name, tasks = environments.parse(env)
    for number, task in enumerate(tasks):
        made = environments.make(name, task, cards.load(environments.card_of(name, task)))
        most = environments.ENVIRONMENTS[name].max_steps(task)
        for i in range(episodes):
            data = io.BytesIO()
            where = seed * STRIDE + (number * episodes + i) % STRIDE
            np.savez(data, **episode(made, where, max_steps=most, random=random))
            out.write(_LENGTH.pack(data.tell()) + data.getvalue())
            out.flush()


def received(pipe: BinaryIO) -> Iterator[dict[str, np.ndarray]]:
    """The writing side: episodes until the pipe ends. Raises: UserError when it ends within one."""
    while head := pipe.read(_LENGTH.size):
        size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else _SPAN
        body = pipe.read(size) if size < _SPAN else b""
        if len(body) != size:
            raise UserError("the drawing process ended in the middle of an episode; what it said stands above")
        with np.load(io.BytesIO(body)) as file:
            yield {key: file[key] for key in file.files}


def example(arrays: dict[str, np.ndarray], number: int) -> dict[str, Any]:
    """An episode as TFDS's features take it, pictures already encoded."""
    steps, success = len(arrays[ACTION]), bool(arrays["success"])
    files = {}
    for key in (k.removeprefix("lengths:") for k in arrays if k.startswith("lengths:")):
        ends = np.cumsum(arrays[f"lengths:{key}"])
        files[key] = [arrays[key][end - n : end].tobytes() for end, n in zip(ends, arrays[f"lengths:{key}"])]
    of = lambda key, t: io.BytesIO(files[key][t]) if key in files else arrays[key][t]
    seen = [k for k in arrays if k.startswith("observation/")]
    rows = [
        {
            "observation": {key.removeprefix("observation/"): of(key, t) for key in seen},
            ACTION: arrays[ACTION][t],
            "language_instruction": str(arrays["prompt"]),
            "is_first": t == 0,
            "is_last": t == steps - 1,
            "is_terminal": t == steps - 1 and success,
            "reward": float(t == steps - 1 and success),
            "discount": 1.0,
        }
        for t in range(steps)
    ]
    return {"steps": rows, "episode_metadata": {"episode_id": number, "success": success, "seed": int(arrays["seed"])}}


def features_of(arrays: dict[str, np.ndarray]) -> Any:
    """The TFDS features that an episode's arrays call for."""
    from tensorflow_datasets import features

    kind = lambda key: (
        features.Image(shape=tuple(arrays[f"shape:{key}"].tolist()), encoding_format="jpeg")
        if f"shape:{key}" in arrays
        else features.Tensor(shape=arrays[key].shape[1:], dtype=np.float32)
    )
    step = {
        "observation": features.FeaturesDict({k.removeprefix("observation/"): kind(k) for k in arrays if k.startswith("observation/")}),
        ACTION: features.Tensor(shape=arrays[ACTION].shape[1:], dtype=np.float32),
        "language_instruction": features.Text(),
        **{flag: features.Scalar(np.bool_) for flag in ("is_first", "is_last", "is_terminal")},
        **{number: features.Scalar(np.float32) for number in ("reward", "discount")},
    }
    metadata = {"episode_id": features.Scalar(np.int32), "success": features.Scalar(np.bool_), "seed": features.Scalar(np.int64)}
    return features.FeaturesDict({"steps": features.Dataset(step), "episode_metadata": metadata})


def record(out: str, env: str, *, episodes: int, seed: int, random: bool = False) -> str:
    """Draws in a process of its own and writes here; returns the folder of the set. Raises: UserError."""
    name, tasks = environments.parse(env)
    card = cards.load(environments.card_of(name, tasks[0]))
    if len(tasks) > 1 and not environments.ENVIRONMENTS[name].card:
        raise UserError(f"{env} is several robots, and each is a set of its own: name one, such as {name}:{tasks[0]}")
    if len(tasks) * episodes > STRIDE or not 0 <= seed < EVAL_SEED // STRIDE:
        raise UserError(f"need at most {STRIDE} episodes, and 0 <= --seed < {EVAL_SEED // STRIDE}; got {len(tasks) * episodes} and {seed}")
    folder = os.path.join(out, card.name, card.version)
    if os.path.exists(folder):
        raise UserError(f"{folder} exists; remove it or name another folder")
    command = [sys.executable, "-m", "vla_jax.sims.record", "--stream", "--env", env, "--episodes", str(episodes), "--seed", str(seed)]
    drawing = subprocess.Popen([*command, *(["--random"] if random else [])], stdout=subprocess.PIPE)
    won: list[bool] = []

    def told(incoming):
        for number, arrays in enumerate(incoming):
            yield example(arrays, number)
            won.append(bool(arrays["success"]))
            print(f"{card.name}: {len(won)} of {wanted} episodes, {sum(won)} succeeded", file=sys.stderr)

    wanted, partial = episodes * len(tasks), os.path.join(out, f".recording-{card.name}-{os.getpid()}")
    try:
        incoming = received(drawing.stdout)
        if (first := next(incoming, None)) is None:
            raise UserError(f"{env} gave no episode; what its process said stands above")
        how = f"{', '.join(tasks)}: {'random actions' if random else 'a script'} in {name}, seed {seed}."
        every, shards = itertools.chain([first], incoming), min(wanted, max(2, wanted // 25))
        made = write.write(partial, card.name, card.version, features_of(first), told(every), shards=shards, description=how)
        drawing.stdout.close()
        if (code := drawing.wait()) or len(won) != wanted:
            raise UserError(f"the drawing process ended with {code} after {len(won)} of {wanted} episodes; what it said stands above")
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        os.rename(made, folder)  # what has its name is whole
    finally:
        drawing.kill()
        drawing.wait()
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vla_jax.sims.record", description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", default="", help="data directory; OUT/<card>/<version> must not exist")
    parser.add_argument("--env", required=True, metavar="NAME[:TASK,..]", help=", ".join(environments.ENVIRONMENTS))
    parser.add_argument("--episodes", type=int, default=40, help="of each task (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true", help="random actions instead of the script")
    parser.add_argument("--stream", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.episodes < 1 or not (args.out or args.stream):
        parser.error("name OUT, and at least one episode")
    how = {"episodes": args.episodes, "seed": args.seed, "random": args.random}
    try:
        if args.stream:
            pipe = os.fdopen(os.dup(1), "wb")
            os.dup2(2, 1)  # simulators print; the pipe is for episodes alone
            stream(pipe, args.env, **how)
            pipe.close()
            sys.stderr.flush()
            os._exit(0)  # simulators' renderers complain when they are taken down with the interpreter
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
        print(record(args.out, args.env, **how))
    except UserError as e:
        print(f"vla_jax.sims.record: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
