"""A linear Gaussian state space model, scanned over time, against the Kalman smoother."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import (
    MLP,
    RNN,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    Importance,
    Posterior,
    fit,
)

NUM_DATA, NUM_STEPS = 256, 8
KEEP, NEW, NOISE = 0.8, 0.6, 0.5  # of a state, what stays and what is new; and of what is seen
KEY = jax.random.key(0)

# Of NumPyro's scan, which replays parameters as if they were sites; it takes nothing from them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:shape requires ndarray or scalar arguments, got <class 'dict'>:DeprecationWarning"
)


def model(x, lengths):
    def step(z, inputs):
        xt, t = inputs
        with numpyro.plate("sequences", len(lengths)), handlers.mask(mask=t < lengths):
            z = numpyro.sample("z", dist.Normal(KEEP * z, jnp.where(t == 0, 1.0, NEW)))
            numpyro.sample("x", dist.Normal(z, NOISE), obs=xt)
        return z, None

    scan(step, jnp.zeros(len(lengths)), (x.T, jnp.arange(x.shape[1])))


def whole_model(x):
    """The same for sequences that all have the same length: nothing is masked."""

    def step(z, inputs):
        xt, t = inputs
        with numpyro.plate("sequences", len(x)):
            z = numpyro.sample("z", dist.Normal(KEEP * z, jnp.where(t == 0, 1.0, NEW)))
            numpyro.sample("x", dist.Normal(z, NOISE), obs=xt)
        return z, None

    scan(step, jnp.zeros(len(x)), (x.T, jnp.arange(x.shape[1])))


class Smoothed(NamedTuple):
    mean: np.ndarray
    sd: np.ndarray
    log_evidence: float


def smooth(x):
    """The Kalman filter and the Rauch-Tung-Striebel smoother of one sequence."""
    predicted, filtered, log_evidence = [(0.0, 1.0)], [], 0.0
    for value in x:
        mean, variance = predicted[-1]
        total = variance + NOISE**2
        log_evidence -= 0.5 * ((value - mean) ** 2 / total + np.log(2 * np.pi * total))
        gain = variance / total
        filtered.append((mean + gain * (value - mean), (1 - gain) * variance))
        predicted.append((KEEP * filtered[-1][0], KEEP**2 * filtered[-1][1] + NEW**2))
    smoothed = [filtered[-1]]
    for (mean, variance), (ahead, spread) in zip(
        filtered[-2::-1], predicted[len(x) - 1 : 0 : -1], strict=True
    ):
        gain = KEEP * variance / spread
        next_mean, next_variance = smoothed[-1]
        smoothed.append(
            (mean + gain * (next_mean - ahead), variance + gain**2 * (next_variance - spread))
        )
    means, variances = np.array(smoothed[::-1]).T
    return Smoothed(means, np.sqrt(variances), log_evidence)


def mean_field_sd(length):
    """Of each step given all others: the diagonal of the precision, which is tridiagonal."""
    t = np.arange(length)
    prior = np.where(t == 0, 1.0, NEW**-2)
    following = np.where(t < length - 1, (KEEP / NEW) ** 2, 0.0)
    return (prior + following + NOISE**-2) ** -0.5


def simulate():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, NUM_STEPS + 1, NUM_DATA)
    z = rng.normal(size=(NUM_STEPS, NUM_DATA)) * np.r_[1.0, [NEW] * (NUM_STEPS - 1)][:, None]
    for t in range(1, NUM_STEPS):
        z[t] += KEEP * z[t - 1]
    x = (z + NOISE * rng.normal(size=z.shape)).T
    return x.astype(np.float32), lengths.astype(np.int32)


X, LENGTHS = simulate()
THERE = np.arange(NUM_STEPS) < LENGTHS[:, None]
EXACT = [smooth(row[:length]) for row, length in zip(X, LENGTHS, strict=True)]
OTHER_PADDING = np.where(THERE, X, 1e3).astype(np.float32)


def recurrent(optimizer, **options):
    guide = AutoAmortizedNormal(model, partial(RNN, hidden_size=16))
    return SVI(model, guide, optimizer, Trace_ELBO(**options))


@pytest.fixture(scope="module")
def posterior():
    svi = recurrent(optax.adam(optax.cosine_decay_schedule(2e-2, 1200)), num_particles=4)
    return Posterior(svi.guide, svi.run(KEY, 1200, X, LENGTHS, progress_bar=False))


def test_the_smoother_is_right():
    """It is the conditional distribution of one large Normal."""
    lower = np.linalg.inv(np.eye(4) - KEEP * np.eye(4, k=-1))
    prior = lower @ np.diag([1.0, NEW**2, NEW**2, NEW**2]) @ lower.T
    covariance = np.linalg.inv(np.linalg.inv(prior) + np.eye(4) / NOISE**2)
    found = smooth(X[0, :4])
    np.testing.assert_allclose(found.mean, covariance @ X[0, :4] / NOISE**2, rtol=1e-6)
    np.testing.assert_allclose(found.sd, np.sqrt(np.diag(covariance)), rtol=1e-6)
    np.testing.assert_allclose(mean_field_sd(4), np.diag(np.linalg.inv(covariance)) ** -0.5)
    marginal = prior + NOISE**2 * np.eye(4)
    distance = X[0, :4] @ np.linalg.solve(marginal, X[0, :4])
    log_evidence = -0.5 * (distance + np.linalg.slogdet(2 * np.pi * marginal)[1])
    np.testing.assert_allclose(found.log_evidence, log_evidence, rtol=1e-6)


@pytest.mark.slow
def test_means_are_those_of_the_smoother(posterior):
    loc = posterior.encode((X, LENGTHS))["z"].loc
    assert loc.shape == X.shape
    error = np.concatenate(
        [
            (row[: len(exact.mean)] - exact.mean) / exact.sd
            for row, exact in zip(loc, EXACT, strict=True)
        ]
    )
    assert np.sqrt((error**2).mean()) <= 0.1
    assert np.quantile(np.abs(error), 0.99) <= 0.25


def test_scales_are_those_of_each_step_given_the_others(posterior):
    scale = posterior.encode((X, LENGTHS))["z"].scale
    expected = np.ones(X.shape)
    for row, length in zip(expected, LENGTHS, strict=True):
        row[:length] = mean_field_sd(length)
    ratio = (scale / expected)[THERE]
    assert np.abs(ratio - 1).mean() <= 0.025
    assert np.abs(ratio - 1).max() <= 0.15
    # Less than the smoother says: steps are independent in the guide, and are not.
    full = [smooth(row).sd / mean_field_sd(NUM_STEPS) for row in X[:1]]
    assert np.min(full) > 1.04


@pytest.mark.slow
def test_the_evidence_is_made_up_for_by_the_weights(posterior):
    found = posterior.check(
        jax.random.key(1), (X, LENGTHS), checks=("importance", "collapse")
    ).dataset
    exact = np.array([smoothed.log_evidence for smoothed in EXACT])
    short = LENGTHS <= 3  # of more steps some weights have no finite variance
    error = found["log_evidence"].values - exact
    assert np.abs(error[short]).max() <= 0.1
    assert abs(error.mean()) <= 0.02
    gap = np.array(
        [0.5 * np.log(mean_field_sd(n) ** -2).sum() - 0.5 * _log_det_precision(n) for n in LENGTHS]
    )
    elbo = found["elbo"].values
    assert abs((exact - gap - elbo).mean()) <= 0.02  # the best that a mean-field guide can do


def _log_det_precision(n):
    """Of the posterior of the first ``n`` states."""
    precision = np.diag(mean_field_sd(n) ** -2)
    precision -= KEEP / NEW**2 * (np.eye(n, k=1) + np.eye(n, k=-1))
    return np.linalg.slogdet(precision)[1]


def test_padding_does_not_matter(posterior):
    for mine, other in zip(
        posterior.encode((X, LENGTHS))["z"],
        posterior.encode((OTHER_PADDING, LENGTHS))["z"],
        strict=True,
    ):
        np.testing.assert_array_equal(mine, other)
    weights = [
        posterior.log_weights(jax.random.key(2), (x, LENGTHS), 20) for x in (X, OTHER_PADDING)
    ]
    np.testing.assert_array_equal(*weights)
    # Nor does more of it; and a length beyond the data only says that all of it is there.
    longer = np.pad(OTHER_PADDING, ((0, 0), (0, 3)), constant_values=7.0)
    loc = posterior.encode((longer, LENGTHS))["z"].loc
    expected = posterior.encode((X, LENGTHS))["z"].loc
    np.testing.assert_allclose(loc[:, :NUM_STEPS][THERE], expected[THERE], rtol=1e-5, atol=1e-6)
    beyond = np.where(LENGTHS == NUM_STEPS, 99, LENGTHS).astype(np.int32)
    np.testing.assert_array_equal(posterior.encode((X, beyond))["z"].loc, expected)


def test_training_does_not_see_the_padding():
    svi = recurrent(optax.sgd(0.0))
    params = svi.get_params(svi.init(KEY, X, LENGTHS))

    @jax.jit
    def value_and_grad(x):
        def loss(params):
            return svi.loss.loss(KEY, params, model, svi.guide, x, LENGTHS)

        return jax.value_and_grad(loss)(params)

    found, expected = value_and_grad(OTHER_PADDING), value_and_grad(X)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    moved = value_and_grad(X + 1)
    assert moved[0] != expected[0]


@pytest.mark.slow
def test_the_loss_of_minibatches_is_unbiased():
    def losses(batch_size):
        options = {"batch_size": batch_size, "num_epochs": 60, "progress_bar": False}
        result = fit(recurrent(optax.sgd(0.0)), KEY, (X, LENGTHS), **options)
        return result.losses.reshape(60, -1).mean(1)

    minibatches, everything = losses(64), losses(NUM_DATA)
    difference = minibatches.mean() - everything.mean()
    error = np.hypot(minibatches.std(), everything.std()) / np.sqrt(60)
    assert abs(difference) <= 4 * error
    assert error <= 0.02 * everything.mean()  # a factor of 2, let alone of 4, would be seen


@pytest.mark.slow
def test_predictions_and_datatree_name_the_steps(posterior):
    draws = posterior.sample(jax.random.key(3), (X, LENGTHS), 300)
    assert draws["z"].shape == (300, NUM_STEPS, NUM_DATA)
    predicted = posterior.predict(jax.random.key(3), (X, LENGTHS), 300)
    assert predicted["x"].shape == (300, NUM_DATA, NUM_STEPS)
    noise = (predicted["x"] - np.moveaxis(draws["z"], 1, 2))[:, THERE]
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() / NOISE - 1) < 0.01

    tree = posterior.to_datatree(KEY, (X[:20], LENGTHS[:20]), 30)
    assert tree.posterior["z"].dims == ("chain", "draw", "sequences", "z_batch_2")
    assert tree.posterior_predictive["x"].dims == ("chain", "draw", "sequences", "x_batch_2")
    assert tree.observed_data["x"].dims == ("sequences", "x_batch_2")
    assert tree.log_likelihood["x"].dims == ("chain", "draw", "sequences")
    np.testing.assert_array_equal(tree.constant_data["lengths"], LENGTHS[:20])
    np.testing.assert_array_equal(tree.observed_data["x"], X[:20])


@pytest.mark.slow
def test_a_joint_normal_over_all_steps_is_exact():
    x, exact = X[:, :5], [smooth(row) for row in X[:, :5]]
    linear = partial(MLP, hidden_sizes=(16,), activation=lambda hidden: hidden, standardize=False)
    guide = AutoAmortizedMultivariateNormal(whole_model, linear)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 1200))
    svi = SVI(whole_model, guide, optimizer, Trace_ELBO())
    posterior = Posterior(guide, svi.run(KEY, 1200, x, progress_bar=False))
    loc, scale = posterior.encode(x)["z"]
    error = (loc - np.array([smoothed.mean for smoothed in exact])) / exact[0].sd
    assert np.abs(error).max() <= 0.1
    assert np.abs(scale / exact[0].sd - 1).max() <= 0.05
    found = posterior.check(jax.random.key(1), x, checks=(Importance(num_samples=500), "collapse"))
    log_evidence = np.array([smoothed.log_evidence for smoothed in exact])
    assert np.abs(found.dataset["elbo"].values - log_evidence).max() <= 0.05
    assert (found.verdict == 0).all()
