"""Results that are written to Zarr part by part, and gone on with where a run was killed."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Array

from numpyro_vae.data.arguments import require_key
from numpyro_vae.data.batch import Batch
from numpyro_vae.data.devices import ONE_DEVICE
from numpyro_vae.inference import quantities
from numpyro_vae.inference.encoded import Trained
from numpyro_vae.inference.functions import draws_of_globals, of_batch
from numpyro_vae.inference.predictable import names_of
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.numpyro_internals import HANDLERS
from numpyro_vae.training.identity import digest, digest_of_program

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

PART_BYTES = 2**27  # of results that are computed before they are written
PART_ROWS = 2**17  # at most, however small they are
CHUNK_BYTES = 2**23  # of a variable in a file
MANIFEST, RESULTS = "progress.json", "results.zarr"
DRAWN = ("posterior",)
ATTRIBUTE = "_NC_NUMPYRO_VAE"  # xarray leaves out attributes with such names

Identity = dict[str, str]
Notes = dict[str, Any]


def identify(runner: Runner, rows: Rows, rng_key: Array, **options: Any) -> Identity:
    """Return by name what tells results from others.

    Args:
        runner: the trained guide.
        rows: the data.
        rng_key: the random key.
        options: all that results depend on beside these.
    """
    require_key(rng_key)
    arrays = {
        "parameters of the posterior": runner.params,
        "static keyword arguments": runner.static_kwargs,
        "rng_key": jax.random.key_data(rng_key),
    }
    return {
        "the data": rows.fingerprint_of_all,
        "the guide": type(getattr(runner.guide, "guide", runner.guide)).__name__,
        "what model and guide compute": _program(runner, rows),
        **{f"the fingerprint of the {name}": digest(value) for name, value in arrays.items()},
        **{name: str(value) for name, value in options.items()},
    }


def _program(runner: Runner, rows: Rows) -> str:
    """Return a fingerprint of what is computed of a row, as parameters do not tell all guides."""
    guide, batch = runner.guide, rows.whole()
    batch = replace(batch, layout=replace(batch.layout, devices=ONE_DEVICE))  # whichever they are
    draw = partial(draws_of_globals, guide.sample_globals, runner.static_kwargs, 1)
    quantity = partial(_quantity(runner, rows), num_samples=1)

    def run(trained: Trained, batch: Batch, rng_key: Array) -> Any:
        globals_ = draw(trained.params, batch, rng_key)
        return of_batch(runner.encode, quantity, trained, batch, None, rng_key, globals_)

    trained = runner.trained(rows)
    with HANDLERS:
        guide.set_up_globals(runner.params, rows.args, rows.kwargs, rows.held)
        return digest_of_program(jax.make_jaxpr(run)(trained, batch, jax.random.key(0)))


def _quantity(runner: Runner, rows: Rows) -> Callable[..., Any]:
    """Return what takes the most of guide and model to compute."""
    if rows.is_unobserved:
        return partial(quantities.imagine, derived=(), **names_of(runner))
    if not runner.guide.local_sites:
        return quantities.likelihood
    if runner.guide.has_density:
        return quantities.weigh
    return partial(quantities.draws, groups=DRAWN, derived=())


def path_of(store: Any) -> Path:
    """Return the path that ``store=`` means.

    Raises:
        TypeError: if it is no path.
        ValueError: if it is the address of something that is not on this machine.
    """
    if not isinstance(store, str | os.PathLike):
        raise TypeError(
            f"store is of type {type(store).__name__}, expected the path of a folder to be made."
        )
    if "://" in os.fspath(store):
        raise ValueError(
            f"store is {str(store)!r}, expected the path of a folder on this machine. Write it "
            "there, and copy it when it is complete."
        )
    return Path(store)


def rows_of_part(row_bytes: int, num_rows: int, at_least: int = 1) -> int:
    """Return how many rows are computed before they are written, a power of two.

    Args:
        row_bytes: the results of a row.
        num_rows: how many rows there are.
        at_least: rows that are computed together, a power of two.
    """
    found = int(np.clip(PART_BYTES // max(row_bytes, 1), 1, PART_ROWS))
    return min(max(1 << (found.bit_length() - 1), at_least), num_rows)


@dataclass(frozen=True, eq=False)
class Regions:
    """A folder of Zarr that is written region by region, in parts of consecutive rows.

    What is not complete has another name, ``path`` with ``.partial`` behind it, and beside the
    results a file that says how far they are; so a folder at ``path`` is always complete.

    Args:
        path: the folder, which is made.
        identity: by name what tells the results from others.
        dim: the name of the rows' dimension.
        num_rows: how many there are.
        part_rows: how many rows a part has.

    Raises:
        ImportError: if zarr is not installed.
    """

    path: Path
    identity: Identity
    dim: str
    num_rows: int
    part_rows: int

    def __post_init__(self) -> None:
        try:
            import zarr  # noqa: F401 - what xarray writes with
        except ImportError as error:
            raise ImportError(
                "store= writes Zarr, which takes the package zarr: pip install "
                "'numpyro-vae[stores]', or leave store= out."
            ) from error

    @property
    def folder(self) -> Path:
        """Where the results are until they are complete."""
        return self.partial / RESULTS

    @property
    def partial(self) -> Path:
        """The folder of what is not complete."""
        return self.path.with_name(f"{self.path.name}.partial")

    def write(
        self,
        make: Callable[[int, int, int], DataTree],
        finish: Callable[[Path], Notes] | None = None,
    ) -> Notes:
        """Compute and write what is not there yet, and return what `finish` noted.

        Args:
            make: from the first row of a part, the one after its last, and the rows of a part, to
                its results; variables without rows are taken from the first part.
            finish: called with the folder when all rows are written, returns what is to be noted.

        Raises:
            ValueError: if there is another folder, or one of other results, naming what differs.
            OSError: if nothing can be written there.
        """
        if self.path.exists():
            return self._require_same(_read_attribute(self.path), self.path)["notes"]
        try:
            done, size = self._resume()
        except OSError as error:
            raise type(error)(
                f"{self.partial} cannot be written: {error.strerror}. What is computed is kept "
                "there until it is complete. Pass as store= a path in a folder that you may write."
            ) from error
        for start in range(done, self.num_rows, size):
            stop = min(start + size, self.num_rows)
            tree = make(start, stop, size)
            (self._fill if start else self._create)(tree, start, stop)
            self._record(stop, size)
        notes = finish(self.folder) if finish else {}
        _write_attribute(self.folder, {"identity": self.identity, "notes": notes})
        self.folder.rename(self.path)
        shutil.rmtree(self.partial)
        return notes

    def _resume(self) -> tuple[int, int]:
        """Return how many rows are written, and how many are in a part."""
        known = None
        is_empty = self.partial.is_dir() and not any(self.partial.iterdir())
        if self.partial.exists() and not is_empty:
            known = self._require_same(_read_json(self.partial / MANIFEST), self.partial)
        if known is None or not known["rows"] or not self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.partial.mkdir(parents=True, exist_ok=True)
            self._record(0, self.part_rows)
            return 0, self.part_rows
        return known["rows"], known["part_rows"]

    def _record(self, rows: int, part_rows: int) -> None:
        """Write how far the results are, in one go."""
        found = {"identity": self.identity, "rows": rows, "part_rows": part_rows}
        file = self.partial / f"{MANIFEST}.new"
        file.write_text(json.dumps(found, indent=1), "utf-8")
        os.replace(file, self.partial / MANIFEST)

    def _require_same(self, known: Any, path: Path) -> Any:
        if not isinstance(known, dict) or "identity" not in known:
            raise ValueError(
                f"{path} exists and was not written by store=. Pass a path at which there is "
                "nothing, or remove it."
            )
        for name in (*known["identity"], *self.identity):
            before, now = (x.get(name, "not there") for x in (known["identity"], self.identity))
            if before != now:
                remedy = "Pass what they were written with, or another path."
                if path == self.partial:
                    remedy = f"They are not complete: {remedy[:-1]}, or remove them to begin anew."
                raise ValueError(
                    f"{path} has other results: {name} was {before}, and now is {now}. {remedy}"
                )
        return known

    # -- in Zarr ----------------------------------------------------------------------------------

    def _create(self, tree: DataTree, start: int, stop: int) -> None:
        """Write the first part, and make room for the others."""
        import zarr

        nodes = {node.path: node.to_dataset(inherit=False) for node in tree.subtree}
        encoding = {path: self._encoding(dataset) for path, dataset in nodes.items()}
        tree.to_zarr(self.folder, mode="w", encoding=encoding, consolidated=False, zarr_format=3)
        root = zarr.open_group(self.folder, mode="r+")
        for path, dataset in nodes.items():
            for name, variable in self._by_row(dataset):
                array: Any = root[f"{path}/{name}".strip("/")]
                axis = variable.dims.index(self.dim)
                array.resize((*array.shape[:axis], self.num_rows, *array.shape[axis + 1 :]))

    def _encoding(self, dataset: Dataset) -> dict[str, Any]:
        """Return the chunks of each variable, whole ones in each part."""
        found = {}
        for name, variable in self._by_row(dataset):
            rows = variable.sizes[self.dim]
            fit = max(1, CHUNK_BYTES * rows // max(variable.nbytes, 1))
            size = min(1 << (fit.bit_length() - 1), rows)
            sizes = {**variable.sizes, self.dim: size}
            found[name] = {"chunks": tuple(max(1, size) for size in sizes.values())}
        return found

    def _by_row(self, dataset: Dataset) -> Iterator[tuple[Any, Any]]:
        return ((name, x) for name, x in dataset.variables.items() if self.dim in x.dims)

    def _fill(self, tree: DataTree, start: int, stop: int) -> None:
        """Write a part into its region."""
        for node in tree.subtree:
            dataset = node.to_dataset(inherit=False)
            names = [name for name, _ in self._by_row(dataset)]
            if names:
                others = [name for name in dataset.variables if name not in names]
                # xarray writes no index into a region, but a coordinate without one.
                part = dataset.drop_vars(others).drop_indexes(self.dim, errors="ignore")
                region = {self.dim: slice(start, stop)}
                part.to_zarr(
                    self.folder, group=node.path, region=region, mode="r+", consolidated=False
                )


def _read_json(file: Path) -> Any:
    """Return what a file holds, None if there is none or it holds no JSON."""
    try:
        return json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def read_notes(path: Path) -> Notes | None:
    """Return what was noted of complete results, or None if there are none."""
    found = _read_attribute(path) if path.exists() else None
    return found["notes"] if isinstance(found, dict) and "notes" in found else None


def _read_attribute(path: Path) -> Any:
    """Return what a folder says of itself, or None if it is none of ours."""
    import zarr

    try:
        return dict(zarr.open_group(path, mode="r").attrs).get(ATTRIBUTE)
    except Exception:  # of any kind, as any folder or file may stand there
        return None


def _write_attribute(path: Path, value: Mapping[str, Any]) -> None:
    """Let a folder say of itself what it holds, and gather its metadata in one place."""
    import zarr

    root = zarr.open_group(path, mode="r+")
    root.attrs[ATTRIBUTE] = dict(value)
    with warnings.catch_warnings():  # of a form that Zarr's third format does not promise yet
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(path)
