"""The programs of an exported posterior, loaded and run with JAX and NumPy alone."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

SIZES = (1, 16, 256)  # numbers of rows that programs are compiled for

Arrays = dict[str, np.ndarray]


def key_of(seed: int) -> np.ndarray:
    """Return the random key of a seed as programs take it."""
    return np.asarray(jax.random.key_data(jax.random.key(np.uint32(seed))))


class Served:
    """The programs of a folder, as `numpyro_vae.Posterior.export` writes it.

    Args:
        folder: the folder.

    Raises:
        ValueError: if a file is not as it was exported, or of a later format.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        if self.manifest["format"] != 1:
            raise ValueError(f"{folder} has format {self.manifest['format']}, expected 1.")
        self._read(self.manifest["arrays"])
        self.arrays = jax.device_put(dict(np.load(folder / self.manifest["arrays"])))
        self.programs = {
            name: jax.jit(export.deserialize(bytearray(self._read(told["file"]))).call)
            for name, told in self.manifest["artifacts"].items()
        }

    def _read(self, name: str) -> bytes:
        data = (self.folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest["fingerprints"][name]:
            raise ValueError(f"{self.folder / name} is not as it was exported. Copy it again.")
        return data

    def row_axis(self, name: str) -> int | None:
        """Return the axis of the rows of an input; None if they share it."""
        shape = self.manifest["inputs"][name]["shape"]
        return shape.index("rows") if "rows" in shape else None

    def warm_up(self) -> None:
        """Compile all programs for all numbers of rows, before the first request."""
        for rows in SIZES:
            inputs = {name: np.zeros(*self.shape(name, rows)) for name in self.manifest["inputs"]}
            keys, numbers = np.tile(key_of(0), (rows, 1)), np.arange(rows, dtype=np.int32)
            for name in self.programs:
                self.run(name, inputs, keys, numbers)

    def shape(self, name: str, rows: int) -> tuple[list[int], str]:
        """Return shape and dtype of an input with so many rows."""
        told = self.manifest["inputs"][name]
        return [rows if size == "rows" else size for size in told["shape"]], told["dtype"]

    def run(self, name: str, inputs: Arrays, keys: np.ndarray, numbers: np.ndarray) -> Any:
        """Run a program on rows, padded to one of ``SIZES``.

        Returns:
            Arrays as the manifest lists them in ``outputs``, padding removed.
        """
        size = next(size for size in SIZES if size >= len(numbers))
        places = np.minimum(np.arange(size), len(numbers) - 1)
        given = {
            "arrays": self.arrays,
            "keys": keys[places],
            "numbers": numbers[places],
            "inputs": {key: self.take(key, x, places) for key, x in inputs.items()},
        }
        told = self.manifest["artifacts"][name]
        found = self.programs[name](*(given[argument] for argument in told["arguments"]))
        return self.cut(name, jax.tree.map(np.asarray, found), slice(len(numbers)))

    def take(self, name: str, array: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return rows of an input."""
        axis = self.row_axis(name)
        return array if axis is None else array.take(places, axis)

    def cut(self, name: str, found: Any, rows: slice) -> Any:
        """Return some rows of what a program returned."""

        def one(told: dict[str, Any], array: Any) -> Any:
            if not isinstance(told.get("dtype"), str):
                return {key: one(told[key], array[key]) for key in told}
            return array[(slice(None),) * told["shape"].index("rows") + (rows,)]

        return one(self.manifest["artifacts"][name]["outputs"], found)
