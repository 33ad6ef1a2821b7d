"""Natural-gradient steps, which each row takes from what the network says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float

from numpyro_vae.families.base import Normal, full_precision
from numpyro_vae.families.multivariate_normal import lower_root
from numpyro_vae.guides.abstract import AbstractEncoding, AbstractGuide
from numpyro_vae.guides.encoding import Encoding
from numpyro_vae.guides.normal_form import either, joint_normal, of_normal
from numpyro_vae.inference.steps import (
    Measured,
    apart,
    choose,
    even_noise,
    measure,
    move,
    unseen,
    widened,
)

if TYPE_CHECKING:
    from numpyro_vae.inference.encoded import EncodedBatch

MOST = 256  # latents, as a step takes the eigenvalues of a matrix of so many rows
DRAWS = 128  # by which a guide that is no Normal is compared with one, or four for each latent
FIRST, SHORTER, LONGER = 0.5, 0.3, 2.0  # a row's step; and its factors, after no gain and a gain
ENOUGH, SHORTEST = 1e-3, 0.02  # nats of a gain, and a step, below which a row goes no further
LEFT_OUT = 0.1  # nats by which a Normal may be further from a posterior that it is to cover

Globals = Mapping[str, Array]


class Stepped(NamedTuple):
    """What steps of rows came to.

    Attributes:
        normal: of each row.
        share: 1 in rows that have it, and 0 in those that keep what the network says; None if all
            have it.
    """

    normal: Normal
    share: Float[Array, "batch"] | None


class Going(NamedTuple):
    """Where the rows of a batch are.

    Attributes:
        number: of Normals that were looked at.
        best: the best Normal of each row so far.
        rate: how far its next step goes.
        left: which rows go on; each stops by itself, whichever others there are.
    """

    number: Array
    best: Measured
    rate: Float[Array, "batch"]
    left: Bool[Array, "batch"]


def take_steps(batch: EncodedBatch, globals_: Globals, *, num_steps: int) -> Stepped | None:
    r"""Let each row's Normal take natural-gradient steps towards the row's largest ELBO.

    Where the guide is no Normal, as a flow is, they start from one with its mean and covariance,
    and a row keeps what the guide says if that has the larger ELBO, or more of the posterior.

    A step from :math:`\text{Normal}(\mu, S)` to :math:`\text{Normal}(\mu', S')` is

    .. math::
        S'^{-1} = (1 - \rho)\, S^{-1} - \rho\, \mathbb{E}[\nabla^2 \log p(x, z)], \qquad
        \mu' = \mu + \rho\, S'\, \mathbb{E}[\nabla \log p(x, z)],

    with means over the Normal, for which a fixed set of points stands that has its mean and its
    covariance. Of a posterior that is Normal a step of :math:`\rho = 1` finds it. A row that gains
    nothing by a step stays where it is, and takes a shorter one next; one that gains little stops.

    What has the largest ELBO has too light tails where the posterior is not Normal: many a k-hat is
    above 0.7 a hundredth of a nat from the evidence. So it is widened a little at the end, by as
    much as costs 0.01 nats, and less where it nearly fits.

    Args:
        batch: what the network says of a batch.
        globals_: draws of the global sites, which take turns at the points.
        num_steps: how many steps at most, each of 32 gradients of the log density or more.

    Returns:
        What `with_steps` makes an encoding of; None of rows without observations, as these are of
        their prior.

    Raises:
        ValueError: if rows can take no steps, see `why_unable`.

    Reference:
        Khan and Rue, *The Bayesian Learning Rule*, JMLR 24, 2023; Opper and Archambeau, *The
        Variational Gaussian Approximation Revisited*, Neural Computation 21, 2009. A network, and
        then steps of each row: Kim et al., *Semi-Amortized Variational Autoencoders*, ICML 2018;
        Marino, Yue and Mandt, *Iterative Amortized Inference*, ICML 2018.
    """
    if not batch.encoding.sites:
        return None
    said = able(batch.guide, batch.encoding)
    normal, drawn = joint_normal(said), None
    if normal is None:
        drawn = _drawn(batch, globals_)
        normal = _moments(drawn[0])
    at = partial(of_normal, said)
    trial = replace(batch, encoding=at(normal))
    mask, points = trial.encoding.mask, even_noise(normal[0].shape[-1], normal[0].dtype)
    look = partial(measure, partial(_by_points, trial, globals_), points, mask)

    most = min(num_steps, jnp.iinfo(jnp.int32).max)  # as many as are counted

    def goes_on(state: Going) -> Array:
        return (state.number <= most) & state.left.any()

    def step(state: Going) -> Going:
        moved = look(move(state.best, state.rate))
        gain = moved.elbo - state.best.elbo
        gained = state.left & (gain > 0)  # not if it is NaN
        best = jax.tree.map(partial(choose, gained), moved, state.best)
        rate = jnp.where(gained, jnp.minimum(LONGER * state.rate, 1.0), SHORTER * state.rate)
        left = state.left & ((gain > ENOUGH) | (~gained & (rate > SHORTEST)))
        return Going(state.number + 1, best, rate, left)

    with full_precision():
        start = unseen(apart(normal, mask))  # and the first step goes nowhere
        rate = jnp.full_like(start.elbo, FIRST / LONGER)
        going = Going(jnp.zeros((), int), start, rate, rate > 0)
        best = jax.lax.while_loop(goes_on, step, going).best
    found = widened(best, mask)
    if drawn is None:
        return Stepped(found, None)
    moved = replace(batch, encoding=at(found))
    better = _is_better(batch, drawn, moved, _drawn(moved, globals_))
    return Stepped(found, better.astype(normal[0].dtype))


def with_steps(batch: EncodedBatch, stepped: Stepped) -> EncodedBatch:
    """Return a batch of which is said what the steps of its rows came to."""
    said = able(batch.guide, batch.encoding)
    if stepped.share is None:
        return replace(batch, encoding=of_normal(said, stepped.normal))
    return replace(batch, encoding=either(said, stepped.normal, stepped.share))


def why_unable(guide: AbstractGuide, encoding: AbstractEncoding) -> str:
    """Return why rows can take no steps from what a guide says of them; empty if they can."""
    if not encoding.sites:
        return "it says nothing of continuous latents of a row"
    if not isinstance(encoding, Encoding) or not encoding.family.has_density:
        return "it has no density by row"
    if any(block.reads for block in encoding.blocks.values()):
        return "heads read values that are drawn"
    if (size := sum(block.num_values for block in encoding.blocks.values())) > MOST:
        return f"a row has {size} values, above {MOST}"
    if guide.plan and guide.plan.unlike:
        return "the model scales latents of a row by different factors"
    is_plain = len(encoding.blocks) == 1 and not any(b.steps for b in encoding.blocks.values())
    if joint_normal(encoding) is None and (not is_plain or encoding.mask is not None):
        return "it is no Normal, and has several heads, steps or masked latents"
    return ""


def require_rows(guide: AbstractGuide, num_steps: int) -> None:
    """Raise ValueError if rows are to take steps, and a guide says nothing of one by itself."""
    if num_steps and not guide.local_sites:
        raise ValueError(
            f"natural_steps are steps of the latents of each row, and {_name(guide)} draws "
            "those of all rows together, or there are none. Leave natural_steps out."
        )


def _name(guide: AbstractGuide) -> str:
    return type(getattr(guide, "guide", guide)).__name__


def able(guide: AbstractGuide, encoding: AbstractEncoding) -> Encoding:
    """Return what a guide says of rows, if they can take steps from it.

    Raises:
        ValueError: if they cannot.
    """
    reason = why_unable(guide, encoding)
    if not reason and isinstance(encoding, Encoding):
        return encoding
    names = [site.name for site in encoding.sites]
    raise ValueError(
        f"natural_steps are steps of a Normal of each row, and what {_name(guide)} "
        f"says of the sites {names} is not apt: {reason}. Use AutoAmortizedMultivariateNormal or "
        "AutoAmortizedNormal, without condition_on and dependencies; or leave natural_steps out, "
        "and repair the rows that are flagged."
    )


def _by_points(
    batch: EncodedBatch,
    globals_: Globals,
    place: Callable[[Array], Array],
    points: Float[Array, "points size"],
) -> tuple[Array, Array]:
    """Return log densities of rows, and their gradients, at points; see `measure`."""

    def one(point: Array, number: Array) -> tuple[Array, Array]:
        def total(packed: Array) -> tuple[Array, Array]:
            joint = batch.log_joint(packed, _turn(globals_, number), jax.random.key(0))
            by_row = logsumexp(joint, axis=0)
            return by_row.sum(), by_row

        gradient, by_row = jax.grad(total, has_aux=True)(place(point))
        return by_row, gradient

    return batch.over_draws(one, points, jnp.arange(len(points)))


def _turn(globals_: Globals, number: Array) -> dict[str, Array]:
    """Return one of the draws of the global sites, which take turns."""
    return {name: draws[number % len(draws)] for name, draws in globals_.items()}


def _drawn(batch: EncodedBatch, globals_: Globals) -> tuple[Array, Array]:
    """Return draws of each row, ``(draws, batch, size)``, and their log weights.

    All rows have one key, so that what they come to depends neither on their numbers nor on others.
    """
    encoding, key = batch.encoding.condition({}), jax.random.key(0)
    size = sum(site.datum_size(encoding.run.plate) for site in encoding.sites)
    number = max(DRAWS, 4 * size)
    draws = encoding.sample(jnp.broadcast_to(key, batch.indices.shape), number)

    def weigh(packed: Array, number: Array) -> Array:
        return batch.log_weight(packed, _turn(globals_, number), key)

    return draws, batch.over_draws(weigh, draws, jnp.arange(number))


def _is_better(
    old: EncodedBatch, by_old: tuple[Array, Array], new: EncodedBatch, by_new: tuple[Array, Array]
) -> Bool[Array, "batch"]:
    """Return which rows' posteriors are better described by what is new.

    That is what has the larger ELBO and, as a Normal at one of several modes may have that too, no
    lower log density at the posterior, for which draws of both stand, weighed by their mixture.

    Args:
        old: a batch.
        by_old: draws of it, and their log weights.
        new: the same rows, of which something else is said.
        by_new: likewise.
    """
    draws, number = jnp.concatenate([by_old[0], by_new[0]]), len(by_old[0])
    first, second = (x.over_draws(x.encoding.log_prob, draws) for x in (old, new))
    joint = jnp.concatenate([by_old[1] + first[:number], by_new[1] + second[number:]])
    weights = jax.nn.softmax(joint - jnp.logaddexp(first, second), axis=0)
    covers = (weights * (second - first)).sum(0) > -LEFT_OUT  # not if it is NaN
    return covers & (by_new[1].mean(0) > by_old[1].mean(0))


def _moments(draws: Float[Array, "draws batch size"]) -> Normal:
    """Return the Normal with the mean and the covariance of draws."""
    loc = draws.mean(0)
    root = jnp.moveaxis(draws - loc, 0, -1) / jnp.sqrt(len(draws))
    return loc, lower_root(root)
