"""What the readers of other formats (lerobot.py, hdf5.py) hand to convert.py: a description, and episodes as plain arrays.

Keys are those of the RLDS step to be written (`observation/state`, `action`). Pictures come one by one, so that an episode of four
large cameras does not lie in memory as pixels.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import cv2
import numpy as np

from vla_jax.data import images
from vla_jax.types import UserError

_MOST_NUMBERS = 4096  # a step's field of more is no state or action
# Full colour resolution: many robots' pictures are small. OpenCV's encoder, not simplejpeg's, which takes the fast, less exact DCT.
_JPEG = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444, cv2.IMWRITE_JPEG_QUALITY)
_LARGEST = 1 << 28  # numbers in one field of an episode; a damaged file may announce any shape


class Damaged(Exception):
    """An episode that cannot be used. `cause` is one of a few phrases, to be counted by."""

    def __init__(self, cause: str, detail: str = ""):
        super().__init__(f"{cause} ({detail})" if detail else cause)
        self.cause = cause


@dataclasses.dataclass(frozen=True)
class Field:
    """Numbers, flags or text of a step. dtype: float32, int32, int64, bool or string; names: of its numbers, where the source says."""

    shape: tuple[int, ...]
    dtype: str
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Camera:
    """encoding: jpeg or png where the source holds such files, which are copied; "" where it holds pixels."""

    height: int
    width: int
    encoding: str = ""


@dataclasses.dataclass(frozen=True)
class Episode:
    """n steps. values: key -> [n ..]; pictures: key -> n times u8[h w 3] RGB or the bytes of a JPEG or PNG file, read as they are
    asked for, which may raise Damaged; prompts: n instructions; terminal: whether the task ended with the last step."""

    values: dict[str, np.ndarray]
    pictures: dict[str, Iterator[np.ndarray | bytes]]
    prompts: list[str]
    terminal: bool = False

    @property
    def steps(self) -> int:
        return len(self.prompts)


@dataclasses.dataclass(frozen=True)
class Source:
    """A dataset of another format. episodes(first n, or None for all) yields (what the source calls it, Episode or why it is
    none); control_hz None where the source does not say; notes: what the user should know, one sentence each."""

    kind: str
    fields: dict[str, Field]
    cameras: dict[str, Camera]
    count: int
    episodes: Callable[[int | None], Iterator[tuple[str, Episode | Damaged]]]
    control_hz: float | None = None
    robot: str = ""
    licence: str = ""
    notes: tuple[str, ...] = ()


def inside(root: Path, name: str, said_by: str) -> Path:
    """root/name. Symbolic links are the user's own (a hub's cache is made of them) and followed.

    Raises: UserError when the name leads out of the folder by itself.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise UserError(f"{said_by} names the file {name!r}, which is outside {root}: such a dataset is not read")
    return root / name


def key_of(*parts: str, said_by: str) -> str:
    """The key of a step's field: parts joined by /, what is no letter, digit, _, - or . replaced by _.

    Raises: UserError for a part that would be a path.
    """
    for part in parts:
        if not part or "/" in part or "\\" in part or part.startswith("."):
            raise UserError(f"{said_by}: a field is called {part!r}; names may not be empty, hold a slash or begin with a dot. Rename it.")
    return "/".join(re.sub(r"[^\w.\-]", "_", part, flags=re.ASCII) for part in parts)


def unique(keys: dict[str, str], said_by: str) -> dict[str, str]:
    """source name -> key, unchanged. Raises: UserError when two names would be one key, or one key the folder of another."""
    taken: dict[str, str] = {}
    for name, key in keys.items():
        for other, owner in taken.items():
            if key == other or key.startswith(other + "/") or other.startswith(key + "/"):
                raise UserError(f"{said_by}: the fields {owner!r} and {name!r} would both be written to {key!r}. Rename one.")
        taken[key] = name
    return keys


