"""FAST tokenizers as they are published: a folder with HF's `tokenizer.json` and `processor_config.json`. Numpy only.

Source: the processor released with Pertsch et al., 2025. There a coefficient is the character `chr(coefficient - min_token)`, its UTF-8
bytes are the symbols that byte-pair encoding merges, and GPT-2's pattern cuts the text into words that no merge crosses. What the
processor loses is kept here: it drops characters that its vocabulary lacks (coefficients above those it was fitted on) and decodes
any malformed sequence to zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np

from vla_jax.tokens.actions import LARGEST_VOCAB, check_policy, coefficients, joined, restore, settle, split, whole_number
from vla_jax.tokens.bpe import Bpe
from vla_jax.tokens.grammar import Grammar
from vla_jax.types import UserError

FORMAT = "vla_jax.fast_published.1"
# GPT-2's pattern, on text whose letters are L (but those of its contractions), digits 1 and white space a tab (but a plain space)
_WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?1+| ?[^\sA-Za-z1]+|\s+(?!\S)|\s+")
ODD = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)  # what a hostile file makes of reading it
_LARGEST = 0x7FF  # characters of at most two bytes; a vocabulary of 2048 has no more


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in such files (GPT-2's)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def _kind(c: str) -> str:
    if c in "'strevmld ":
        return c
    group = unicodedata.category(c)[0]
    return "L" if group == "L" else "1" if group == "N" else "\t" if c.isspace() and not 0x1C <= ord(c) <= 0x1F else "!"


@dataclasses.dataclass(frozen=True)
class PublishedFast:
    """pieces: what each id stands for, in the file's alphabet of bytes; merges: pairs of pieces, in the order they were learned."""

    scale: float
    min_coef: int
    pieces: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]
    words: bool  # whether GPT-2's pattern cuts the text first

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    @functools.cached_property
    def _bpe(self) -> Bpe:
        merges = [(self._ids[a], self._ids[b], self._ids[a + b]) for a, b in self.merges]
        left, right, result = np.array(merges, np.int32).reshape(-1, 3).T
        return Bpe(self.vocab_size, left.copy(), right.copy(), result.copy())

    @functools.cached_property
    def _spelling(self) -> np.ndarray:
        """Of each character 0.._LARGEST the ids of its one or two bytes, i32[c 2]: -1 for bytes that the vocabulary lacks, and -2 behind
        a single byte."""
        id_of_byte = np.full(256, -1)
        for char, byte in _byte_alphabet().items():
            id_of_byte[byte] = self._ids.get(char, -1)
        spelt = np.full((_LARGEST + 1, 2), -2, np.int32)
        for c in range(_LARGEST + 1):
            raw = list(chr(c).encode())
            spelt[c, : len(raw)] = id_of_byte[raw]
        return spelt

    @functools.cached_property
    def writable(self) -> np.ndarray:
        """bool[c]: the characters, coefficients less min_coef, that the vocabulary can write."""
        return (self._spelling != -1).all(axis=1)

    @functools.cached_property
    def _nearest(self) -> np.ndarray:
        """i64[c]: the nearest character that can be written, the lower of two."""
        able, chars = np.flatnonzero(self.writable), np.arange(_LARGEST + 1)
        above = np.clip(np.searchsorted(able, chars), 0, len(able) - 1)
        below = np.clip(np.searchsorted(able, chars, side="right") - 1, 0, None)
        return np.where(np.abs(able[below] - chars) <= np.abs(able[above] - chars), able[below], able[above])

    @property
    def max_coef(self) -> int:
        """The largest coefficient that can be written."""
        return int(np.flatnonzero(self.writable)[-1]) + self.min_coef

    def _chars(self, chunks: np.ndarray) -> tuple[np.ndarray, int, int]:
        """(characters i64[n, k*a] that can be written, how many coefficients were too low, too high)."""
        wanted = coefficients(chunks, self.scale) - self.min_coef
        inside = np.clip(wanted, 0, _LARGEST).astype(np.int64)
        chars = self._nearest[inside]
        return chars, int((wanted < chars).sum()), int((wanted > chars).sum())

    def clamps(self, chunks: np.ndarray) -> tuple[int, int]:
        """How many coefficients of chunks [n k a] are (raised, lowered) to the nearest that can be written."""
        return self._chars(chunks)[1:]

    def encode(self, chunk: np.ndarray) -> np.ndarray:
        """Normalised actions [k a] -> i32[t]; the processor's ids wherever it loses nothing. Raises: ValueError, see actions.checked."""
        return self.encode_batch(np.asarray(chunk)[None])[0]

    def encode_batch(self, chunks: np.ndarray) -> list[np.ndarray]:
        chars, _, _ = self._chars(chunks)
        n, numbers = chars.shape
        symbols = np.full((n * numbers, 3), -1, np.int32)  # two bytes, and a wall where a word ends
        symbols[:, :2] = self._spelling[chars.reshape(-1)]
        if self.words:
            kinds = self._kinds[chars].view(f"<U{numbers}").reshape(-1).tolist()
            ends = [i * numbers + m.end() - 1 for i, text in enumerate(kinds) for m in _WORDS.finditer(text)]
            symbols[ends, 2] = self.vocab_size
        used = symbols >= 0
        start = np.concatenate([[0], np.cumsum(used.reshape(n, 3 * numbers).sum(axis=1))])
        return split(*self._bpe.encode(symbols[used], start))

    @functools.cached_property
    def _kinds(self) -> np.ndarray:
        return np.array([_kind(chr(c)) for c in range(_LARGEST + 1)], "<U1")

    @functools.cached_property
    def _bytes(self) -> list[bytes]:
        """What each id stands for; an id with a character that is no byte's stands for that which is never valid."""
        alphabet = _byte_alphabet()
        return [bytes(alphabet.get(c, 0xFF) for c in piece) or b"\xff" for piece in self.pieces]

    def decode(self, ids: np.ndarray, *, steps: int, dims: int, malformed: str = "repair", last=None) -> tuple[np.ndarray, bool]:
        """i32[t] -> (f32[steps dims], whether the ids were a chunk of this shape); as FastTokenizer.decode. Bytes that are no
        character are passed over, too, by repair."""
        chunks, valid = self.decode_batch([ids], steps=steps, dims=dims, malformed=malformed, last=None if last is None else [last])
        return chunks[0], bool(valid[0])

    def decode_batch(self, ids, *, steps: int, dims: int, malformed: str = "repair", last=None) -> tuple[np.ndarray, np.ndarray]:
        """n times i32[t] -> (f32[n steps dims], valid bool[n]). last: f32[n dims]."""
        check_policy(malformed, last, (len(ids), steps, dims))
        parts, want = split(*joined(ids)), steps * dims
        whole, valid, why = np.zeros((len(parts), want)), np.zeros(len(parts), bool), {}
        for i, own in enumerate(parts):
            raw = b"".join(self._bytes[t] if 0 <= t < self.vocab_size else b"\xff" for t in own.tolist())
            text = "".join(c for c in raw.decode(errors="ignore") if ord(c) <= _LARGEST)
            valid[i] = len(text) == want and len(text.encode()) == len(raw)
            chars = np.frombuffer(text.encode(f"utf-32-{sys.byteorder[0]}e"), np.uint32)[:want]
            whole[i, : len(chars)] = chars.astype(np.float64) + self.min_coef
            if not valid[i]:
                why[i] = f"{len(own)} tokens are {len(text)} coefficients, {steps} x {dims} = {want} were expected"
        chunks = restore(whole, self.scale, steps, dims)
        for i, said in why.items():
            chunks[i] = settle(chunks[i], said, malformed, None if last is None else last[i])
        return chunks, valid

    @functools.cached_property
    def grammar(self) -> Grammar:
        """State 1: the first of a character's two bytes stands there, the second must follow."""
        after, count = np.full((2, self.vocab_size), -1, np.int32), np.zeros((2, self.vocab_size), np.int32)
        for t, raw in enumerate(self._bytes):
            for state, before in enumerate((b"", b"\xc2")):
                for to, behind in enumerate((b"", b"\x80")):
                    try:
                        text = (before + raw + behind).decode()
                    except UnicodeDecodeError:
                        continue
                    if all(ord(c) <= _LARGEST for c in text) and not (to and len(raw) == 0):
                        after[state, t], count[state, t] = to, len(text) - to
                        break
        return Grammar(after, count)

    def to_json(self) -> dict:
        body = {"format": FORMAT, "scale": self.scale, "min_coef": self.min_coef, "words": self.words}
        return body | {"pieces": list(self.pieces), "merges": [list(m) for m in self.merges]}


