"""Families fitted to known targets, without a guide: what each can and cannot represent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from numpyro_vae.families import DiagonalNormal, Flow, FullRankNormal, LowRankNormal, PointEstimate

LOG_TWO_PI = np.log(2 * np.pi)
LOC = np.array([1.0, -2.0, 0.5])
FEATURES = jnp.ones(2)  # a head with constant features is one distribution


def fit(family, log_target, size, *, num_steps=1_500, num_draws=64, learning_rate=0.02):
    """Maximize the ELBO of a head whose features are constant; returns the head."""
    graphdef, params = nnx.split(family.head(len(FEATURES), size, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps))

    def loss(params, rng_key):
        head = nnx.merge(graphdef, params)
        return -elbo(head, log_target, rng_key, num_draws).mean()

    def step(carry, rng_key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, rng_key), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params):
        keys = jax.random.split(jax.random.key(1), num_steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    return nnx.merge(graphdef, run(params))


def elbo(head, log_target, rng_key, num_draws):
    """``log p - log q`` of each draw."""
    joint = head.distribution(head(FEATURES))
    draws, intermediates = joint.sample_with_intermediates(rng_key, (num_draws,))
    return log_target(draws) - joint.log_prob(draws, *([intermediates] if intermediates else []))


def divergence(head, log_target, num_draws=100_000):
    """The Kullback-Leibler divergence of the family from a normalized target, and its error."""
    terms = -elbo(head, log_target, jax.random.key(2), num_draws)
    return float(terms.mean()), float(terms.std() / np.sqrt(num_draws))


def normal(covariance, z):
    _, log_det = np.linalg.slogdet(2 * np.pi * covariance)
    residual = z - LOC
    return -0.5 * (residual * (residual @ np.linalg.inv(covariance))).sum(-1) - 0.5 * log_det


def correlated():
    correlation = np.array([[1.0, 0.8, -0.5], [0.8, 1.0, -0.6], [-0.5, -0.6, 1.0]])
    scale = np.array([0.3, 2.0, 1.0])
    return scale[:, None] * correlation * scale


def rank_one_plus_diagonal():
    direction = np.array([1.0, -2.0, 0.5])
    return np.outer(direction, direction) + np.diag([0.3, 0.5, 1.0]) ** 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "covariance"),
    [
        (FullRankNormal(), correlated()),
        (FullRankNormal(), rank_one_plus_diagonal()),
        (LowRankNormal(1), rank_one_plus_diagonal()),
    ],
)
def test_normals_with_correlations_reach_a_normal_target(family, covariance):
    target = functools.partial(normal, covariance)
    head = fit(family, target, 3)
    kl, error = divergence(head, target)
    assert error < 0.002
    assert abs(kl) < 0.01
    marginals = head.marginals(head(FEATURES))
    np.testing.assert_allclose(marginals.variance, np.diag(covariance), rtol=0.05)
    np.testing.assert_allclose(marginals.mean, LOC, atol=0.05)


@pytest.mark.parametrize("covariance", [correlated(), rank_one_plus_diagonal()])
def test_the_diagonal_falls_short_by_the_mean_field_gap(covariance):
    # The best scales are those given all other values, 1 / sqrt(precision_ii), which leaves
    # KL = (log det C + sum log precision_ii) / 2.
    precision = np.diag(np.linalg.inv(covariance))
    gap = 0.5 * (np.linalg.slogdet(covariance)[1] + np.log(precision).sum())
    target = functools.partial(normal, covariance)
    head = fit(DiagonalNormal(), target, 3)
    kl, error = divergence(head, target)
    assert gap > 0.5
    assert error < 0.005
    np.testing.assert_allclose(kl, gap, atol=0.02)


def banana(z):
    """``z_0 ~ Normal(0, 1)`` and ``z_1 ~ Normal(z_0**2 - 1, 0.5)``, normalized."""
    x, y = z[..., 0], z[..., 1]
    return -0.5 * x**2 - 0.5 * ((y - x**2 + 1) / 0.5) ** 2 - LOG_TWO_PI - np.log(0.5)


@pytest.mark.slow
def test_a_flow_bends_where_normals_cannot():
    families = (DiagonalNormal(), FullRankNormal(), Flow())
    heads = [fit(family, banana, 2, learning_rate=0.01) for family in families]
    (diagonal, _), (full_rank, _), (flow, error) = (divergence(head, banana) for head in heads)
    print(f"KL: diagonal {diagonal:.3f}, full rank {full_rank:.3f}, flow {flow:.4f} +- {error:.4f}")
    assert diagonal > 0.5
    assert full_rank > 0.5
    assert -4 * error < flow < 0.1


def test_a_point_estimate_finds_the_mode():
    head = fit(PointEstimate(), functools.partial(normal, correlated()), 3, num_draws=1)
    np.testing.assert_allclose(head(FEATURES), LOC, atol=1e-3)
