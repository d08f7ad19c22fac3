"""Others on the same files: a plain tf.data loop over what tensorflow-datasets reads.

Episodes are interleaved, their steps flat-mapped, shuffled in a buffer of 2000 undecoded steps, then decoded, resized to
224 x 224 and batched by 64; tf.data chooses its own parallelism within the cores that the process is pinned to. No action chunks,
prompts, tokens or packing. Decoded JPEG is TensorFlow's default (the fast inverse DCT; ours uses the accurate one).

Runs as a process of its own: `python -m vla_jax.bench.data_peers JOB.json`, results on stdout. Peak memory is read before
anything of ours is imported; the ceiling then runs between the windows, as it does for ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

SHUFFLE, BATCH = 2000, 64
RESIZE = {"linear": {"method": "bilinear", "antialias": False}, "lanczos3": {"method": "lanczos3", "antialias": True}}
_WARM, _LEAST, _TRIAL = 4, 8, 0.5  # as in data_rates, which is imported too late here


def dataset(place: str, views: list[str], encoding: str, *, resize: str, threads: int, size: int, shuffle: int):
    """(tf.data of batches {view: u8[64 size size 3], action, state, instruction}, tf.data of one pass over undecoded steps)."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    names = [view.removeprefix("observation/") for view in views]
    undecoded = {"steps": {"observation": {name: tfds.decode.SkipDecoding() for name in names}}}
    builder = tfds.builder_from_directory(place)
    episodes = builder.as_dataset(split="train", shuffle_files=True, decoders=undecoded)
    steps = episodes.flat_map(lambda episode: episode["steps"])
    decode = tf.io.decode_jpeg if encoding == "jpeg" else tf.io.decode_png

    def read(step):
        out = {"action": step["action"], "state": step["observation"]["state"], "instruction": step["language_instruction"]}
        for name in names:
            picture = tf.image.resize(decode(step["observation"][name], channels=3), (size, size), **RESIZE[resize])
            out[name] = tf.cast(tf.clip_by_value(tf.round(picture), 0, 255), tf.uint8)
        return out

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    batches = steps.repeat().shuffle(shuffle, seed=0).map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    return batches.batch(BATCH, drop_remainder=True).prefetch(2).with_options(options), steps


def measure(
    place: str,
    views: list[str],
    encoding: str,
    *,
    resize: str,
    threads: int,
    size: int,
    repeats: int,
    seconds: float,
    shuffle: int = SHUFFLE,
) -> list[dict]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    imports = time.perf_counter()
    import tensorflow  # noqa: F401 - its import is not counted in the time to the first batch
    import tensorflow_datasets  # noqa: F401

    imports, after_imports = time.perf_counter() - imports, _kb("VmRSS") / 1e3
    began = time.perf_counter()
    batches, steps = dataset(place, views, encoding, resize=resize, threads=threads, size=size, shuffle=shuffle)
    stream = iter(batches)
    held = next(stream)
    first = time.perf_counter() - began

    def window(seconds: float) -> tuple[int, float, float]:
        nonlocal held
        for _ in range(_WARM):
            held = next(stream)
        samples, cpu, wall = 0, time.process_time(), time.perf_counter()
        while time.perf_counter() - wall < seconds or samples < BATCH * (_LEAST if seconds >= _TRIAL else 1):
            held = next(stream)
            samples += int(held["action"].shape[0])
        return samples, time.perf_counter() - wall, time.process_time() - cpu

    window(seconds)
    peak = _kb("VmHWM") / 1e3

    from vla_jax.bench import data_rates

    _, decoder = data_rates.fastest(encoding)
    names = [view.removeprefix("observation/") for view in views]
    pictures = [bytes(step["observation"][name].numpy()) for step in steps.take(200) for name in names]
    pairs = []
    for _ in range(repeats):
        _until_idle()
        top = data_rates.ceiling(pictures, decoder, seconds / 2, threads=threads)
        samples, wall, cpu = window(seconds)
        pairs.append((data_rates.Rate(samples * len(views), samples, wall, cpu), top))
    return [
        {
            "what": "rate",
            "who": "tfds tf.data",
            "resize": resize,
            "augment": "none",
            **data_rates.summary(pairs),
            "first_batch_s": round(first, 2),
            "imports_s": round(imports, 2),
            "peak_resident_mb": round(peak, 1),
            "resident_after_imports_mb": round(after_imports, 1),
            "frames": sum(1 for _ in steps),
        }
    ]


def _until_idle() -> None:
    """Waits until what tf.data makes ahead is made."""
    for _ in range(100):
        cpu = time.process_time()
        time.sleep(0.2)
        if time.process_time() - cpu < 0.01:
            return


def _kb(key: str) -> float:
    """Of /proc/self/status, in units of 1000 bytes. VmHWM, not ru_maxrss: that one begins with the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1.024


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(measure(job.pop("place"), job.pop("views"), job.pop("encoding"), **job)))