def from_json(body: dict, where: str) -> PublishedFast:
    """Raises: UserError for content that is no tokenizer's; whatever odd content raises (ODD)."""
    pieces, merges = tuple(map(str, body["pieces"])), tuple((str(a), str(b)) for a, b in body["merges"])
    if len(set(pieces)) < len(pieces):
        raise UserError(f"{where}: {len(pieces) - len(set(pieces))} pieces of its vocabulary stand there twice")
    if unknown := sorted({p for a, b in merges for p in (a, b, a + b)} - set(pieces)):
        raise UserError(f"{where}: merges name {len(unknown)} pieces that its vocabulary lacks, such as {unknown[0]!r}")
    made = PublishedFast(float(body["scale"]), whole_number(body["min_coef"]), pieces, merges, bool(body["words"]))
    if not (1e-6 <= made.scale <= 1e6 and abs(made.min_coef) < 1 << 30 and len(pieces) <= LARGEST_VOCAB and len(merges) < 1 << 15):
        raise UserError(
            f"{where}: scale {made.scale:g}, min_token {made.min_coef}, {len(pieces)} pieces, {len(merges)} merges are no tokenizer's"
        )
    g = made.grammar
    ends = ((g.after == 0) & (g.count == 1)).any(axis=1)  # a last number can be written, whole or from its middle on
    if not ends[0] or ((g.after == 1).any() and not ends[1]):
        raise UserError(f"{where}: its pieces cannot finish every number that they begin: a sampler would get stuck")
    if not made.writable.any():
        raise UserError(f"{where}: its vocabulary has no single bytes: no coefficient could be written")
    return made


