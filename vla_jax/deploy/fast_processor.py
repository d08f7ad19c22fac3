"""FAST action tokens for programs that know nothing of vla_jax: LeRobot and openpi load this file, with what lies beside it, by
AutoProcessor. It is copied into exports for them, and imports numpy alone (and `tokenizers` for a published tokenizer)."""

import json
from pathlib import Path

import numpy as np


class FastProcessor:
    """Normalised action chunks [n steps dims] -> lists of ids, and back. `bpe_tokenizer`, `min_token` and `scale` are what LeRobot uses."""

    def __init__(self, bpe_tokenizer, min_token, scale):
        self.bpe_tokenizer, self.min_token, self.scale = bpe_tokenizer, min_token, scale

    @classmethod
    def from_pretrained(cls, folder, **_):
        folder = Path(folder)
        told = json.loads((folder / "processor_config.json").read_text())
        kind = Published if (folder / "tokenizer.json").is_file() else Fitted
        return cls(kind(folder), told["min_token"], told["scale"])

    @classmethod
    def register_for_auto_class(cls, *_):
        """transformers calls it; the file that it would copy is there already."""

    def __call__(self, chunks):
        chunks = np.asarray(chunks, np.float64)
        whole = np.rint(np.einsum("ft,ntd->nfd", _dct(chunks.shape[1]) * self.scale, chunks)).reshape(len(chunks), -1)
        return [self.bpe_tokenizer.encode_numbers((row - self.min_token).astype(int).tolist()) for row in whole]

    def decode(self, tokens, *, time_horizon, action_dim):
        """Sequences of ids -> [n steps dims]. What is too long is cut, what is too short is filled up with zero coefficients."""
        out = np.zeros((len(tokens), time_horizon * action_dim))
        for row, ids in zip(out, tokens):
            numbers = [ord(c) + self.min_token for c in self.bpe_tokenizer.decode(ids)][: len(row)]
            row[: len(numbers)] = numbers
        return np.einsum("ft,nfd->ntd", _dct(time_horizon), out.reshape(-1, time_horizon, action_dim)) / self.scale


class Fitted:
    """Ids that stand for numbers, or for two earlier ids; a number is the character with its code."""

    def __init__(self, folder):
        told = json.loads((folder / "fast.json").read_text())
        self.spelt = [chr(i) for i in range(told["alphabet"])]
        self.rank = {}
        for a, b in told["merges"]:
            self.rank[a, b] = len(self.spelt)
            self.spelt.append(self.spelt[a] + self.spelt[b])
        self.top = told["alphabet"] - 1

    def encode_numbers(self, numbers):
        ids = [min(max(n, 0), self.top) for n in numbers]
        while len(ids) > 1:
            new = min(self.rank.get(pair, len(self.spelt)) for pair in zip(ids, ids[1:]))
            if new == len(self.spelt):
                break
            out, i = [], 0
            while i < len(ids):
                pair = i + 1 < len(ids) and self.rank.get((ids[i], ids[i + 1])) == new
                out.append(new if pair else ids[i])
                i += 1 + pair
            ids = out
        return ids

    def decode(self, ids):
        return "".join(self.spelt[i] for i in map(int, ids) if 0 <= i < len(self.spelt))


class Published:
    """Byte-level pairs, by HF's own tokenizers."""

    def __init__(self, folder):
        from tokenizers import Tokenizer

        self.bpe = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode_numbers(self, numbers):
        return self.bpe.encode("".join(chr(max(n, 0)) for n in numbers)).ids

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids])


def _dct(steps):
    """The orthonormal DCT-II [frequencies steps]."""
    n = np.arange(steps)
    matrix = np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / (2 * steps)) * np.sqrt(2 / steps)
    matrix[0] /= np.sqrt(2)
    return matrix
