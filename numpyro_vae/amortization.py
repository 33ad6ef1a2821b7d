"""A trained posterior in one call, with every choice made from the model and the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array
from numpyro.infer.elbo import ELBO

from numpyro_vae.choices import choose_guide, choose_loss, choose_optimizers, optimizers
from numpyro_vae.data.arguments import require_count, require_key
from numpyro_vae.data.arrays import is_in_memory
from numpyro_vae.data.labels import column_names, in_order
from numpyro_vae.data.stores import in_memory
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.inference.natural import able, why_unable
from numpyro_vae.inference.rows import Rows
from numpyro_vae.model.signatures import in_form
from numpyro_vae.numpyro_internals import HANDLERS
from numpyro_vae.phases import Phases, Split
from numpyro_vae.posterior import Posterior

__all__ = ["amortize"]

NATURAL_STEPS = 8  # of each row at most; it ends earlier where it gains little


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
        >>> import numpy as np, numpyro, numpyro.distributions as dist
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
    require_key(rng_key)
    num_steps = require_count("num_steps", num_steps)
    num_simulation_steps = require_count("num_simulation_steps", num_simulation_steps, least=0)
    if natural_steps is not None:
        natural_steps = require_count("natural_steps", natural_steps, least=0)
    if batch_size is not None:
        batch_size = require_count("batch_size", batch_size)
    make_optimizer = None if optimizer is None else optimizers(optimizer)
    columns = column_names(data, batch_axes)
    if validation is not None:
        validation = in_form(validation, model, by_position=not isinstance(data, dict))
        validation = in_memory(in_order(validation, batch_axes, columns, "validation data"))
    data = in_memory(data)
    if not is_in_memory(data):
        raise ValueError(
            f"data is a {type(data).__name__}, expected an array, or a tuple or dict of arrays. "
            "Batches from an iterable are for fit."
        )
    static = dict(static_kwargs or {})
    if guide is None:
        known = {"batch_axes": batch_axes, "static_kwargs": static}
        guide = choose_guide(model, data, plate=plate, **known)
    if not isinstance(guide, AmortizedGuide):
        raise TypeError(
            f"guide is {guide!r}, expected an amortized guide such as AutoAmortizedNormal(model)."
        )
    rows = Rows.read(guide, static, data, batch_axes)
    if plate not in (None, guide.plate.name):
        raise ValueError(
            f"plate={plate!r}, and the guide is of plate {guide.plate.name!r}. Leave plate= out, "
            f"or pass a guide of that plate, as AutoAmortizedNormal(model, plate={plate!r})."
        )
    make_optimizer = make_optimizer or choose_optimizers(guide, rows)
    loss = loss or choose_loss(guide)
    steps_of_rows = _steps(guide, rows, static, natural_steps)
    keys = jax.random.split(rng_key, 7)
    split = Split.of(rows, data, validation, batch_axes, batch_size, keys[0])
    phases = Phases(model, guide, rows, split, make_optimizer, static, columns, progress_bar)
    phases.say(_choices(guide, rows))
    first = phases.on_data(keys[1], loss, num_steps)
    others = phases.on_simulations(keys[2:4], first, num_simulation_steps, to_data)
    posterior = phases.choose(keys[4], [first, *others], steps_of_rows)
    posterior = phases.globals_on_all_rows(keys[6], loss, posterior, num_steps)
    phases.tell(keys[5], posterior)
    return posterior


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
