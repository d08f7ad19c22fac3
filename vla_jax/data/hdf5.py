"""HDF5 demonstrations: robomimic and LIBERO (`data/demo_N`, several to a file), ALOHA's (one episode a file)."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from vla_jax.data import demonstrations as demos
from vla_jax.data import images
from vla_jax.data.demonstrations import Camera, Damaged, Episode, Field, Source
from vla_jax.types import UserError

LAYOUTS = ("robomimic", "libero", "aloha")
_BLOCK = 16 << 20  # bytes of pictures read at once
_DEPTH = 4  # groups within an episode's group
_FAULTS = (OSError, RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError, MemoryError)  # h5py's, of a damaged file
_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")  # ACT's order of an arm's numbers


def files(place: Path) -> list[Path]:
    """HDF5 files at or below `place`, episode_2 before episode_10."""
    found = [place] if place.is_file() else [p for suffix in ("hdf5", "h5") for p in place.rglob(f"*.{suffix}") if p.is_file()]
    return sorted(found, key=lambda p: _natural(str(p)))


def read(place: Path, layout: str = "") -> Source:
    """The dataset in an HDF5 file, or in all below a folder. layout: one of LAYOUTS, "" to find out.

    Raises: UserError when there is none, it has no action, or links lead out of a file.
    """
    found = files(place)
    if not found:
        raise UserError(f"{place} holds no .hdf5 or .h5 file. Name the file, or the folder that holds them.")
    jobs: list[tuple[Path, str]] = []  # a file, and the group of an episode in it
    broken: dict[Path, Damaged] = {}
    for path in found:
        try:
            with h5py.File(path, "r") as f:
                layout = layout or _layout(f)
                jobs += [(path, name) for name in _groups(f, layout)]
        except _FAULTS as e:
            broken[path] = Damaged("unreadable file", _short(e))
            jobs.append((path, ""))
    for path, name in jobs:
        with contextlib.suppress(Damaged, *_FAULTS):
            if path not in broken:
                with h5py.File(path, "r") as f:
                    return _source(place, layout, jobs, broken, f, name)
    why = next(iter(broken.values()), "its episodes are empty or damaged" if jobs else "they are empty")
    raise UserError(f"{place}: none of its {len(found)} files holds an episode that can be read: {why}. {_known()}")


def _known() -> str:
    return "Layouts: data/demo_N/{actions,obs} (robomimic, libero), or action and observations/qpos (aloha); --layout names one."


def _layout(f: h5py.File) -> str:
    names = _checked(f)
    if "data" in names and _checked(f["data"]):
        obs = f["data"][_checked(f["data"])[0]].get("obs") or ()
        return "libero" if {"problem_info", "bddl_file_name"} & set(f["data"].attrs) or "agentview_rgb" in obs else "robomimic"
    if "observations" in names and "action" in names:
        return "aloha"
    raise UserError(f"{f.filename} is in no layout that is known (it holds: {', '.join(names) or 'nothing'}). {_known()}")


def _groups(f: h5py.File, layout: str) -> list[str]:
    """The group of each episode of a file."""
    if layout == "aloha":
        return ["/"]
    return [f"data/{name}" for name in sorted(_checked(f["data"]), key=_natural) if isinstance(f["data"][name], h5py.Group)]


def _checked(group: h5py.Group) -> list[str]:
    """Names in a group. Raises: UserError when one is a link to another file."""
    for name in group:
        if isinstance(link := group.get(name, getlink=True), h5py.ExternalLink):
            raise UserError(
                f"{group.file.filename}: {group.name}/{name} is a link to {link.filename!r}; links to other files are not followed"
            )
    return list(group)


def _datasets(group: h5py.Group, depth: int = _DEPTH) -> Iterator[tuple[str, h5py.Dataset]]:
    """Every dataset at or below a group, by its path from there. Raises: UserError when its data is in another file."""
    for name in _checked(group):
        try:
            item = group[name]
        except KeyError:  # a soft link to nothing
            continue
        if item.file.filename != group.file.filename or isinstance(item, h5py.Dataset) and (item.is_virtual or item.external):
            raise UserError(f"{group.file.filename}: {group.name}/{name} lies in another file; such links are not followed")
        if isinstance(item, h5py.Dataset):
            yield name, item
        elif isinstance(item, h5py.Group) and depth:
            yield from ((f"{name}/{rest}", ds) for rest, ds in _datasets(item, depth - 1))


def _key(source: str, layout: str, where: str) -> str | None:
    """The key of a step's field by its path in the episode's group; None for what is no field of a step, or of the next step."""
    head, *rest = source.split("/")
    if not rest:
        if layout == "aloha":
            return None if head == "compress_len" else demos.key_of(head, said_by=where)
        known = {"actions": "action", "rewards": "reward", "robot_states": "observation/robot_states"}
        return known.get(head)
    return demos.key_of("observation", *rest, said_by=where) if head in ("obs", "observations") else None


def _source(place: Path, layout: str, jobs: list, broken: dict, f: h5py.File, name: str) -> Source:
    """Described by an episode that can be read."""
    where, group = f"{f.filename}: {name}", f[name]
    found = dict(_datasets(group))
    keys = demos.unique({source: key for source in found if (key := _key(source, layout, where))}, where)
    fields, cameras, left = {}, {}, [s for s in found if s not in keys and s.split("/")[0] not in ("next_obs", "dones", "compress_len")]
    steps = len(found["action" if layout == "aloha" else "actions"]) if "action" in keys.values() else 0
    for source, key in keys.items():
        ds = found[source]
        if not ds.ndim or len(ds) != steps:
            left.append(f"{source} ({ds.dtype} {list(ds.shape)}, for {steps} actions)")
        elif camera := _camera(ds):
            cameras[key] = camera
        elif (dtype := demos.stored(ds.dtype)) and demos.is_vector(ds.shape[1:]):
            fields[key] = Field(tuple(ds.shape[1:]), dtype, _names(source, ds.shape[1:], layout))
        else:
            left.append(f"{source} ({ds.dtype} {list(ds.shape[1:])})")
    if "action" not in fields:
        raise UserError(f"{where} has no actions (it has: {', '.join(found) or 'nothing'}). {_known()}")
    notes = [f"left out, no numbers that a robot reads or RGB pictures: {', '.join(left)}"] if left else []
    if layout != "aloha" and "mask" in f:
        notes.append(f"the splits {', '.join(f['mask'])} are not kept: all episodes are in the split train")
    if layout == "libero":
        notes.append("LIBERO's pictures lie upside down, as OpenGL draws them, and are kept so; --rotate turns them by 180 degrees")
    if copied := [key for key, camera in cameras.items() if camera.encoding]:
        notes.append(f"{', '.join(copied)}: files are copied; if red and blue look exchanged, list those views under `bgr` in the card")
    said = _json(group.parent.attrs.get("env_args") if layout != "aloha" else None)
    kwargs = said.get("env_kwargs") if isinstance(said.get("env_kwargs"), dict) else {}
    hz, robots = kwargs.get("control_freq"), kwargs.get("robots") or []
    sources = {key: source for source, key in keys.items() if key in fields or key in cameras}
    return Source(
        kind=layout,
        fields=fields,
        cameras=cameras,
        count=len(jobs),
        episodes=lambda first: _episodes(place, layout, jobs[:first], broken, sources, fields, cameras),
        control_hz=float(hz) if isinstance(hz, int | float) and 0 < hz < 1e6 else None,
        robot=f"{robots if isinstance(robots, str) else ' and '.join(map(str, robots))} ({said.get('env_name')})" if robots else "",
        notes=tuple(notes),
    )


def _episodes(place, layout, jobs, broken, sources, fields, cameras) -> Iterator[tuple[str, Episode | Damaged]]:
    for path, name in jobs:
        label = f"{path.name if path == place else path.relative_to(place)}{f':{name}' if name.strip('/') else ''}"
        try:
            if path in broken:
                raise broken[path]
            with h5py.File(path, "r") as f:
                yield label, _episode(f, name, layout, sources, fields, cameras)
        except Damaged as e:
            yield label, e
        except _FAULTS as e:
            yield label, Damaged("unreadable file", _short(e))


def _episode(f: h5py.File, name: str, layout: str, sources: dict, fields: dict, cameras: dict) -> Episode:
    group = f[name]
    found = dict(_datasets(group))
    if missing := [source for source in sources.values() if source not in found]:
        raise Damaged("missing field", ", ".join(missing))
    steps = len(found[sources["action"]])
    if not steps:
        raise Damaged("empty episode")
    if (said := group.attrs.get("num_samples", steps)) != steps:
        raise Damaged("differing lengths", f"num_samples is {said}, there are {steps} actions")
    values, pictures = {}, {}
    for key, source in sources.items():
        ds = found[source]
        if key in fields:
            demos.bounded(source, ds.shape)
            values[key] = demos.numbers(source, ds[()], fields[key], steps)
        elif len(ds) != steps:
            raise Damaged("differing lengths", f"{source} has {len(ds)} pictures, there are {steps} actions")
        else:
            pictures[key] = _pictures(ds)
    done = found["dones"][()] if "dones" in found else np.zeros(1)
    return Episode(values, pictures, [_prompt(f, group, layout)] * steps, terminal=bool(done.size and done.ravel()[-1]))


def _pictures(ds: h5py.Dataset) -> Iterator[np.ndarray | bytes]:
    step = max(1, _BLOCK // max(1, int(np.prod(ds.shape[1:]))))
    for start in range(0, len(ds), step):
        try:
            block = ds[start : start + step]
        except _FAULTS as e:
            raise Damaged("unreadable file", f"{ds.name}: {_short(e)}") from e
        yield from block if block.ndim == 4 else map(_bytes, block)


def _bytes(item) -> bytes:
    """A row of padded bytes, a variable-length array or a string, without its padding: neither JPEG nor PNG ends with a zero."""
    return (item if isinstance(item, bytes) else np.asarray(item).tobytes()).rstrip(b"\0")


def _camera(ds: h5py.Dataset) -> Camera | None:
    """None when the dataset holds no RGB pictures. Raises: Damaged when they do not decode."""
    if ds.dtype == np.uint8 and ds.ndim == 4 and ds.shape[3] == 3:
        return Camera(*ds.shape[1:3])
    if not ((ds.dtype == np.uint8 and ds.ndim == 2) or (ds.dtype.kind in "OSV" and ds.ndim == 1)) or not len(ds):
        return None
    if not isinstance(ds[0], bytes | np.ndarray | np.void) or not (encoding := demos.encoding_of(data := _bytes(ds[0]))):
        return None
    try:
        return Camera(*images.decode(data).shape[:2], encoding)
    except images.UndecodableImage as e:
        raise Damaged("undecodable picture", str(e)) from e


def _prompt(f: h5py.File, group: h5py.Group, layout: str) -> str | bytes:
    """LIBERO's from `problem_info`, or its file's name without the scene's; robocasa's from `ep_meta`."""
    if layout == "libero":
        said = _json(group.parent.attrs.get("problem_info")).get("language_instruction")
        stem = re.sub(r"_demo$", "", Path(f.filename).stem)
        return str(said).strip('" ') if said else re.sub(r"^[A-Z_]*SCENE\d+_", "", stem).replace("_", " ")
    return str(_json(group.attrs.get("ep_meta")).get("lang") or "") if layout == "robomimic" else ""


def _json(text) -> dict:
    try:
        found = json.loads(demos.clean(text)[0]) if isinstance(text, str | bytes) else {}
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def _names(source: str, shape: tuple[int, ...], layout: str) -> tuple[str, ...]:
    leaf = source.split("/")[-1]
    if layout == "aloha":
        return tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _ARM) if shape == (14,) else ()
    if leaf.endswith("quat") and shape == (4,):
        return "qx", "qy", "qz", "qw"  # robosuite's order
    return ("x", "y", "z") if leaf.endswith("_pos") and shape == (3,) else ()


def _natural(text: str) -> list:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _short(e: BaseException) -> str:
    return " ".join(str(e).split())[:200]
