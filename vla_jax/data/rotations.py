"""Rotations between the formats in which robots record them, over f32[.. n] arrays. All pass through matrices.

euler_xyz are extrinsic x, y, z angles (roll, pitch, yaw): R = Rz(yaw) Ry(pitch) Rx(roll). rot6d are the matrix's first two
columns, orthonormalised on the way in (Zhou et al., 2019). Everything is computed in float64.
"""

from __future__ import annotations

import numpy as np

WIDTH = {"quat_xyzw": 4, "quat_wxyz": 4, "matrix": 9, "rot6d": 6, "euler_xyz": 3, "axis_angle": 3}


def convert(x: np.ndarray, source: str, target: str) -> np.ndarray:
    """[.. WIDTH[source]] -> [.. WIDTH[target]]."""
    return from_matrix(to_matrix(x, source), target)


def to_matrix(x: np.ndarray, fmt: str) -> np.ndarray:
    """[.. n] -> f64[.. 3 3]. A quaternion of length zero becomes NaN, which the index counts as bad data."""
    x = np.asarray(x, np.float64)
    if fmt == "matrix":
        return x.reshape(*x.shape[:-1], 3, 3)
    if fmt == "rot6d":
        a, b = x[..., :3], x[..., 3:]
        a = _unit(a)
        b = _unit(b - (a * b).sum(-1, keepdims=True) * a)
        return np.stack([a, b, np.cross(a, b)], axis=-1)
    if fmt == "euler_xyz":
        (sr, sp, sy), (cr, cp, cy) = (np.moveaxis(f(x), -1, 0) for f in (np.sin, np.cos))
        rows = [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
        return np.stack([np.stack(r, axis=-1) for r in rows], axis=-2)
    if fmt == "axis_angle":
        angle = np.linalg.norm(x, axis=-1, keepdims=True)
        # sin(t/2)/t tends to 1/2: no division by zero for the identity
        scale = np.where(angle > 1e-9, np.sin(angle / 2) / np.where(angle > 1e-9, angle, 1), 0.5)
        return _quaternion_to_matrix(np.concatenate([x * scale, np.cos(angle / 2)], axis=-1))
    return _quaternion_to_matrix(_unit(np.roll(x, -1, axis=-1) if fmt == "quat_wxyz" else x))


def from_matrix(r: np.ndarray, fmt: str) -> np.ndarray:
    """f64[.. 3 3] -> f64[.. n]. Quaternions come with w >= 0, angles in (-pi, pi]."""
    if fmt == "matrix":
        return r.reshape(*r.shape[:-2], 9)
    if fmt == "rot6d":
        return np.concatenate([r[..., :, 0], r[..., :, 1]], axis=-1)
    if fmt == "euler_xyz":
        pitch = np.arctan2(-r[..., 2, 0], np.hypot(r[..., 0, 0], r[..., 1, 0]))
        locked = np.hypot(r[..., 0, 0], r[..., 1, 0]) < 1e-7  # pitch of 90 degrees: roll and yaw are one; yaw is set to 0
        roll = np.where(locked, np.arctan2(-r[..., 1, 2], r[..., 1, 1]), np.arctan2(r[..., 2, 1], r[..., 2, 2]))
        yaw = np.where(locked, 0.0, np.arctan2(r[..., 1, 0], r[..., 0, 0]))
        return np.stack([roll, pitch, yaw], axis=-1)
    q = _matrix_to_quaternion(r)
    if fmt == "axis_angle":
        size = np.linalg.norm(q[..., :3], axis=-1, keepdims=True)
        angle = 2 * np.arctan2(size, q[..., 3:])
        return q[..., :3] * np.where(size > 1e-9, angle / np.where(size > 1e-9, size, 1), 2.0)
    return np.roll(q, 1, axis=-1) if fmt == "quat_wxyz" else q


def _unit(x: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _quaternion_to_matrix(q: np.ndarray) -> np.ndarray:
    x, y, z, w = np.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(r, axis=-1) for r in rows], axis=-2)


def _matrix_to_quaternion(r: np.ndarray) -> np.ndarray:
    """Shepperd's method: of the four forms the one whose divisor is largest."""
    m = lambda i, j: r[..., i, j]
    squares = np.stack(
        [
            1 + m(0, 0) - m(1, 1) - m(2, 2),
            1 - m(0, 0) + m(1, 1) - m(2, 2),
            1 - m(0, 0) - m(1, 1) + m(2, 2),
            1 + m(0, 0) + m(1, 1) + m(2, 2),
        ],
        axis=-1,
    )
    forms = [
        [squares[..., 0], m(1, 0) + m(0, 1), m(0, 2) + m(2, 0), m(2, 1) - m(1, 2)],
        [m(1, 0) + m(0, 1), squares[..., 1], m(2, 1) + m(1, 2), m(0, 2) - m(2, 0)],
        [m(0, 2) + m(2, 0), m(2, 1) + m(1, 2), squares[..., 2], m(1, 0) - m(0, 1)],
        [m(2, 1) - m(1, 2), m(0, 2) - m(2, 0), m(1, 0) - m(0, 1), squares[..., 3]],
    ]
    table = np.stack([np.stack(f, axis=-1) for f in forms], axis=-2)
    best = np.where(np.isnan(squares).any(-1), 0, np.argmax(np.nan_to_num(squares), axis=-1))
    q = _unit(np.take_along_axis(table, best[..., None, None], axis=-2)[..., 0, :])
    return np.where(q[..., 3:] < 0, -q, q)
