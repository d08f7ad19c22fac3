"""`Bpe.encode` compiled by numba. Imported only where numba is installed."""

from __future__ import annotations

import numba
import numpy as np

_BLOCK = 16
_NONE = np.uint16(65535)  # as bpe._NONE, of the type that compiled code compares


def compiled(*, cache: bool):
    """`merge_rows`, compiled at its first call. cache: keep what was compiled for later processes."""
    return numba.njit(cache=cache, nogil=True)(merge_rows)


def merge_rows(rows, start, wall, left, right, result, ranks):
    """See Bpe.encode; ranks u16[wall + 1, wall + 1], 65535 for pairs that do not merge.

    Of a row, `rank[i]` is that of the pair that begins at place i, and `low` holds for every block of 16 places a number not above the
    lowest of them: so the lowest rank of all, and where it is, are found without looking at each place.
    """
    n, longest = len(start) - 1, 0
    for i in range(n):
        longest = max(longest, start[i + 1] - start[i])
    most = (longest + _BLOCK - 1) // _BLOCK
    ids, after, before = np.empty(longest, np.int32), np.empty(longest, np.int32), np.empty(longest, np.int32)
    rank, low = np.empty(most * _BLOCK + 1, np.uint16), np.empty(most + 1, np.uint16)
    out, ends, total = np.empty(len(rows), np.int32), np.zeros(n + 1, np.int64), 0
    for i in range(n):
        length = start[i + 1] - start[i]
        blocks = (length + _BLOCK - 1) // _BLOCK
        for at in range(length):
            ids[at], after[at], before[at] = rows[start[i] + at], at + 1, at - 1
        for at in range(length - 1):
            rank[at] = ranks[ids[at], ids[at + 1]]
        for at in range(max(length - 1, 0), blocks * _BLOCK):
            rank[at] = _NONE
        for block in range(blocks):
            low[block] = 0
        best = _NONE - _NONE  # 0: makes every block's number exact in the first round
        while best != _NONE:
            new, again = result[best], False
            for block in range(blocks):
                if low[block] > best:
                    continue
                for at in range(block * _BLOCK, (block + 1) * _BLOCK):
                    if rank[at] != best or again:
                        continue
                    gone = after[at]
                    nxt, made = after[gone], _NONE
                    ids[at], after[at], rank[gone] = new, nxt, _NONE
                    if nxt < length:
                        before[nxt], made = at, ranks[new, ids[nxt]]
                    rank[at] = made
                    again = again or made < best  # what was just made is needed by an earlier merge
                    if before[at] >= 0:
                        made = ranks[ids[before[at]], new]
                        rank[before[at]] = made
                        low[before[at] // _BLOCK] = min(low[before[at] // _BLOCK], made)
                        again = again or made < best
                lowest = _NONE
                for at in range(block * _BLOCK, (block + 1) * _BLOCK):
                    lowest = min(lowest, rank[at])
                low[block] = lowest
                if again:
                    break
            best = _NONE
            for block in range(blocks):
                best = min(best, low[block])
        at = 0
        while at < length:
            if ids[at] != wall:
                out[total] = ids[at]
                total += 1
            at = after[at]
        ends[i + 1] = total
    return out[:total].copy(), ends
