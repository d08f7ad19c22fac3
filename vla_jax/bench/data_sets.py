"""The datasets that `bench data` measures, made once and kept: real BridgeData V2 frames, enlarged to the sizes that robots
record, written as RLDS by TFDS's own writer, with a card and a mixture beside them. Our reader and all others read the same files.

Run as a program it writes one: `python -m vla_jax.bench.data_sets '{"root": .., "name": "jpeg256", "frames": 1500, "out": ..}'`.
TensorFlow is imported there and nowhere near a measurement.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import yaml

from vla_jax import config, paths
from vla_jax.data import build, cards, images, sample
from vla_jax.types import UserError

VERSION = "1.0.0"
VIEWS = {"base": "observation/image_0", "side": "observation/image_1"}
IMAGE_SIZE, CHUNK_S, PRESET = 224, 2.0, "3b"  # 10 steps at Bridge's 5 Hz; 256 tokens an image
EPISODE_STEPS, SHARDS, QUALITY = 30, 6, 95


@dataclasses.dataclass(frozen=True)
class Kind:
    """noise: standard deviation, in levels, of what is added after enlarging (an enlarged picture is too smooth). With it a JPEG
    is as large as a camera's: 25 kB at 256 x 256, 91 kB at 640 x 480."""

    encoding: str
    height: int
    width: int
    frames: int
    noise: float


SETS = {
    "jpeg256": Kind("jpeg", 256, 256, 1500, 3.8),
    "jpeg480": Kind("jpeg", 480, 640, 1500, 3.5),
    "png256": Kind("png", 256, 256, 750, 3.8),
    "png480": Kind("png", 480, 640, 450, 3.5),
}


