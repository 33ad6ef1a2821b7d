"""A trained posterior in one call, with every choice made from the model and the data."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO

from numpyro_vae.choices import (
    choose_guide,
    choose_loss,
    choose_optimizers,
    choose_posterior,
    choose_refining,
    find_globals,
    judge_posterior,
    optimizers,
    why_unjudged,
)
from numpyro_vae.data.arguments import require_count
from numpyro_vae.data.arrays import count_rows, is_in_memory, take_rows
from numpyro_vae.data.stores import in_memory
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.inference.natural import able, why_unable
from numpyro_vae.inference.rows import Rows
from numpyro_vae.model.simulate import NotSimulableError
from numpyro_vae.numpyro_internals import HANDLERS
from numpyro_vae.posterior import Posterior
from numpyro_vae.training.fit import FitResult, fit
from numpyro_vae.training.simulations import Simulations

__all__ = ["amortize"]

HELD_OUT = 0.1, 1000  # the share of the rows that are held out, and the most of them
CHECKS, CHECKED = ("importance", "collapse"), 256  # and how many rows held out they look at
NATURAL_STEPS = 8  # of each row at most; it ends earlier where it gains little
GLOBAL_STEPS = 4  # of the steps of the first phase, one in so many is taken for the globals alone
TABLE, EPOCHS = 40_000, 8  # simulated rows at once, and passes over them


def amortize(
    model: Callable[..., Any],
    rng_key: Array,
    data: Any,
    *,
    guide: AmortizedGuide | None = None,
    loss: ELBO | None = None,
    plate: str | None = None,
    optimizer: Any = None,
    validation: Any = None,
    batch_axes: Any = 0,
    batch_size: int | None = None,
    num_steps: int = 4000,
    num_simulation_steps: int = 18_000,
    natural_steps: int | None = None,
    to_data: Callable[[dict], Any] | None = None,
    static_kwargs: Mapping[str, Any] | None = None,
    progress_bar: bool = True,
) -> Posterior:
    """Train a guide for a model, and return the posterior.

    First model and guide are trained by the ELBO on the data, until rows held out improve no more.
    Then the model stays, and the guide alone is trained on `Simulations`: of more data than there
    are it cannot learn the noise by heart. Two thirds of these steps are taken with `ForwardKL`, so
    that it covers each posterior. The rest is taken with the ELBO, whose gradient is without noise
    where the guide is exact. After any of these phases each row may take natural-gradient steps by
    itself. Of all this the posterior is returned of which rows held out have the best verdicts. At
    last the guide of global latents alone is trained on all rows, as their posterior is of these.

    Args:
        model: a NumPyro model with latent sites in a plate.
        rng_key: the same key gives the same posterior.
        data: as `fit` takes them, in memory.
        guide: by default `choose_guide` makes one.
        loss: of the first phase; by default an ELBO of NumPyro's for the model and the guide.
        plate: the name of the plate of the data, where the model leaves a choice.
        optimizer: one for all phases, or a function from a number of steps to one; by default
            `choose_optimizer`.
        validation: rows held out; by default a tenth of the data, at most 1,000.
        batch_axes: the datum axis of each argument, as for `fit`.
        batch_size: rows in a batch, as for `fit`; at most as many as there are to train on.
        num_steps: the most steps of the first phase.
        num_simulation_steps: steps on simulations, after the first phase; 0 leaves them out.
        natural_steps: that each row takes after the network, see `Posterior`; by default 8 if rows
            held out have better verdicts with them, or a hundredth of a nat less to lose.
        to_data: see `Simulations`.
        static_kwargs: keyword arguments of the model that are the same in every call.
        progress_bar: whether to show progress, and to print what was chosen and found.

    Raises:
        ValueError: as `fit` does; or if rows are to take steps, and the guide says no Normals.
        TypeError: if the guide is not amortized, or the optimizer is none.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> x = np.linspace(-2.0, 2.0, 100)
        >>> options = {"num_steps": 50, "num_simulation_steps": 0, "progress_bar": False}
        >>> posterior = amortize(model, jax.random.key(0), x, **options)
        >>> posterior.sample(jax.random.key(1), x, 10)["z"].shape
        (10, 100)
    """
    num_steps = require_count("num_steps", num_steps)
    num_simulation_steps = require_count("num_simulation_steps", num_simulation_steps, least=0)
    if natural_steps is not None:
        natural_steps = require_count("natural_steps", natural_steps, least=0)
    if batch_size is not None:
        batch_size = require_count("batch_size", batch_size)
    make_optimizer = None if optimizer is None else optimizers(optimizer)
    data, validation = in_memory(data), in_memory(validation)
    if not is_in_memory(data):
        raise ValueError(
            f"data is a {type(data).__name__}, expected an array, or a tuple or dict of arrays. "
            "Batches from an iterable are for fit."
        )
    kwargs, say = dict(static_kwargs or {}), print if progress_bar else _nothing
    known = {"batch_axes": batch_axes, "static_kwargs": kwargs}
    guide = choose_guide(model, data, plate=plate, **known) if guide is None else guide
    if not isinstance(guide, AmortizedGuide):
        raise TypeError(
            f"guide is {guide!r}, expected an amortized guide such as AutoAmortizedNormal(model)."
        )
    rows = Rows.read(guide, kwargs, data, batch_axes)
    make_optimizer = make_optimizer or choose_optimizers(guide, rows)
    steps_of_rows = _steps(guide, rows, kwargs, natural_steps)
    say(_choices(guide, rows))
    cuts = not (rows.data.is_whole or rows.subsamples)
    train, held_out, keys = data, validation, jax.random.split(rng_key, 7)
    if validation is None and cuts:
        train, held_out = _hold_out(data, batch_axes, rows.num_rows, keys[0])
    left = count_rows(train, batch_axes) if cuts else rows.num_rows
    size = left if rows.data.is_whole else min(batch_size or 128, left)
    batch_size = size if cuts else batch_size
    options = {"batch_axes": batch_axes, "batch_size": batch_size, "progress_bar": progress_bar}
    phase = partial(_phase, model, guide, make_optimizer, kwargs, options, say)
    steps = num_steps, max(num_steps * size // rows.num_rows, 1)
    loss = loss or choose_loss(guide)
    result = phase("The ELBO of the data", keys[1], loss, train, held_out, *steps)
    results = [result]
    try:
        for name, objective, number in choose_refining(guide, num_simulation_steps, to_data, rows):
            key = keys[1 + len(results)]
            table = max(min(TABLE, number * size // EPOCHS), size)
            simulations = Simulations(table, like=train, redraw_every=EPOCHS, to_data=to_data)
            more = {"init_params": results[-1].params, "freeze": ("model", "globals")}
            steps = number, max(number * size // table, 1)
            found = _unless_it_fails(phase, name, key, objective, simulations, None, *steps, **more)
            if found is None:
                break
            results.append(found)
    except NotSimulableError as reason:
        say(f"No simulations. {reason}")
    some = train if held_out is None else held_out
    some = take_rows(some, batch_axes, slice(CHECKED)) if cuts else some
    unjudged = why_unjudged(guide)
    results = results if cuts and not unjudged else results[-1:]
    judge = None if unjudged else partial(judge_posterior, keys[4], some)
    posterior, undone = choose_posterior(guide, results, steps_of_rows, judge)
    if undone:
        say(f"Phases undone, as rows held out had better verdicts before: the last {undone}.")
    if train is not data and any(map(find_globals(guide, rows), posterior.params)):
        key, left = keys[6], {"init_params": posterior.params, "freeze": ("model", guide.prefix)}
        number = max(num_steps // GLOBAL_STEPS, 1)
        steps = number, max(number * size // rows.num_rows, 1)
        name = "The globals, on all rows"
        found = _unless_it_fails(phase, name, key, loss, data, None, *steps, **left)
        if found is not None:
            posterior = Posterior(guide, found, natural_steps=posterior.natural_steps)
    if posterior.natural_steps:
        say(f"Rows take up to {posterior.natural_steps} natural-gradient steps after the network.")
    if unjudged:
        say(f"No checks. {unjudged}.")
    elif progress_bar:
        say(posterior.check(keys[5], some, CHECKS, progress_bar=False))
    return posterior


def _phase(
    model: Callable[..., Any],
    guide: AmortizedGuide,
    make_optimizer: Callable[[int], Any],
    static_kwargs: dict[str, Any],
    options: dict[str, Any],
    say: Callable[..., None],
    name: str,
    rng_key: Array,
    loss: ELBO,
    data: Any,
    validation: Any,
    num_steps: int,
    num_epochs: int,
    **more: Any,
) -> FitResult:
    """Train until rows held out improve no more, and say how long it took and where it ended."""
    start = time.perf_counter()
    svi = SVI(model, guide, make_optimizer(num_steps), loss, **static_kwargs)
    patience = None if validation is None else max(10, num_epochs // 5)
    more |= options | {"validation": validation, "patience": patience}
    result = fit(svi, rng_key, data, num_epochs=num_epochs, **more)
    losses = result.history.get("validation_loss")
    end = "" if losses is None else f", held-out loss {np.nanmin(losses):.3f} nats"
    epochs, seconds = len(result.history["loss"]), time.perf_counter() - start
    say(f"{name}: {epochs} epochs, {seconds:.0f} s{end}.")
    return result


def _unless_it_fails(
    phase: Callable[..., FitResult], name: str, *args: Any, **more: Any
) -> FitResult | None:
    """Return what a phase comes to; None, with a warning, if it can take no step."""
    try:
        return phase(name, *args, **more)
    except FloatingPointError as error:
        warnings.warn(
            f"This phase of amortize failed, and what came before it is kept. {name}: {error}",
            stacklevel=3,
        )
        return None


def _nothing(*_: Any) -> None:
    """Say nothing."""


def _hold_out(data: Any, batch_axes: Any, number: int, rng_key: Array) -> tuple[Any, Any]:
    """Return rows to train on, and others to validate with."""
    share, most = HELD_OUT
    order = np.asarray(jax.random.permutation(rng_key, number))
    kept = number - min(int(share * number), most)
    if kept == number:
        return data, None
    return tuple(take_rows(data, batch_axes, rows) for rows in (order[:kept], order[kept:]))


def _steps(
    guide: AmortizedGuide, rows: Rows, static: dict[str, Any], asked: int | None
) -> list[int]:
    """Return the numbers of natural-gradient steps among which rows held out decide.

    Args:
        guide: which need not be trained.
        rows: the data.
        static: the model's keyword arguments that never change.
        asked: the number that the user wants; None if there is none.

    Raises:
        ValueError: if it is above 0, and rows can take no steps.
    """
    reasons: list[str] = []

    def look() -> None:
        encoding = guide.encode_batch(None, rows.whole(), static)
        if asked:
            able(guide, encoding)
        reasons.append(why_unable(guide, encoding))

    with HANDLERS:
        jax.eval_shape(look)
    if asked is not None:
        return [asked]
    return [0] if reasons[0] else [0, NATURAL_STEPS]


def _choices(guide: AmortizedGuide, rows: Rows) -> str:
    names = [site.name for site in guide.local_sites]
    encoder = getattr(guide.encoder, "func", guide.encoder)
    encoder = getattr(encoder, "__name__", type(encoder).__name__)
    return f"{type(guide).__name__} with {encoder}, for {names} of {rows.num_rows:,} rows."
