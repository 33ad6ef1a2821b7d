"""What every family's distribution over a datum's latents must do."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAMILIES
from flax import nnx
from heads import (
    NUM_DRAWS,
    NUM_FEATURES,
    SIGMAS,
    SIZE,
    draw,
    draws_of,
    features,
    fresh,
    is_point,
    jit,
    log_prob,
    own_log_prob,
    quick_jit,
    trained,
)

from numpyro_vae.families import DiagonalNormal, Flow, LowRankNormal


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


# -- shapes and transformations -------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "size"), [((), 3), ((5,), 3), ((2, 5), 3), ((5,), 1)])
def test_shapes(family, batch, size):
    family = LowRankNormal(1) if size == 1 and isinstance(family, LowRankNormal) else family
    head = fresh(family, size)

    def everything(x):
        raw = head(x)
        joint, marginals = head.distribution(raw), head.marginals(raw)
        assert (joint.batch_shape, joint.event_shape) == (batch, (size,))
        draws = draw(head, raw, (7,))
        each = ()
        if marginals is not None:
            assert (marginals.batch_shape, marginals.event_shape) == ((*batch, size), ())
            each = (marginals.mean, marginals.variance, marginals.icdf(0.3))
        return raw, draws, joint.log_prob(draws), own_log_prob(head, raw), each

    raw, draws, density, own, each = jax.eval_shape(everything, features(*batch))
    assert all(leaf.shape[: len(batch)] == batch for leaf in jax.tree.leaves(raw))
    assert (draws.shape, density.shape, own.shape) == ((7, *batch, size), (7, *batch), batch)
    assert all(leaf.shape == (*batch, size) for leaf in each)


@pytest.mark.slow
def test_the_maths_of_one_datum_is_that_of_a_batch_in_float64(family):
    def both(head, x):
        raw = head(x)
        draws, own = draw(head, raw, (11,)), draw(head, raw)
        one = jax.vmap(functools.partial(log_prob, head), (0, 1), 1)(raw, draws)
        shared = log_prob(head, raw, draws[0, 2])  # one value for all data
        batched = log_prob(head, raw, draws)
        own = log_prob(head, raw, own), own_log_prob(head, raw)
        return raw, head(x[2]), draws, batched, one, shared, *own

    with jax.enable_x64(True):
        found = jit(both, trained(family), features(5))
    raw, alone, draws, batched, one, shared, own, by_noise = found
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y[2], 1e-9, 1e-9), alone, raw)
    assert draws.dtype == batched.dtype == by_noise.dtype == np.float64
    assert np.isfinite(batched).all()
    np.testing.assert_allclose(one, batched, 1e-9)
    np.testing.assert_allclose(shared[2], batched[0, 2], 1e-9)
    np.testing.assert_allclose(by_noise, own, 1e-9)


@pytest.mark.slow
def test_the_distribution_passes_through_jit(family):
    def make(head, x):
        return head.distribution(head(x))

    joint = jit(make, trained(family), features(5))
    value = quick_jit(lambda d: d.sample(jax.random.key(2)))(joint)
    np.testing.assert_allclose(value, draw(trained(family), trained(family)(features(5))), 1e-5)
    again = quick_jit(lambda d: jax.tree.map(lambda x: x, d))(joint)
    density = quick_jit(lambda d, x: d.log_prob(x))
    np.testing.assert_array_equal(density(again, value), density(joint, value))


def test_pickling(family):
    same = pickle.loads(pickle.dumps(family))
    assert same == family
    assert hash(same) == hash(family)
    head = trained(family)
    state = pickle.loads(pickle.dumps(nnx.to_pure_dict(nnx.state(head))))
    other = same.head(NUM_FEATURES, SIZE, rngs=nnx.Rngs(1))
    nnx.update(other, nnx.State(state))
    jax.tree.map(np.testing.assert_array_equal, other(features(5)), head(features(5)))
    np.testing.assert_array_equal(draw(other, other(features(5))), draw(head, head(features(5))))


def test_a_head_has_nothing_but_parameters_in_float32(family):
    for x64 in (False, True):
        with jax.enable_x64(x64):
            head = family.head(NUM_FEATURES, SIZE, rngs=nnx.Rngs(0))
            assert not jax.tree.leaves(nnx.state(head, nnx.Not(nnx.Param)))
            assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(head))} == {np.dtype("f4")}


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradient_reaches_every_weight_and_the_features(family):
    graphdef, state = nnx.split(fresh(family))
    value = draw(trained(family), trained(family)(features(5)))

    def through_draws(state, x):
        head = nnx.merge(graphdef, state)
        return (head.distribution(head(x)).rsample(jax.random.key(2)) ** 2).sum()

    def through_density(state, x):
        head = nnx.merge(graphdef, state)
        return log_prob(head, head(x), value).sum()

    losses = (through_draws, through_density)
    gradients = quick_jit(lambda state, x: [jax.grad(loss, (0, 1))(state, x) for loss in losses])
    for state in (nnx.state(fresh(family)), nnx.state(trained(family))):
        found = jax.device_get(gradients(state, features(5)))
        for loss, (grads, d_features) in zip(losses, found, strict=True):
            # The density of a point is constant wherever it is not infinite.
            expected = not (is_point(family) and loss is through_density)
            assert (d_features != 0).any(-1).all() == expected
            for path, grad in jax.tree.leaves_with_path(nnx.to_pure_dict(grads)):
                assert bool((grad != 0).any()) == expected, (loss, path)


@pytest.mark.slow
def test_value_and_gradients_are_finite_at_extremes(family):
    head = trained(family)
    leaves, treedef = jax.tree.flatten(head(features(2)))

    def losses(leaves):
        raw = jax.tree.unflatten(treedef, leaves)
        spread, value = head.marginals(raw), draw(head, raw)
        ends = 0.0 if spread is None else (spread.icdf(0.1) + spread.variance).sum()
        densities = log_prob(head, raw, value).sum(), own_log_prob(head, raw).sum()
        terms = jnp.stack([*densities, value.sum(), ends])
        return terms.sum(), terms

    @quick_jit
    @jax.vmap
    def check(leaves):
        return jax.value_and_grad(losses, has_aux=True)(leaves)

    # Each output by itself, and all of them, at both ends.
    is_far = np.concatenate([np.eye(len(leaves)), np.ones((1, len(leaves)))]) > 0
    is_far, extreme = np.concatenate([is_far, is_far]), np.repeat([-1e4, 1e4], len(is_far))
    cases = [
        np.where(far[:, None, None], np.float32(extreme)[:, None, None], x)
        for far, x in zip(is_far.T, leaves, strict=True)
    ]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(check(cases))))


# -- draws ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_head_starts_at_the_initial_scale(family):
    _, draws = draws_of(fresh(family), 5)
    expected = 0.0 if is_point(family) else family.parameterization.init_scale
    rtol = 0.06 if isinstance(family, Flow) else 0.04  # as the tails of a flow are heavier
    np.testing.assert_allclose(draws.std(0), expected, rtol=rtol, atol=1e-6)


def test_draws_have_the_marginals(family):
    head = trained(family)
    raw, draws = draws_of(head, 5)
    marginals = head.marginals(raw)
    if marginals is None:
        assert isinstance(family, Flow)
        return
    mean, variance = np.asarray(marginals.mean), np.asarray(marginals.variance)
    error = draws.std(0) / np.sqrt(NUM_DRAWS)
    assert (abs(draws.mean(0) - mean) <= SIGMAS * error + 1e-6).all()
    # The variance of a Normal's sample variance is 2 variance**2 / n.
    error = variance * np.sqrt(2 / NUM_DRAWS)
    assert (abs(draws.var(0) - variance) <= SIGMAS * error + 1e-6).all()
    for q in (0.05, 0.5, 0.9):
        if is_point(family):
            np.testing.assert_array_equal(marginals.icdf(q), draws[0])
            continue
        error = np.sqrt(q * (1 - q) / NUM_DRAWS)
        assert (abs((draws < np.asarray(marginals.icdf(q))).mean(0) - q) <= SIGMAS * error).all()


def test_only_a_family_made_of_pairs_takes_a_pair(family):
    if isinstance(family, DiagonalNormal):
        raw = (jnp.zeros((5, 3)), jnp.ones((5, 3)))
        assert family.pair()(raw) is raw
        assert family.pair().marginals(raw).batch_shape == (5, 3)
    else:
        with pytest.raises(TypeError, match=f"{type(family).__name__} needs features"):
            family.pair()
