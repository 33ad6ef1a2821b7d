"""Exports a trained posterior as programs that JAX runs without this library."""

from __future__ import annotations

import importlib.util
import io
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from numpyro_vae.checks.base import Subject
from numpyro_vae.checks.novelty import NoveltyReference
from numpyro_vae.data.arguments import require_count
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.model.trace import NEEDS_VALUES
from numpyro_vae.numpyro_internals import HANDLERS
from numpyro_vae.saving.codec import Json
from numpyro_vae.saving.manifest import require_new, write_files
from numpyro_vae.serving.describe import (
    ROWS,
    describe_importance,
    describe_inputs,
    describe_latents,
    describe_novelty,
    told_shapes,
)
from numpyro_vae.serving.inputs import Inputs
from numpyro_vae.serving.leaves import Leaves
from numpyro_vae.serving.programs import SEED, Programs, reference_arrays
from numpyro_vae.serving.refusals import (
    choose_artifacts,
    require_platforms,
    require_rows,
    require_same_alone,
)
from numpyro_vae.versions import versions

KIND, FORMAT = "numpyro_vae.export", 1
ARRAYS = "arrays.npz"


def export_posterior(  # noqa: D417 - a method
    self: Any,
    path: str | os.PathLike[str],
    data: Any,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    num_samples: int = 500,
    artifacts: Collection[str] | None = None,
) -> dict[str, Json]:
    """Export the posterior into a new folder, from which JAX and NumPy alone serve it.

    The folder has a compiled program for each of the artifacts, for any number of rows,
    ``arrays.npz`` with the parameters and the reference, and ``manifest.json``, which says what
    they take and return. See the page on serving for the few lines that load it. Each program is
    checked against the posterior before the folder is written.

    Args:
        path: the folder. It appears when it is complete.
        data: rows like those of the training, as for `fit`, preferably held out from it. New rows
            are compared with them by ``novelty``, which is left out if they are less than 400.
        platforms: where the programs can be run: ``"cpu"``, ``"cuda"``, ``"rocm"``, ``"tpu"``. They
            need not be here.
        num_samples: draws of each row.
        artifacts: which programs to export: ``encode``, ``sample``, ``importance`` (draws and their
            log importance weights) and ``novelty``. By default those that the guide has; the
            manifest's ``left_out`` says why it does not have others.

    Returns:
        The manifest.

    Raises:
        FileExistsError: if the folder exists.
        ImportError: if flatbuffers is not installed, which JAX writes programs with.
        PermissionError: if the folder may not be written.
        ValueError: if rows have no posteriors of their own, a platform or an artifact is unknown,
            or an artifact was asked for and cannot be had.

    Example:
        >>> import tempfile, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_vae import AutoAmortizedNormal, Posterior, fit
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-2), Trace_ELBO())
        >>> x = np.linspace(-2.0, 2.0, 400)
        >>> result = fit(svi, jax.random.key(0), x, num_epochs=1, progress_bar=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     manifest = Posterior(svi.guide, result).export(f"{folder}/served", x)
        >>> list(manifest["artifacts"])
        ['encode', 'sample', 'importance', 'novelty']
        >>> manifest["inputs"]
        {'x': {'shape': ['rows'], 'dtype': 'float32'}}
    """
    path = Path(path).absolute()
    require_new(path)
    _require_flatbuffers()
    platforms = require_platforms(platforms)
    num_samples = require_count("num_samples", num_samples)
    runner: Runner = self._runner
    rows = runner.read(data)
    require_rows(runner, rows)
    names, left_out = choose_artifacts(runner, rows, artifacts)
    params, leaves = Leaves.of(runner.params)
    programs = Programs(runner, Inputs.of(runner.guide.model, rows), leaves, num_samples)
    _require_one_row(programs, params)
    reference = _reference(runner, rows) if "novelty" in names else None
    arrays = params if reference is None else params | reference_arrays(reference)
    weighs = not {"importance", "novelty"}.isdisjoint(names)
    require_same_alone(programs, arrays, rows, weighs=weighs)
    files = {name: _program(name, programs, arrays, platforms) for name in names}
    content = _content(programs, platforms, reference)
    content["artifacts"] = {name: told for name, (_, told) in files.items()}
    content["left_out"] = left_out
    if "importance" in names:
        content["importance"] = describe_importance(num_samples)
    written = {told["file"]: data for data, told in files.values()} | {ARRAYS: _npz(arrays)}
    return write_files(path, content, written)


