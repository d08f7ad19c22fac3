"""Demonstrations of other formats as RLDS: `vla-jax data convert`.

A reader (lerobot.py, hdf5.py) yields one episode at a time; its pictures become files' bytes, TFDS's writer writes them into a folder
beside the target, and that is renamed when all is there. An episode that cannot be used is left out, counted and named.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vla_jax.data import demonstrations as demos
from vla_jax.data import draft, rlds, write
from vla_jax.data.demonstrations import Damaged, Episode, Source
from vla_jax.types import UserError

FORMATS = ("lerobot", "hdf5")
CARD = "card.yaml"


@dataclasses.dataclass
class Written:
    """What came of a conversion. skipped: what the source calls an episode, and why it was left out."""

    folder: Path
    source: Source
    episodes: int = 0
    frames: int = 0
    unlabelled: int = 0
    replaced: int = 0
    skipped: list[tuple[str, Damaged]] = dataclasses.field(default_factory=list)


def detect(place: Path) -> str:
    """The format of a source by its files. Raises: UserError when none is recognised."""
    if not place.exists():
        raise UserError(f"{place} does not exist. Name the folder or file that holds the demonstrations.")
    if place.is_dir() and any((place / name).exists() for name in ("meta/info.json", "meta_data")):
        return "lerobot"
    if place.is_file() or any(place.rglob("*.hdf5")) or any(place.rglob("*.h5")):
        return "hdf5"
    raise UserError(f"{place} holds neither meta/info.json (LeRobot) nor .hdf5 or .h5 files; --format names one of {', '.join(FORMATS)}.")


def read(place: Path, *, form: str = "", layout: str = "") -> Source:
    """The source at `place`; form and layout are found out where they are "". Raises: UserError."""
    form = form or ("hdf5" if layout else detect(place))
    if layout and form != "hdf5":
        raise UserError(f"--layout {layout} is for HDF5 files; {place} is read as {form}")
    try:
        from vla_jax.data import hdf5, lerobot
    except ImportError as e:
        raise UserError(f"converting needs the package {e.name}: pip install 'vla-jax[convert,rlds]'") from e
    return lerobot.read(place) if form == "lerobot" else hdf5.read(place, layout)


def convert(
    place: Path,
    out: Path,
    name: str,
    *,
    version: str = "1.0.0",
    form: str = "",
    layout: str = "",
    episodes: int | None = None,
    quality: int | None = 95,
    prompt: str = "",
    rotate: bool = False,
    progress=None,
) -> Written:
    """Writes `out`/name/version from the source at `place`, and a card's draft into it.

    episodes: only the first so many; quality: of the JPEGs that pixels become, None for PNG; prompt: for episodes without an
    instruction; rotate: turns every picture by 180 degrees. progress(iterable, total) shows episodes as they are read.

    Raises: UserError when the target exists, the source is none of these formats, or no episode of it can be used.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or not re.fullmatch(r"\d+\.\d+\.\d+", version, re.ASCII):
        raise UserError(f"{name!r}/{version!r} must be a name of letters, digits and _ that begins with a letter, and a version as 1.0.0")
    target = out / name / version
    if os.path.lexists(target):
        raise UserError(f"{target} exists. Give another --version or --name, or remove it.")
    try:
        import tensorflow_datasets  # noqa: F401  (writes it; seconds to import, and needed)
    except ImportError as e:
        raise UserError(f"converting needs the package {e.name}: pip install 'vla-jax[convert,rlds]'") from e
    source = read(place, form=form, layout=layout)
    encodings = {key: camera.encoding or ("png" if quality is None else "jpeg") for key, camera in source.cameras.items()}
    done = Written(target, source)
    read_all = source.episodes(episodes)
    total = min(source.count, episodes or source.count)
    made = _examples(read_all if progress is None else progress(read_all, total), done, encodings, quality or 95, prompt, rotate)
    partial = out / f".{name}-{version}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        _write(
            partial, name, version, features(source, encodings), made, description=f"Converted from {source.kind}: {place.resolve().name}."
        )
        text = _card(partial, name, version, source)
        (partial / name / version / CARD).write_text(text)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (partial / name / version).rename(target)
        except OSError as e:
            raise UserError(f"{target} came into being meanwhile, or cannot be written: {e}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return done


def _examples(read_all: Iterable[tuple[str, Episode | Damaged]], done: Written, encodings, quality, prompt, rotate) -> Iterator[dict]:
    for label, episode in read_all:
        try:
            if isinstance(episode, Damaged):
                raise episode
            made = _example(label, episode, done, encodings, quality, prompt, rotate)
        except Damaged as e:
            done.skipped.append((label, e))
            continue
        done.episodes, done.frames = done.episodes + 1, done.frames + episode.steps
        yield made
    if not done.episodes:
        raise UserError(f"no episode can be used; nothing is written. {causes(done) or 'The source has none.'}")


def _example(label: str, episode: Episode, done: Written, encodings, quality: int, prompt: str, rotate: bool) -> dict[str, Any]:
    """One episode as TFDS's features take it. Raises: Damaged."""
    pictures = {}
    for key, camera in done.source.cameras.items():
        pictures[key] = [demos.encode(p, camera, encodings[key], quality=quality, rotate=rotate) for p in episode.pictures[key]]
        if len(pictures[key]) != episode.steps:
            raise Damaged("differing lengths", f"{key} has {len(pictures[key])} pictures for {episode.steps} steps")
    told = {text: demos.clean(text) for text in set(episode.prompts)}
    said = [told[text][0] or prompt for text in episode.prompts]
    done.unlabelled += not any(said)
    done.replaced += not all(whole for _, whole in told.values())
    steps = []
    for t in range(episode.steps):
        last = t == episode.steps - 1
        step: dict[str, Any] = {
            "language_instruction": said[t],
            "is_first": t == 0,
            "is_last": last,
            "is_terminal": last and episode.terminal,
        }
        for key, value in episode.values.items():
            _put(step, key, value[t])
        for key, files in pictures.items():
            _put(step, key, io.BytesIO(files[t]))
        steps.append(step)
    return {"steps": steps, "episode_metadata": {"episode_id": done.episodes, "source": label}}


def _put(tree: dict, key: str, value) -> None:
    *parents, leaf = key.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def features(source: Source, encodings: dict[str, str]) -> Any:
    """TFDS's features of a source's episodes; the names of a field's numbers are its documentation."""
    from tensorflow_datasets import features as f

    step: dict[str, Any] = {
        "language_instruction": f.Text(),
        **{flag: f.Scalar(np.bool_) for flag in ("is_first", "is_last", "is_terminal")},
    }
    for key, field in source.fields.items():
        doc = ", ".join(field.names) or None
        kind = f.Text(doc=doc) if field.dtype == "string" else f.Tensor(shape=field.shape, dtype=np.dtype(field.dtype).type, doc=doc)
        _put(step, key, kind)
    for key, camera in source.cameras.items():
        _put(step, key, f.Image(shape=(camera.height, camera.width, 3), encoding_format=encodings[key]))
    return f.FeaturesDict({"steps": f.Dataset(step), "episode_metadata": {"episode_id": f.Scalar(np.int32), "source": f.Text()}})


def _write(root: Path, name: str, version: str, described: Any, made: Iterator[dict], *, description: str) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()  # ours counts episodes
    tf.config.set_visible_devices([], "GPU")  # TensorFlow only writes files here
    write.write(root, name, version, described, made, shards=None, description=description)


def _card(root: Path, name: str, version: str, source: Source) -> str:
    known = {key: field.names for key, field in source.fields.items() if field.names}
    place = rlds.dataset_dir(root, name, version)
    return draft.draft(place, name, version, control_hz=source.control_hz, robot=source.robot, licence=source.licence, names=known)


def causes(done: Written) -> str:
    """The episodes that were left out, counted by cause and the first of them named; "" when there are none."""
    counts: dict[str, int] = {}
    for _, e in done.skipped:
        counts[e.cause] = counts.get(e.cause, 0) + 1
    total = ", ".join(f"{n} x {cause}" for cause, n in counts.items())
    named = [f"  {label}: {e}" for label, e in done.skipped[:20]]
    more = [f"  and {len(done.skipped) - 20} more"] if len(done.skipped) > 20 else []
    return "\n".join([f"Skipped {len(done.skipped)}: {total}", *named, *more]) if done.skipped else ""


def report(done: Written, root: Path, *, prompt: str = "") -> str:
    """What was written, what was not, and the next command."""
    s, cameras = done.source, done.source.cameras
    rate = f"{s.control_hz:g} Hz" if s.control_hz else "control rate not said by the source (fill in control_hz in the card)"
    shown = ", ".join(f"{key} {c.height} x {c.width}" for key, c in cameras.items()) or "none"
    lines = [f"{done.folder}: {done.episodes} episodes, {done.frames} frames, {rate}, from {s.kind}", f"cameras: {shown}", causes(done)]
    lines += [f"note: {note}" for note in s.notes]
    if done.unlabelled:
        lines.append(
            f"note: {done.unlabelled} episodes have no instruction: the card's filter `labelled` leaves them out; --prompt TEXT gives one"
        )
    if done.replaced:
        lines.append(f"note: instructions of {done.replaced} episodes are no UTF-8: what could not be read became U+FFFD")
    lines += [f'Next: replace every "?" in {done.folder / CARD}, then', f"  vla-jax data check {done.folder / CARD} --root {root}"]
    return "\n".join(line for line in lines if line)
