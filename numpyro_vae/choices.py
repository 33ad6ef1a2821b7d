"""What is chosen from a model and its data: guide, optimizer, objectives; and what is kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from numpyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from numpyro.infer.elbo import ELBO

from numpyro_vae.checks.importance import VERDICTS
from numpyro_vae.data.arrays import is_array
from numpyro_vae.encoders import RNN, ConvNet, ResidualMLP
from numpyro_vae.guides.auto import (
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
)
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.inference.psis import NoWeightsError
from numpyro_vae.inference.rows import Rows
from numpyro_vae.model.covariates import WithCovariates, arrays_by_path
from numpyro_vae.model.data_sets import DataSets
from numpyro_vae.model.plan import why_tempered
from numpyro_vae.model.provenance import is_read
from numpyro_vae.model.simulate import NotSimulableError, why_censored
from numpyro_vae.model.trace import NEEDS_VALUES
from numpyro_vae.objectives import ForwardKL, ImportanceWeightedELBO
from numpyro_vae.posterior import Posterior
from numpyro_vae.training.result import FitResult

RATE, GLOBAL_RATE = 2e-3, 1e-2  # the highest, of networks and model, and of the guide of globals
FLOW, FULL_RANK = 16, 32  # latents of a datum, up to which the family is a flow, or a full Normal
COUNTS = {"IntegerNonnegative", "Multinomial"}  # supports of what is read on a log scale
IMAGE = 16  # pixels, from which on two axes of an observation are read as an image


def choose_optimizer(
    num_steps: int, global_params: Callable[[str], bool] | None = None
) -> optax.GradientTransformation:
    """Return Adam with gradients clipped, a warm-up, and a rate that falls to zero.

    Args:
        num_steps: how many steps will be taken.
        global_params: whether a parameter, by name, is of the guide of global latents. These begin
            as wide as a prior and end as narrow as all data make them, so their rate is higher:
            with that of networks they were three times too wide after 4,000 steps.
    """
    warmup = min(100, num_steps // 10)

    def adam(rate: float) -> optax.GradientTransformation:
        return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, warmup, num_steps))

    rule = adam(RATE)
    if global_params is not None:
        is_global = partial(_by_name, global_params)
        rule = optax.multi_transform({False: rule, True: adam(GLOBAL_RATE)}, is_global)
    return optax.chain(optax.clip_by_global_norm(100.0), rule)


def _by_name(of: Callable[[str], bool], params: dict[str, Any]) -> dict[str, bool]:
    return {name: of(name) for name in params}


def choose_optimizers(guide: AmortizedGuide, rows: Rows) -> Callable[[int], Any]:
    """Return `choose_optimizer` for the parameters of a guide and its model."""
    if not guide.global_names:
        return choose_optimizer
    return partial(choose_optimizer, global_params=find_globals(guide, rows))


def find_globals(guide: AmortizedGuide, rows: Rows) -> Callable[[str], bool]:
    """Return whether a parameter, by name, is of the guide of global latents."""
    others = {f"{guide.prefix}$params"}
    others |= set(guide.reader.abstract(rows.args, rows.kwargs, rows.held).params)
    return lambda name: name not in others and not name.endswith("$state")


def optimizers(optimizer: Any) -> Callable[[int], Any]:
    """Return a function from a number of steps to an optimizer.

    Args:
        optimizer: such a function, or an optimizer.

    Raises:
        TypeError: if it makes an optimizer of a learning rate, or is such a rate.
    """
    if isinstance(optimizer, Real | str):
        raise TypeError(
            f"optimizer is {optimizer!r}, expected an optimizer or a function from a number of "
            "steps to one. Pass optax.adam(1e-3), for instance."
        )
    if not callable(optimizer):
        return lambda num_steps: optimizer
    takes_rate = "learning_rate" in inspect.signature(optimizer).parameters
    if takes_rate or isinstance(optimizer, type):
        name = getattr(optimizer, "__name__", optimizer)
        raise TypeError(
            f"optimizer is {name}, which makes an optimizer of a learning rate, where a function "
            f"of a number of steps is expected. Pass {name}(1e-3), or a function such as "
            "lambda num_steps: optax.adam(optax.cosine_decay_schedule(1e-3, num_steps))."
        )
    return optimizer


def choose_guide(
    model: Callable[..., Any],
    data: Any,
    *,
    plate: str | None = None,
    batch_axes: Any = 0,
    static_kwargs: Mapping[str, Any] | None = None,
) -> AmortizedGuide:
    """Return a guide whose encoder and family fit a model and its data.

    The encoder is an `RNN` where latents are stacked by ``scan``, a `ConvNet` for images of at
    least 16 x 16 pixels, for `data_sets` the one of these, and else a `ResidualMLP`, which reads
    covariates too, and counts without a bound on a log scale. The latents of a datum have a flow up
    to 16 of them, a Normal of full covariance up to 32, and of low rank beyond; where the model
    masks some, they are independent Normals.

    Args:
        model: a NumPyro model.
        data: as `fit` takes them.
        plate: the name of the plate of the data, where the model leaves a choice.
        batch_axes: the datum axis of each argument, as for `fit`.
        static_kwargs: keyword arguments of the model that are the same in every call.
    """
    guide = AutoAmortizedNormal(model, plate=plate)
    rows = Rows.read(guide, dict(static_kwargs or {}), data, batch_axes)
    reading = guide.reader.abstract(rows.args, rows.kwargs, rows.held)
    size = sum(site.datum_size(guide.plate) for site in guide.local_sites)
    masked = any(site.name in reading.masks for site in guide.local_sites)
    family: Callable[..., AmortizedGuide] = AutoAmortizedNormal
    if not masked and not (guide.plan and guide.plan.unlike):
        normal = AutoAmortizedMultivariateNormal, AutoAmortizedLowRankMultivariateNormal
        family = AutoAmortizedFlow if size <= FLOW else normal[size > FULL_RANK]
    if isinstance(model, DataSets):
        return family(model, plate=plate)  # which chooses the encoder itself
    seen = [site.event_shape for site in guide.sites.observed(guide.plate.name)]
    image = len(seen) == 1 and len(seen[0]) in (2, 3) and min(seen[0][:2]) >= IMAGE
    if guide.plate.name not in reading.indices:  # it stands in a scan
        return family(model, RNN, plate=plate)
    if image:
        return family(model, ConvNet, plate=plate)
    supports = {getattr(reading.outside.get(name), "support", None) for name in reading.values}
    encoder = partial(ResidualMLP, log_scale=True) if supports <= COUNTS else ResidualMLP
    return family(model, encoder, plate=plate, inputs=choose_inputs(guide, rows))


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


def why_unjudged(guide: AmortizedGuide) -> str:
    """Return why no weights say how good a guide is; empty if they do."""
    if guide.plan and guide.plan.unlike:
        return "The model scales its local sites by unlike factors"
    return guide.no_density.rstrip(".")


def choose_refining(
    guide: AmortizedGuide, num_steps: int, to_data: Callable[[dict], Any] | None, rows: Rows
) -> list[tuple[str, ELBO, int]]:
    """Return name, objective and number of steps of the phases on simulations.

    Where the model scales data and latents differently, there is no forward KL: the latents that
    data were simulated with are of another posterior.

    Raises:
        NotSimulableError: if there is nothing to learn from them: the guide has no density, or
            data are censored, and nothing censors the simulated ones.
    """
    if num_steps and (reason := why_unjudged(guide)):
        raise NotSimulableError(f"{reason}.")
    if num_steps and to_data is None and (reason := why_censored(guide.sites)):
        raise NotSimulableError(f"{reason}. Pass to_data=, a function that censors them too.")
    plates = (guide.plate.name, *guide.segments)
    given = (rows.args, rows.kwargs, rows.held)
    tempered = why_tempered(guide.reader, guide.sites, plates, *given)
    last = num_steps if tempered else num_steps // 3
    enumerates = guide.sites.enumerated(guide.plate.name)
    elbo = TraceEnum_ELBO() if enumerates else ImportanceWeightedELBO(1, "stl")
    forward = ("The forward KL of simulations", ForwardKL(), num_steps - last)
    phases = [forward, ("The ELBO of simulations", elbo, last)]
    return [phase for phase in phases if phase[-1]]


def choose_posterior(
    guide: AmortizedGuide,
    results: list[FitResult],
    steps: list[int],
    judge: Callable[[Posterior], tuple[np.ndarray, float]] | None,
) -> tuple[Posterior, int]:
    """Return the best posterior by `judge_posterior`, and how many phases come after it.

    The last two phases and numbers of steps are compared as they are. The first phase, which was
    ended where these rows were best, must be better than they by two standard errors.

    Args:
        guide: the guide.
        results: of the phases.
        steps: numbers of natural-gradient steps.
        judge: not needed if there is nothing to choose.
    """
    later = results[:0:-1] or results
    found = [(number, x) for number in steps for x in later]
    posteriors = [Posterior(guide, x, natural_steps=number) for number, x in found]
    if judge is None or len(steps) == len(results) == 1:
        return posteriors[0], 0
    judged = [judge(posterior) for posterior in posteriors]
    best = min(range(len(found)), key=lambda n: (judged[n][0].mean(), judged[n][1]))
    posterior, undone = posteriors[best], best % len(later)
    if len(results) > 1:
        first = Posterior(guide, results[0], natural_steps=posterior.natural_steps)
        worse = judged[best][0] - judge(first)[0]
        if worse.mean() > 2 * worse.std() / len(worse) ** 0.5:
            return first, len(results) - 1
    return posterior, undone


def judge_posterior(rng_key: Array, data: Any, posterior: Posterior) -> tuple[np.ndarray, float]:
    """Return how bad a posterior is on rows, to be compared in this order.

    Returns:
        The verdicts, from 0, fine, to 3, not to be trusted; and the mean divergence, in nats with
        two decimals, as less is not worth the steps that it may take. Without finite weights it is
        the worst of all.
    """
    try:
        report = posterior.check(rng_key, data, "importance", progress_bar=False)
    except NoWeightsError:
        return np.array([len(VERDICTS) - 1]), np.inf
    divergence = np.nan_to_num(report.dataset["divergence"].values, nan=np.inf)
    return report.verdict, float(divergence.mean().round(2))
