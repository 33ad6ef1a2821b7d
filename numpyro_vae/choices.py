"""What is chosen from a model and its data: guide, optimizer, objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from numpyro.infer.elbo import ELBO

from numpyro_vae.data.arrays import is_array
from numpyro_vae.encoders import RNN, ConvNet, ResidualMLP
from numpyro_vae.guides.auto import (
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
)
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.inference.rows import Rows
from numpyro_vae.model.covariates import WithCovariates, arrays_by_path
from numpyro_vae.model.provenance import is_read
from numpyro_vae.model.simulate import NotSimulableError, why_censored
from numpyro_vae.model.trace import NEEDS_VALUES
from numpyro_vae.objectives import ForwardKL, ImportanceWeightedELBO

FLOW, FULL_RANK = 16, 32  # latents of a datum, up to which the family is a flow, or a full Normal
COUNTS = {"IntegerNonnegative", "Multinomial"}  # supports of what is read on a log scale
IMAGE = 16  # pixels, from which on two axes of an observation are read as an image


def choose_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Return Adam with gradients clipped, a warm-up, and a rate that falls to zero.

    Args:
        num_steps: how many steps will be taken.
    """
    warmup = min(100, num_steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0.0, 2e-3, warmup, num_steps)
    return optax.chain(optax.clip_by_global_norm(100.0), optax.adam(rate))


def choose_guide(
    model: Callable[..., Any],
    data: Any,
    *,
    batch_axes: Any = 0,
    static_kwargs: Mapping[str, Any] | None = None,
) -> AmortizedGuide:
    """Return a guide whose encoder and family fit a model and its data.

    The encoder is an `RNN` where latents are stacked by ``scan``, a `ConvNet` for images of at
    least 16 x 16 pixels, and else a `ResidualMLP`, which reads covariates too, and counts without
    a bound on a log scale. The latents of a datum have a flow up to 16 of them, a Normal of full
    covariance up to 32, and of low rank beyond; where the model masks some, they are independent
    Normals.

    Args:
        model: a NumPyro model.
        data: as `fit` takes them.
        batch_axes: the datum axis of each argument, as for `fit`.
        static_kwargs: keyword arguments of the model that are the same in every call.
    """
    guide = AutoAmortizedNormal(model)
    rows = Rows.read(guide, dict(static_kwargs or {}), data, batch_axes)
    reading = guide.reader.abstract(rows.args, rows.kwargs, rows.held)
    size = sum(site.datum_size(guide.plate) for site in guide.local_sites)
    masked = any(site.name in reading.masks for site in guide.local_sites)
    family: Callable[..., AmortizedGuide] = AutoAmortizedNormal
    if not masked and not (guide.plan and guide.plan.unlike):
        normal = AutoAmortizedMultivariateNormal, AutoAmortizedLowRankMultivariateNormal
        family = AutoAmortizedFlow if size <= FLOW else normal[size > FULL_RANK]
    seen = [site.event_shape for site in guide.sites.observed(guide.plate.name)]
    image = len(seen) == 1 and len(seen[0]) in (2, 3) and min(seen[0][:2]) >= IMAGE
    if guide.plate.name not in reading.indices:  # it stands in a scan
        return family(model, RNN)
    if image:
        return family(model, ConvNet)
    supports = {getattr(reading.outside.get(name), "support", None) for name in reading.values}
    encoder = partial(ResidualMLP, log_scale=True) if supports <= COUNTS else ResidualMLP
    return family(model, encoder, inputs=choose_inputs(guide, rows))


def choose_inputs(guide: AmortizedGuide, rows: Rows) -> WithCovariates | None:
    """Return what an encoder reads beside what is observed of rows; None if there is no more.

    That are the arrays of rows among the arguments of which the observed values are not computed.

    Args:
        guide: of the model, with the inputs that it has by default.
        rows: the data.
    """
    data, static = rows.data, rows.kwargs
    if guide.inputs is not None or data.is_whole:
        return None

    def observed(number: int, array: Array) -> dict[str, Array]:
        arrays = [*data.arrays[:number], array, *data.arrays[number + 1 :]]
        args, kwargs = data.layout.whole(arrays)
        return guide.reader.read(args, {**static, **kwargs}, rows.held).values

    found = []
    paths = [path for path, leaf in arrays_by_path(*data.whole()) if is_array(leaf)]
    with suppress(*NEEDS_VALUES):
        for number, (path, axis) in enumerate(zip(paths, data.layout.axes, strict=True)):
            array = data.arrays[number]
            if axis is None or not jnp.isfinite(array).all():
                continue
            if not is_read(partial(observed, number), array):
                found.append((path, axis % array.ndim))
    return WithCovariates(tuple(found)) if found else None


def choose_loss(guide: AmortizedGuide) -> ELBO:
    """Return NumPyro's ELBO for a model and the family of its guide."""
    if guide.sites.enumerated(guide.plate.name):
        return TraceEnum_ELBO()
    return TraceMeanField_ELBO() if guide.family.is_factorized else Trace_ELBO()


def choose_refining(
    guide: AmortizedGuide, num_steps: int, to_data: Callable[[dict], Any] | None
) -> list[tuple[str, ELBO, int]]:
    """Return name, objective and number of steps of the phases on simulations.

    Raises:
        NotSimulableError: if data are censored, and nothing censors the simulated ones.
    """
    if num_steps and to_data is None and (reason := why_censored(guide.sites)):
        raise NotSimulableError(f"{reason}. Pass to_data=, a function that censors them too.")
    last = num_steps // 3
    enumerates = guide.sites.enumerated(guide.plate.name)
    elbo = TraceEnum_ELBO() if enumerates else ImportanceWeightedELBO(1, "stl")
    forward = ("The forward KL of simulations", ForwardKL(), num_steps - last)
    phases = [forward, ("The ELBO of simulations", elbo, last)]
    return [phase for phase in phases if phase[-1]]