def _content(
    programs: Programs, platforms: tuple[str, ...], reference: NoveltyReference | None
) -> dict[str, Json]:
    """Return what the manifest says of all programs."""
    return {
        "kind": KIND,
        "format": FORMAT,
        "versions": versions(),
        "platforms": list(platforms),
        "num_samples": programs.num_samples,
        "arrays": ARRAYS,
        "keys": {"random_bits": str(jax.random.key_impl(jax.random.key(0))), "dtype": "uint32"},
        "inputs": describe_inputs(programs),
        "latents": describe_latents(programs),
        "sizes": {name: list(size) for name, size in programs.runner.seen.sizes.items()},
        "importance": None,
        "novelty": reference and describe_novelty(reference),
    }


def _require_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError(
            "JAX writes and reads exported programs with flatbuffers, which is not installed: "
            "pip install 'numpyro-vae[serving]'."
        )


def _reference(runner: Runner, rows: Rows) -> NoveltyReference:
    return NoveltyReference.read(Subject(runner, rows, jax.random.key(SEED)), rows)


def _arguments(name: str, programs: Programs, arrays: dict[str, Any], size: Any) -> dict[str, Any]:
    """Return the shapes of a program's arguments, by name."""
    keys = jax.random.key_data(jax.random.key(0))
    by_row = {
        "keys": jax.ShapeDtypeStruct((size, *keys.shape), keys.dtype),
        "numbers": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    given = {"arrays": jax.tree.map(_shape, arrays)}
    if name in ("sample", "importance"):
        given |= by_row
    return given | {"inputs": programs.inputs.shapes(size)}


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _require_one_row(programs: Programs, arrays: dict[str, Any]) -> None:
    """Raise ValueError if the model does not run on one row whose values are not known."""
    given = _arguments("sample", programs, arrays, 1)
    try:
        with HANDLERS:
            jax.eval_shape(programs.sample, *given.values())
    except Exception as error:  # of any kind, as the model's own code raises it
        values = isinstance(error, NEEDS_VALUES)
        why = "asks for the values of its arguments" if values else "does not run on a single row"
        raise ValueError(
            f"The posterior cannot be exported: the model or the guide {why}, and what is served "
            f"is a program for each row, whatever its values: {error} Decide by shapes alone, or "
            "give the values as static keyword arguments."
        ) from error


def _program(
    name: str, programs: Programs, arrays: dict[str, Any], platforms: tuple[str, ...]
) -> tuple[bytes, Json]:
    """Return an artifact, and what the manifest says of it."""
    given = _arguments(name, programs, arrays, export.symbolic_shape(ROWS)[0])
    method: Callable[..., Any] = getattr(programs, name)
    try:
        with HANDLERS:
            exported = export.export(jax.jit(method), platforms=platforms)(*given.values())
        data = bytes(exported.serialize())
    except Exception as error:  # of any kind, as each primitive has its own
        raise ValueError(
            f"JAX cannot export {name} for {', '.join(platforms)} with a symbolic number of rows: "
            f"{error} Export for the platforms that are needed, as in platforms=('cpu',), or leave "
            f"{name} out by artifacts=."
        ) from error
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    told = {"file": f"{name}.jax", "arguments": list(given), "outputs": told_shapes(outputs)}
    return data, told


def _npz(arrays: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **{name: np.asarray(x) for name, x in arrays.items()})
    return file.getvalue()