def load(folder: Path) -> PublishedFast:
    """A folder as `processor.save_pretrained` writes it. Raises: UserError that names what is missing or not supported."""
    settings, file = _read(folder / "processor_config.json"), _read(folder / "tokenizer.json")
    missing = [k for k in ("scale", "vocab_size", "min_token") if not isinstance(settings.get(k), (int, float))]
    if missing:
        raise UserError(f"{folder}/processor_config.json lacks {', '.join(missing)}: it is no FAST processor's")
    try:
        return _from_hf(settings, file, folder)
    except ODD as e:
        raise UserError(f"{folder}/tokenizer.json is damaged: {type(e).__name__}: {str(e)[:200]}") from e


def _from_hf(settings: dict, file: dict, folder: Path) -> PublishedFast:
    """Everything that would change an id and is not done here is refused by name."""
    model, cut, behind = file.get("model") or {}, file.get("pre_tokenizer") or {}, file.get("post_processor") or {}
    odd = [f"model.{k} = {model[k]!r}" for k in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    odd += [f"model.{k} = true" for k in ("ignore_merges", "byte_fallback", "fuse_unk") if model.get(k)]
    odd += ["normalizer is not null"] if file.get("normalizer") else []
    odd += [f"added_tokens has {len(file['added_tokens'])}"] if file.get("added_tokens") else []
    odd += [] if behind.get("type", "ByteLevel") == "ByteLevel" else [f"post_processor = {behind['type']!r}"]
    odd += [] if model.get("type") == "BPE" else [f"model.type = {model.get('type')!r}"]
    odd += [] if cut.get("type") == "ByteLevel" and not cut.get("add_prefix_space") else [f"pre_tokenizer = {cut!r}"]
    if odd:
        raise UserError(f"{folder}/tokenizer.json is not byte-level BPE as FAST publishes it: {'; '.join(odd)}")
    pieces = [piece for piece, _ in sorted(model["vocab"].items(), key=lambda kv: kv[1])]
    if sorted(model["vocab"].values()) != list(range(len(pieces))):
        raise ValueError("the vocabulary's ids have gaps")
    if len(pieces) > settings["vocab_size"]:
        raise ValueError(f"{len(pieces)} pieces, but processor_config.json says vocab_size {settings['vocab_size']}")
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    body = {"scale": settings["scale"], "min_coef": settings["min_token"], "pieces": pieces, "merges": merges}
    return from_json(body | {"words": cut.get("use_regex", True)}, str(folder))


def to_hf(tokenizer: PublishedFast) -> dict:
    """The inverse of `load`, for tokenizer.json."""
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": tokenizer.words}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
    }
    model |= {"vocab": {piece: i for i, piece in enumerate(tokenizer.pieces)}, "merges": [list(m) for m in tokenizer.merges]}
    out = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None}
    return out | {"pre_tokenizer": cut, "post_processor": None, "decoder": cut, "model": model}


def _read(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {e}. A published FAST tokenizer is a folder with it and its fellow.") from e
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values
