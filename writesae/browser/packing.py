"""From arrays to text that is small and safe inside a page: base64 of narrow integers, as JSON in which no tag can begin.

An array is {"type", "shape", "data"}: numpy's name of a little-endian number, such as "u2", the shape, and the bytes in
base64. A quantised one has {"scale": an array of one number per row} too: an entry is the integer times its row's scale.
static/data.js reads them back.
"""

import base64
import json
from typing import Any

import numpy as np

Packed = dict[str, Any]


def pack(array: np.ndarray) -> Packed:
    """Whole numbers in the narrowest type that holds them, all others as float32 (what is not finite stays so)."""
    array = np.asarray(array)
    if array.dtype.kind in "biu":
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        kinds = ("i1", "i2", "i4") if low < 0 else ("u1", "u2", "u4")
        for kind in kinds:
            if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                return _bytes_of(array, kind)
        raise ValueError(f"whole numbers from {low} to {high} do not fit into 32 bits")
    return _bytes_of(array, "f4")


def pack_quantised(array: np.ndarray) -> Packed:
    """Each row in 16 bits of its own largest size; off by at most 1/65,535 of that (1/32,767 where there are signs)."""
    array = np.asarray(array, dtype=np.float64)
    kind = "i2" if array.size and array.min() < 0 else "u2"
    largest = np.abs(array).max(axis=1) if array.size else np.zeros(len(array))
    scale = largest / np.iinfo(kind).max
    steps = np.rint(array / np.where(scale > 0, scale, 1.0)[:, None])
    return {**_bytes_of(steps, kind), "scale": pack(scale)}


def _bytes_of(array: np.ndarray, kind: str) -> Packed:
    data = np.ascontiguousarray(array, dtype=f"<{kind}").tobytes()
    return {"type": kind, "shape": list(array.shape), "data": base64.b64encode(data).decode("ascii")}


def embedded(value: Any) -> str:
    """JSON for the inside of a script element: no "<" is left, so nothing in it can end the element or open a comment.

    Plain ASCII, so that half of a surrogate pair from a broken file is as harmless as anything else.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