def is_vector(shape: tuple[int, ...]) -> bool:
    """Whether a step's field of that shape may be a state or an action, not a picture of depth or of segments."""
    return len(shape) <= 2 and math.prod(shape) <= _MOST_NUMBERS


def stored(dtype: np.dtype) -> str | None:
    """The dtype that numbers are written in: tensorflow-datasets stores all floats as float32. None: no numbers."""
    if dtype.kind == "f":
        return "float32"
    if dtype.kind == "b":
        return "bool"
    return None if dtype.kind not in "iu" else "int32" if dtype == np.int32 else "int64"


def numbers(name: str, value: np.ndarray, field: Field, steps: int) -> np.ndarray:
    """[n ..] of the field's shape and dtype. Raises: Damaged for another length or shape, NaN, or numbers that do not fit."""
    if len(value) != steps:
        raise Damaged("differing lengths", f"{name} has {len(value)} steps, the action {steps}")
    if value.shape[1:] != field.shape:
        try:
            if not {value.shape[1:], field.shape} <= {(), (1,)}:
                raise ValueError
            value = value.reshape(steps, *field.shape)
        except ValueError:
            raise Damaged("another shape", f"{name} is {list(value.shape[1:])} a step, elsewhere {list(field.shape)}") from None
    if stored(value.dtype) is None or (stored(value.dtype) == "float32") != (field.dtype == "float32"):
        raise Damaged("another type", f"{name} holds {value.dtype}, elsewhere {field.dtype}")
    with np.errstate(over="ignore"):
        out = value.astype(field.dtype)
    if field.dtype == "float32" and not np.isfinite(out).all():
        raise Damaged("not finite", f"{name} holds NaN, infinity or more than float32 does, at step {_first(~np.isfinite(out))}")
    if field.dtype != "float32" and (out != value).any():
        raise Damaged("not finite", f"{name} holds more than {field.dtype} does, at step {_first(out != value)}")
    return out


def _first(odd: np.ndarray) -> int:
    return int(np.argmax(odd.reshape(len(odd), -1).any(axis=1)))


def bounded(name: str, shape: tuple[int, ...]) -> None:
    """Raises: Damaged when an array of that shape would be no episode's."""
    if math.prod(map(int, shape)) > _LARGEST:
        raise Damaged("too large", f"{name} announces the shape {list(shape)}; {_LARGEST} numbers at most are read")


def clean(text: str | bytes) -> tuple[str, bool]:
    """An instruction as text without outer blanks, and whether it was UTF-8; what is not is replaced by U+FFFD."""
    raw = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")
    out = raw.decode("utf-8", "replace")
    return out.strip().strip("\0"), "\ufffd" not in out


def encoding_of(data: bytes) -> str:
    """jpeg, png, or "" for anything else."""
    return "jpeg" if data[:2] == b"\xff\xd8" else "png" if data[:4] == b"\x89PNG" else ""


def encode(picture: np.ndarray | bytes, camera: Camera, encoding: str, *, quality: int, rotate: bool = False) -> bytes:
    """A picture as the bytes of a file in `encoding`. A file that is in it already is copied byte for byte, if it decodes.

    Raises: Damaged when it does not decode or has another size than the camera's.
    """
    copied = isinstance(picture, bytes) and encoding_of(picture) == encoding and not rotate
    try:
        pixels = images.decode(picture) if isinstance(picture, bytes) else picture
    except images.UndecodableImage as e:
        raise Damaged("undecodable picture", str(e)) from e
    if pixels.shape != (camera.height, camera.width, 3) or pixels.dtype != np.uint8:
        raise Damaged("another picture size", f"{pixels.dtype} {list(pixels.shape)}, elsewhere {camera.height} x {camera.width} x 3")
    if copied:
        return picture
    pixels = np.ascontiguousarray(pixels[::-1, ::-1] if rotate else pixels)
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png" if encoding == "png" else ".jpg", bgr, [] if encoding == "png" else [*_JPEG, quality])[1].tobytes()
