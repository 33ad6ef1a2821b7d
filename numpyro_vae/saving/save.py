"""Saves a trained posterior, and loads it in another process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from numpyro_vae.data.labels import ColumnNames
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.numpyro_internals import HANDLERS
from numpyro_vae.saving.arrays import restore, store, upgrade
from numpyro_vae.saving.codec import CannotRestoreError, CannotStoreError, Json, pack, unpack
from numpyro_vae.saving.guides import (
    describe_guide,
    make_guide,
    require_same_options,
    restore_options,
    store_option,
)
from numpyro_vae.saving.manifest import MANIFEST, SavedPosteriorError, read_folder, write_folder
from numpyro_vae.saving.models import SavedModel, describe_model, read_saved, require_params
from numpyro_vae.versions import versions


def save_posterior(self: Any, path: str | os.PathLike[str]) -> None:  # noqa: D417 - a method
    """Save the posterior into a new folder, from which `Posterior.load` reads it.

    The folder has ``manifest.json``, which says how the guide was made and what its model holds,
    and ``arrays.safetensors`` with all parameters, those of the model and the state of networks
    among them. It has neither code nor data: functions and classes that are your own are passed
    again to `Posterior.load`.

    Args:
        path: the folder. It appears when it is complete.

    Raises:
        FileExistsError: if it exists.
        PermissionError: if it may not be written.
        TypeError: if the guide is not of this library, or it or a parameter is of a kind that
            cannot be made again.
        ValueError: if the guide has not read its model yet.
    """
    if not isinstance(self.guide, AmortizedGuide):
        raise TypeError(
            "The guide is not of this library, so that it cannot be made again from a file. Save "
            "posterior.params by Orbax or safetensors, and make the guide in your program."
        )
    arrays: dict[str, np.ndarray] = {}
    try:
        params = {name: pack(x, partial(store, arrays), name) for name, x in self.params.items()}
    except CannotStoreError as error:
        raise TypeError(
            f"The posterior cannot be saved: {error}, and parameters are saved as dicts, lists and "
            "tuples of arrays. Declare the network's parameters as such."
        ) from None
    with HANDLERS:
        model = describe_model(self.guide, self.static_kwargs)
    seen = self._runner.seen
    content = {
        "versions": versions(),
        "guide": describe_guide(self.guide),
        "model": model,
        "static_kwargs": {name: store_option(x) for name, x in self.static_kwargs.items()},
        "batch_axes": pack(self.batch_axes),
        "natural_steps": self.natural_steps,
        "params": params,
        "num_data": seen.num_data,
        "sizes": {name: list(size) for name, size in seen.sizes.items()},
        "columns": seen.columns,
    }
    write_folder(Path(path).absolute(), content, arrays)


def load_posterior[P](  # noqa: D417 - a method
    cls: Callable[..., P],
    path: str | os.PathLike[str],
    model: Callable[..., Any],
    encoder: Any = None,
    *,
    static_kwargs: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> P:
    """Load a posterior that `Posterior.save` has saved: without data, ready for any rows.

    It draws what the saved one draws, bit for bit on the same kind of device. The model is read
    without data and compared with the one that was saved; a model that asks for the values of its
    arguments is compared at the first call.

    Args:
        path: the folder.
        model: the model that it was trained with.
        encoder: the encoder, if it is your own; those of this library need not be passed.
        static_kwargs: keyword arguments of the model that are the same in every call, if they are
            no plain values; others are known.
        mesh: the devices to run on, as for `Posterior`.
        options: options of the guide that are functions or classes of your own, as ``inputs``;
            see `GuideOptions`.

    Raises:
        FileNotFoundError: if there is no such folder.
        SavedPosteriorError: if it is not as it was saved, or of a later version.
        TypeError: if something is to be passed again and is not, or does not exist; or if the path
            is none.
        ValueError: if the model, or an option that is passed again, is another than it was: naming
            what differs.

    Example:
        >>> import tempfile, jax, numpy as np, numpyro, numpyro.distributions as dist, optax
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_vae import AutoAmortizedNormal, Posterior, fit
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-2), Trace_ELBO())
        >>> x = np.linspace(-2.0, 2.0, 100)
        >>> result = fit(svi, jax.random.key(0), x, num_epochs=5, progress_bar=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Posterior(svi.guide, result).save(f"{folder}/posterior")
        ...     posterior = Posterior.load(f"{folder}/posterior", model)
        >>> posterior.sample(jax.random.key(1), x[:3], 10)["z"].shape
        (10, 3)
    """
    if callable(path):
        raise TypeError(
            f"path is {getattr(path, '__name__', path)!r}, which can be called, expected a folder. "
            "Pass it before the model: Posterior.load(path, model)."
        )
    path, given = Path(path).absolute(), dict(options)
    if encoder is not None:
        given["encoder"] = encoder
    manifest, arrays = read_folder(path)
    if manifest["format"] == 1:
        arrays = upgrade(arrays)
    try:
        loaded = _restore(str(path), model, manifest, arrays, given, static_kwargs or {})
    except (KeyError, AttributeError, CannotRestoreError) as error:
        raise SavedPosteriorError(
            f"{path / MANIFEST} cannot be read: {error!r}. Was it edited, or written by a later "
            "version of numpyro_vae? Upgrade, or save the posterior once more."
        ) from error
    guide, params, kwargs, batch_axes = loaded
    sizes = {name: tuple(size) for name, size in manifest.get("sizes", {}).items()}
    known = {"static_kwargs": kwargs, "batch_axes": batch_axes}
    steps = manifest.get("natural_steps", 0)
    trained = Trained(params, manifest.get("num_data"), sizes, manifest.get("columns", {}))
    return cls(guide, trained, **known, natural_steps=steps, mesh=mesh)


class Trained(NamedTuple):
    """What a loaded posterior is made of beside its guide, as of a `FitResult`."""

    params: dict[str, Any]
    num_data: int | None
    sizes: dict[str, tuple[int, int]]
    columns: ColumnNames


def _restore(
    path: str,
    model: Callable[..., Any],
    manifest: dict[str, Json],
    arrays: dict[str, np.ndarray],
    given: Mapping[str, Any],
    static_kwargs: Mapping[str, Any],
) -> tuple[AmortizedGuide, dict[str, Any], dict[str, Any], Any]:
    """Return the guide, its parameters, the static keyword arguments and the batch axes."""
    stored = manifest["static_kwargs"]
    kwargs = restore_options(path, "static keyword arguments", stored, static_kwargs)
    found = {name: store_option(value) for name, value in kwargs.items()}
    require_same_options(path, stored, found)
    guide = make_guide(path, model, manifest["guide"], given)
    leaf = partial(restore, arrays)
    params = {name: unpack(value, leaf) for name, value in manifest["params"].items()}
    saved = guide.expects = SavedModel(manifest["model"], path)
    if saved.content["arguments"] is not None:
        with HANDLERS:
            read_saved(guide, saved, kwargs)
            require_params(guide, params, saved)
    return guide, params, kwargs, unpack(manifest["batch_axes"])