def ensure(root: str, name: str, *, frames: int = 0) -> Path:
    """The folder that holds bench_<name>/1.0.0, mixture.yaml and, later, the index; made if it is not in the cache yet.
    frames: instead of the set's own number.

    Raises: UserError when `root` holds no bridge_dataset, or TensorFlow Datasets is missing.
    """
    kind = SETS[name]
    frames = frames or kind.frames
    source = build.ensure(cards.load("bridge_dataset"), root, str(paths.cache_dir() / "bench" / "index"))
    made_of = json.dumps([dataclasses.asdict(kind), frames, source.digest, VIEWS, EPISODE_STEPS, SHARDS, QUALITY])
    out = paths.cache_dir() / "bench" / f"{name}-{frames}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = tempfile.mkdtemp(prefix=out.name + ".partial-", dir=out.parent)
        job = json.dumps({"root": root, "name": name, "frames": frames, "out": partial})
        try:
            done = subprocess.run([sys.executable, "-m", "vla_jax.bench.data_sets", job], capture_output=True, text=True, check=False)
            if "No module named 'tensorflow" in done.stderr:
                raise UserError("the measured datasets are written by tensorflow-datasets: pip install 'vla-jax[rlds]'")
            if done.returncode:
                raise RuntimeError(f"writing {name} failed:\n{done.stderr[-2000:]}")
            if not out.is_dir():  # another run may have been faster
                os.rename(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    describe(out, name)
    return out


def describe(folder: Path, name: str) -> None:
    """Card and mixture of a set: Bridge's card with this set's name and views."""
    raw = yaml.safe_load(paths.find("data", "cards/bridge_dataset.yaml").read_text())
    raw |= {"name": f"bench_{name}", "version": VERSION, "views": VIEWS}
    (folder / "card.yaml").write_text(yaml.safe_dump(raw))
    mixture = {"name": f"bench_{name}", "source": "vla-jax bench", "weight": "per_dataset", "datasets": {str(folder / "card.yaml"): 1.0}}
    (folder / "mixture.yaml").write_text(yaml.safe_dump(mixture))


def settings(folder: Path, *, threads: int, resize: str = "linear", augment: config.Augment | None = None) -> config.Config:
    """How ours reads a set: chunks of 10 steps, pictures of 224 pixels, four samples of two cameras to a row, 64 to a batch."""
    return config.Config(
        data=config.Data(
            root=str(folder),
            mixture=str(folder / "mixture.yaml"),
            index_dir=str(folder / "index"),
            chunk_s=CHUNK_S,
            image_size=IMAGE_SIZE,
            views=tuple(VIEWS),
            resize=resize,
            threads=threads,
        ),
        augment=augment or config.Augment(),
        pack=config.Pack(rows=16, group=4, length=2304, images=8, samples=4, targets=256),
        tokens=config.Tokens(action_vocab=256),
        model=config.Model(preset=PRESET),
    )


def place(folder: Path, name: str) -> Path:
    """Where the TFDS files are."""
    return folder / f"bench_{name}" / VERSION


def _encode(picture: np.ndarray, kind: Kind) -> bytes:
    """RGB -> a file, JPEG with halved colour resolution as TensorFlow writes it."""
    if kind.encoding == "jpeg":
        return simplejpeg.encode_jpeg(picture, quality=QUALITY, colorsubsampling="420")
    return cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()


def _episodes(root: str, kind: Kind, frames: int) -> Iterator[dict[str, Any]]:
    """Real episodes joined until they have EPISODE_STEPS steps; every picture enlarged, with noise of its own."""
    ix = build.ensure(cards.load("bridge_dataset"), root, str(paths.cache_dir() / "bench" / "index"))
    rng, h, w = np.random.default_rng(0), kind.height, kind.width
    field = np.round(rng.standard_normal((2 * h, 2 * w, 3), np.float32) * kind.noise).astype(np.int16)
    for first in range(0, frames, EPISODE_STEPS):
        steps = []
        for at in range(first, min(first + EPISODE_STEPS, frames)):
            frame, observation = at % ix.frames, {"state": np.asarray(ix.state[at % ix.frames])}
            for view, key in VIEWS.items():
                big = cv2.resize(
                    images.decode(sample.fetch(ix, sample.picture(ix, frame, view)), ix.pictures[view]),
                    (w, h),
                    interpolation=cv2.INTER_CUBIC,
                )
                y, x = rng.integers(h), rng.integers(w)  # a window of the field: fresh noise without drawing it anew
                noisy = cv2.add(big, field[y : y + h, x : x + w], dtype=cv2.CV_8U)
                observation[key.removeprefix("observation/")] = io.BytesIO(_encode(noisy, kind))
            said = ix.instructions(frame)
            steps.append(
                {
                    "observation": observation,
                    "action": np.asarray(ix.action[frame]),
                    "language_instruction": said[0] if said else "do something",
                    **{"is_first": at == first, "is_last": False, "is_terminal": False, "reward": 0.0, "discount": 1.0},
                }
            )
        steps[-1]["is_last"] = True
        yield {"steps": steps, "episode_metadata": {"episode_id": first // EPISODE_STEPS}}


def _write(root: str, name: str, frames: int, out: str) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    from tensorflow_datasets import features

    from vla_jax.data import write

    tf.config.set_visible_devices([], "GPU")
    kind = SETS[name]
    picture = features.Image(shape=(kind.height, kind.width, 3), encoding_format=kind.encoding)
    step = {
        "observation": features.FeaturesDict(
            {
                **{key.removeprefix("observation/"): picture for key in VIEWS.values()},
                "state": features.Tensor(shape=(7,), dtype=np.float32),
            }
        ),
        "action": features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": features.Text(),
        **{flag: features.Scalar(np.bool_) for flag in ("is_first", "is_last", "is_terminal")},
        **{number: features.Scalar(np.float32) for number in ("reward", "discount")},
    }
    metadata = {"episode_id": features.Scalar(np.int32)}
    spec = features.FeaturesDict({"steps": features.Dataset(step), "episode_metadata": metadata})
    shards = max(1, min(SHARDS, frames // EPISODE_STEPS))
    write.write(
        out, f"bench_{name}", VERSION, spec, _episodes(root, kind, frames), shards=shards, description="enlarged BridgeData V2 frames"
    )


if __name__ == "__main__":
    _write(**json.loads(sys.argv[1]))
