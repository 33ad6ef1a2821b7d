"""Predictions, of the observed sites that compiled code is able to draw."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import partial
from operator import itemgetter

import jax
import numpy as np
from jaxtyping import Array

from numpyro_vae.inference import quantities
from numpyro_vae.inference.derived import derived_sites
from numpyro_vae.inference.draws import look_at_whole
from numpyro_vae.inference.encoded import DrawKeys, EncodedBatch
from numpyro_vae.inference.faults import Faults
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner
from numpyro_vae.model.redraw import explain_undrawn, undrawn


def predict(
    runner: Runner,
    rows: Rows,
    rng_key: Array,
    num_samples: int,
    names: Collection[str] | None,
) -> dict[str, np.ndarray]:
    """Return draws of observed and deterministic sites; see `Posterior.predict`.

    Args:
        runner: the trained guide.
        rows: the rows.
        rng_key: the random key.
        num_samples: draws of each row.
        names: the sites that were asked for, if any were.
    """
    globals_ = runner.draw_globals(rng_key, rows, num_samples)
    derived = tuple(derived_sites(runner, rows).by_row.items())
    faults = Faults(rows)
    run = runner.watched(faults).per_draw
    draw = partial(run, quantities.predict)
    if rows.is_unobserved:
        draw = partial(run, quantities.imagine, **names_of(runner))
    options = {"num_samples": num_samples, "derived": derived, "observed": True}
    by_group = draw(rows, rng_key, globals_, **options)
    faults.look_at(rows, by_group)
    if not runner.local_names:
        look_at_whole(faults, runner, rows, rng_key, globals_)
    faults.warn()
    found = {name: by_group["posterior"][name] for name, _ in derived}
    found |= by_group["posterior_predictive"]
    require_predicted(runner, rows, found, names)
    return found


def names_of(runner: Runner) -> dict[str, tuple[str, ...]]:
    """Return the names of the sites that are drawn for rows without observations."""
    observed = runner.guide.sites.observed(runner.guide.plate.name)
    return {"latent": runner.local_names, "drawn": tuple(site.name for site in observed)}


def undrawn_sites(
    runner: Runner,
    rows: Rows,
    predicted: Collection[str] = (),
    names: Collection[str] | None = None,
) -> dict[str, str]:
    """Return by observed site that cannot be drawn why.

    Nothing is computed. The model is traced if a site is missing among those that were predicted.

    Args:
        runner: the trained guide.
        rows: the rows.
        predicted: the names of sites that were predicted, and so can be.
        names: the sites to look at; by default all.
    """
    sites, plates = runner.guide.sites, (runner.guide.plate.name, *runner.guide.segments)
    observed = {site.name for plate in plates for site in sites.observed(plate)}
    missing = (observed if names is None else observed & set(names)) - set(predicted)
    if not missing:
        return {}
    found: dict[str, str] = {}

    def trace(batch: EncodedBatch, rng_key: Array, globals_: dict[str, Array]) -> None:
        held = jax.tree.map(itemgetter(0), globals_)
        latent = batch.complete(
            batch.draw(rng_key, 1, globals_)[0], held, DrawKeys(rng_key, rng_key)
        )
        found.update(undrawn(batch.trace(latent, rng_key, observed=False)))

    key = jax.random.key(0)
    runner.trace(trace, rows, key, runner.draw_globals(key, rows, 1))
    return {name: why for name, why in found.items() if name in missing}


def require_predicted(
    runner: Runner, rows: Rows, predicted: Collection[str], names: Collection[str] | None
) -> None:
    """Warn of observed sites that could not be predicted; see `undrawn_sites`.

    Raises:
        ValueError: if a site that was asked for was not, or none was.
    """
    reasons = undrawn_sites(runner, rows, predicted, names)
    if reasons and (names is not None or not predicted):
        raise ValueError(explain_undrawn(reasons))
    warn_of_undrawn(reasons)


def warn_of_undrawn(reasons: dict[str, str]) -> None:
    """Warn of sites that are left out of the predictions."""
    if reasons:
        message = f"{explain_undrawn(reasons)} They are left out of the predictions."
        warnings.warn(message, UserWarning, stacklevel=4)
