"""A dataset that stores everything in the ways that published ones do: pictures as JPEG, PNG and raw numbers, text as strings
and as codes, numbers of every type, several instructions, episodes to leave out."""

import io

import numpy as np

from vla_jax.data import cards, write

NAME, VERSION, EPISODES = "odd_robot", "0.3.0", 7
CARD = {
    "name": NAME,
    "version": VERSION,
    "source": "generated",
    "licence": "",
    "citation": "",
    "robot": "none",
    "control_hz": 10,
    "splits": ["train"],
    "views": {
        "base": "observation/jpeg",
        "side": "observation/png",
        "side_2": "observation/raw",
        "wrist": "observation/raw_bytes",
        "wrist_right": "observation/raw_zlib",
    },
    "language": ["language", "nested/second", "codes"],
    "gripper": {"state": "none", "action": "closed_high"},
    "state": {
        "ops": [{"pick": "observation/joints"}, {"pick": "observation/flag"}, {"pick": "observation/count"}],
        "dims": [{"name": f"s{i}", "unit": "1", "frame": "joint", "kind": "absolute"} for i in range(5)],
    },
    "action": {
        "ops": [{"pick": "action/move"}, {"pick": {"key": "action/grip", "dims": [0]}}, {"invert": {"dims": [3]}}],
        "dims": [{"name": f"a{i}", "unit": "1", "frame": "base", "kind": "delta"} for i in range(4)],
    },
    "filters": [{"is_true": "episode:success"}, {"matches": {"key": "episode:meta/path", "pattern": "^good"}}, {"min_steps": 2}],
}


def card(**changes) -> cards.DatasetCard:
    return cards.from_dict({**CARD, **changes}, where="odd")


def features():
    from tensorflow_datasets import features as f

    picture = {"shape": (12, 16, 3)}
    step = {
        "observation": {
            "jpeg": f.Image(**picture, encoding_format="jpeg"),
            "png": f.Image(**picture, encoding_format="png"),
            "raw": f.Tensor(**picture, dtype=np.uint8),
            "raw_bytes": f.Tensor(**picture, dtype=np.uint8, encoding="bytes"),
            "raw_zlib": f.Tensor(**picture, dtype=np.uint8, encoding="zlib"),
            "joints": f.Tensor(shape=(3,), dtype=np.float64),
            "flag": f.Tensor(shape=(), dtype=np.bool_, encoding="bytes"),
            "count": f.Scalar(np.int64),
        },
        "action": {"move": f.Tensor(shape=(3,), dtype=np.float32), "grip": f.Tensor(shape=(1, 2), dtype=np.float32, encoding="zlib")},
        "language": f.Text(),
        "language_embedding": f.Tensor(shape=(8,), dtype=np.float32),
        "nested": {"second": f.Text()},
        "codes": f.Tensor(shape=(16,), dtype=np.int32),
        "is_first": f.Scalar(np.bool_),
    }
    return f.FeaturesDict({"steps": f.Dataset(step), "success": f.Scalar(np.bool_), "meta": {"path": f.Text()}})


def episode(number: int, steps: int | None = None, **change) -> dict:
    """Number 5 did not succeed, 6 is of the wrong folder; all others are kept. change: {step key: value} for every step."""
    rng = np.random.default_rng(number)
    out = []
    for t in range(2 + number if steps is None else steps):
        smooth = np.clip(np.add.outer(np.arange(12) * 9, np.arange(16) * 5)[..., None] + rng.integers(0, 60, 3), 0, 255).astype(np.uint8)
        noise = rng.integers(0, 256, (12, 16, 3), np.uint8)
        codes = np.zeros(16, np.int32)
        codes[:5] = list(b"push " if t % 2 else b"pull ")
        step = {
            "observation": {
                "jpeg": smooth,
                "png": noise,
                "raw": noise[::-1],
                "raw_bytes": noise[:, ::-1],
                "raw_zlib": smooth,
                "joints": rng.normal(size=3),
                "flag": bool(rng.integers(2)),
                "count": np.int64(rng.integers(-(2**40), 2**40)),
            },
            "action": {"move": rng.normal(size=3).astype(np.float32), "grip": rng.random((1, 2)).astype(np.float32)},
            "language": "pick it up" if number != 1 else "",
            "language_embedding": rng.normal(size=8).astype(np.float32),
            "nested": {"second": f" say {number} \u00e9 "},
            "codes": codes,
            "is_first": t == 0,
        }
        for key, value in change.items():
            parent, _, leaf = key.rpartition("/")
            (step[parent] if parent else step)[leaf] = value
        out.append(step)
    return {"steps": out, "success": number != 5, "meta": {"path": ("bad" if number == 6 else "good") + f"/{number}"}}


def record(root, episodes=None, **options) -> None:
    made = [episode(i) for i in range(EPISODES)] if episodes is None else episodes
    write.write(root, NAME, VERSION, features(), made, **{"shards": 2, **options})


def jpeg(picture: np.ndarray) -> io.BytesIO:
    import simplejpeg

    return io.BytesIO(simplejpeg.encode_jpeg(np.ascontiguousarray(picture), 90))
