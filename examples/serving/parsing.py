"""What a request asks for, and everything that can be wrong with it."""

import json
from typing import Any, NamedTuple

import numpy as np
from served import SIZES, Arrays, Served, key_of
from starlette.exceptions import HTTPException

FIELDS = ("inputs", "seed", "allow_novel")


class Asked(NamedTuple):
    """Rows that a client asks for."""

    inputs: Arrays
    keys: np.ndarray
    numbers: np.ndarray
    allow_novel: bool


def parse(served: Served, body: bytes) -> Asked:
    """Return what a request asks for.

    Raises:
        HTTPException: if it is wrong.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is no JSON: {error}") from None
    if not isinstance(found, dict) or set(found) - {*FIELDS} or "inputs" not in found:
        raise HTTPException(
            400, f"expected an object with inputs, and none but {', '.join(FIELDS)}"
        )
    seed, allow_novel = found.get("seed", 0), found.get("allow_novel", False)
    if type(seed) is not int or not 0 <= seed < 2**32 or type(allow_novel) is not bool:
        raise HTTPException(422, "seed is a whole number below 2**32, allow_novel true or false")
    known, given = served.manifest["inputs"], found["inputs"]
    if not isinstance(given, dict) or set(given) != set(known):
        raise HTTPException(422, f"inputs are {list(known)}")
    inputs = {name: to_array(name, given[name], known[name]) for name in known}
    pairs = ((inputs[name], served.row_axis(name)) for name in known)
    sizes = {array.shape[axis] for array, axis in pairs if axis is not None}
    if len(sizes) > 1 or not min(sizes):
        raise HTTPException(422, f"inputs have {sorted(sizes)} rows, expected one number of them")
    rows = sizes.pop()
    if rows > SIZES[-1]:
        raise HTTPException(413, f"there are {rows} rows, expected at most {SIZES[-1]}")
    return Asked(
        inputs, np.tile(key_of(seed), (rows, 1)), np.arange(rows, dtype=np.int32), allow_novel
    )


def to_array(name: str, value: Any, known: dict[str, Any]) -> np.ndarray:
    """Return an input as an array.

    Raises:
        HTTPException: naming it, if it is of another shape or type, or not finite.
    """
    shape, dtype = known["shape"], np.dtype(known["dtype"])
    try:
        given = np.array(value)
    except ValueError:  # of lists of unequal length
        given = np.array(None)
    fits = given.ndim == len(shape) and all(map(same_size, given.shape, shape))
    if not fits or given.dtype.kind not in "biuf":
        found = f"{given.dtype} of shape {given.shape}" if given.dtype != object else "no array"
        raise HTTPException(422, f"input {name} is {found}, expected {dtype} of shape {shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        array = given.astype(dtype)
    exact = dtype.kind == "f" or np.array_equal(array, given)
    if not exact or not np.isfinite(array).all():
        raise HTTPException(422, f"input {name} has values that are not finite {dtype} numbers")
    return array


def same_size(given: int, known: int | str) -> bool:
    """Return whether an axis is as long as it has to be."""
    return known == "rows" or given == known
