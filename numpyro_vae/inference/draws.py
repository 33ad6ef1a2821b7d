"""Draws of latent sites, and probabilities of discrete ones, for any rows of data."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from numpyro_vae.inference import quantities
from numpyro_vae.inference.faults import Faults, is_finite
from numpyro_vae.inference.functions import Quantity
from numpyro_vae.inference.psis import NoWeightsError
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner


class SiteEncoding(NamedTuple):
    """The guide's ``loc`` and ``scale`` of a site's unconstrained values, a row a datum."""

    loc: np.ndarray
    scale: np.ndarray


def encode_sites(runner: Runner, data: Any) -> dict[str, SiteEncoding]:
    """Return location and scale of local sites; see `Posterior.encode`."""
    rows = runner.read(data)
    faults = Faults(rows)
    found = runner.watched(faults).per_batch(quantities.encode, rows)
    found = {name: SiteEncoding(*parts) for name, parts in found.items()}
    faults.look_at_draws(rows, (x[None] for parts in found.values() for x in parts))
    faults.warn()
    return found


def sample_sites(
    runner: Runner, rng_key: Array, data: Any, num_samples: int, var_names: Iterable[str] | None
) -> dict[str, np.ndarray]:
    """Return draws of latent sites; see `Posterior.sample`."""
    rows = runner.read(data)
    faults = Faults(rows)
    found = draw_sites(runner.watched(faults), rows, rng_key, num_samples, var_names)
    faults.warn()
    return found


def look_at_whole(
    faults: Faults, runner: Runner, rows: Rows, rng_key: Array, draws: dict[str, Any]
) -> None:
    """Look for faults of rows of which nothing is drawn row by row, as all latents are of all rows.

    What a NaN costs is known by the rows' densities. They are not computed where data and draws are
    finite.

    Args:
        faults: of the rows.
        runner: the trained guide.
        rows: the rows.
        rng_key: the random key.
        draws: all latent sites.
    """
    known = not rows.data.not_finite and all(is_finite(np.asarray(x)) for x in draws.values())
    if known or rows.is_unobserved:
        return
    number = len(next(iter(draws.values())))
    run = partial(runner.per_draw, quantities.likelihood, num_samples=number)
    faults.look_at_densities(rows, run(rows, rng_key, draws)["log_evidence"])


def draw_sites(
    runner: Runner, rows: Rows, rng_key: Array, num_samples: int, var_names: Iterable[str] | None
) -> dict[str, np.ndarray]:
    """Return draws of latent sites of rows; see `Posterior.sample`."""
    globals_ = runner.draw_globals(rng_key, rows, num_samples)
    local = runner.local_names
    names = choose_names(var_names, (*local, *globals_))
    kept = tuple(name for name in local if name in names)
    draw = partial(runner.per_draw, quantities.sample, names=kept, num_samples=num_samples)
    draws = draw(rows, rng_key, globals_) if kept else {}
    if runner.faults is not None and local:
        runner.faults.look_at_draws(rows, draws.values())
    elif runner.faults is not None:
        runner.per_batch(quantities.nothing, rows)
        look_at_whole(runner.faults, runner, rows, rng_key, globals_)
    for name, value in draws.items():
        axis = runner.guide.sites.sites[name].axis(runner.guide.plate)
        draws[name] = np.moveaxis(value, 1, 1 + axis)
    return {name: np.asarray((draws | globals_)[name]) for name in names}


def site_probabilities(
    runner: Runner, rng_key: Array, data: Any, *, num_samples: int, particles: int
) -> dict[str, np.ndarray]:
    """Return the probabilities of the values of enumerated sites; see `Posterior.probabilities`."""
    rows = runner.read(data)
    runner.require_density()
    plate = runner.guide.plate.name
    if not runner.guide.sites.enumerated(plate):
        raise ValueError(
            f"No site of plate {plate!r} is enumerated, so there are no probabilities. Mark a "
            'discrete site with infer={"enumerate": "parallel"}.'
        )
    globals_ = runner.draw_globals(rng_key, rows, num_samples)
    sizes, faults = {"num_samples": num_samples, "particles": particles}, Faults(rows)
    run = runner.watched(faults).per_batch
    found = run(quantities.classify, rows, rng_key, globals_, **sizes)
    faults.look_at_draws(rows, (x[None] for x in found.values()))
    faults.warn()
    return found


def densities(
    quantity: Quantity, runner: Runner, rng_key: Array, data: Any, num_samples: int, **static: Any
) -> Any:
    """Return a quantity of draws of every row, of a guide that has densities.

    Raises:
        ValueError: if it has none.
    """
    rows = runner.read(data)
    runner.require_density()
    globals_ = runner.draw_globals(rng_key, rows, num_samples)
    faults = Faults(rows)
    run = runner.watched(faults).per_draw
    found = run(quantity, rows, rng_key, globals_, num_samples=num_samples, **static)
    for values in found.values():
        faults.look_at_densities(rows, values)
    faults.warn()
    return found


def faults_of(runner: Runner, rows: Rows, numbers: np.ndarray | None = None) -> Faults:
    """Return which rows, by default all chosen ones, have values outside the support of a site."""
    faults = Faults(rows)
    some = rows if numbers is None else rows.choose(numbers)
    if some.num_chosen:
        runner.watched(faults).per_batch(quantities.nothing, some)
    return faults


@contextmanager
def told(runner: Runner, rows: Rows) -> Generator[None]:
    """Let an error of weights that are not finite say which rows have impossible data."""
    try:
        yield
    except NoWeightsError as error:
        sentences = faults_of(runner, rows).sentences()
        raise NoWeightsError(" ".join([str(error), *sentences])) from None


def listed(var_names: Iterable[str] | None) -> list[str] | None:
    """Return names as a list, also one that is given alone; None stays."""
    if var_names is None:
        return None
    return [var_names] if isinstance(var_names, str) else list(var_names)


def choose_names(var_names: Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """Return the names of the sites wanted, by default all that are known.

    Raises:
        ValueError: if a site does not exist.
    """
    given = listed(var_names)
    names = list(known) if given is None else given
    missing = sorted(set(names) - set(known))
    if missing:
        raise ValueError(f"There are no sites {missing} here, choose from {sorted(known)}.")
    return names
