"""The common battery: what every encoder and every family must do."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ENCODERS, FAMILIES
from flax import nnx


@pytest.fixture(params=ENCODERS)
def encoder_case(request):
    build, inputs = ENCODERS[request.param]
    return build(inputs(7), rngs=nnx.Rngs(0)), inputs


def test_features_of_any_batch(encoder_case):
    encoder, inputs = encoder_case
    widths = set()
    for batch in (1, 3, 7):
        features = encoder(inputs(batch))
        assert features.shape[0] == batch
        assert features.ndim == 2
        assert features.dtype == jnp.float32
        widths.add(features.shape[1])
    assert len(widths) == 1


def test_rows_do_not_see_each_other(encoder_case):
    encoder, inputs = encoder_case
    batch = inputs(7)
    some = jax.tree.map(lambda x: x[2:4], batch)
    np.testing.assert_allclose(encoder(some), encoder(batch)[2:4], rtol=1e-5, atol=1e-6)


def test_encoders_under_jit_and_through_split_and_merge(encoder_case):
    encoder, inputs = encoder_case
    graphdef, state = nnx.split(encoder)
    jitted = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    expected = encoder(inputs(3))
    np.testing.assert_allclose(jitted(state, inputs(3)), expected, rtol=1e-5, atol=1e-6)


def test_builders_survive_pickling(encoder_case, request):
    build, inputs = ENCODERS[request.node.callspec.params["encoder_case"]]
    encoder = pickle.loads(pickle.dumps(build))(inputs(7), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(encoder(inputs(3)), encoder_case[0](inputs(3)))


def test_gradient_reaches_every_weight_but_the_standardization(encoder_case):
    encoder, inputs = encoder_case
    graphdef, state = nnx.split(encoder)
    weights = jax.random.normal(jax.random.key(0), encoder(inputs(7)).shape)
    grads = jax.grad(lambda state: (weights * nnx.merge(graphdef, state)(inputs(7))).sum())(state)
    for path, grad in jax.tree.leaves_with_path(nnx.to_pure_dict(grads)):
        trained = "standardize" not in jax.tree_util.keystr(path)
        assert bool(jnp.any(grad != 0)) == trained, path


def test_another_key_is_another_encoder(encoder_case, request):
    build, inputs = ENCODERS[request.node.callspec.params["encoder_case"]]
    first, same, other = (build(inputs(7), rngs=nnx.Rngs(seed))(inputs(3)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def raw_outputs(family, batch=5, size=3):
    head = family.head(4, size, rngs=nnx.Rngs(0))
    return head, head(jax.random.normal(jax.random.key(1), (batch, 4)))


def test_a_family_is_a_distribution_over_one_datums_latents(family):
    _, raw = raw_outputs(family)
    joint = family.distribution(raw)
    assert joint.batch_shape == (5,)
    assert joint.event_shape == (3,)
    draws = joint.sample(jax.random.key(2), (11,))
    one = jax.vmap(lambda raw, draws: family.distribution(raw).log_prob(draws), (0, 1), 1)
    np.testing.assert_allclose(one(raw, draws), joint.log_prob(draws), rtol=1e-5)


def test_a_familys_head_starts_at_the_initial_scale(family):
    _, raw = raw_outputs(family)
    draws = family.distribution(raw).sample(jax.random.key(2), (20_000,))
    expected = family.parameterization.init_scale
    np.testing.assert_allclose(draws.std(0), expected, rtol=0.05)


def test_draws_of_a_family_send_gradient_to_every_output(family):
    head, _ = raw_outputs(family)
    graphdef, state = nnx.split(head)
    features = jax.random.normal(jax.random.key(1), (5, 4))

    def loss(state):
        raw = nnx.merge(graphdef, state)(features)
        return (family.distribution(raw).rsample(jax.random.key(2)) ** 2).sum()

    for path, grad in jax.tree.leaves_with_path(nnx.to_pure_dict(jax.grad(loss)(state))):
        assert bool(jnp.all(grad != 0)), path


@pytest.mark.parametrize("extreme", [-1e4, 1e4])
def test_a_family_is_finite_at_extremes(family, extreme):
    def loss(raw):
        joint = family.distribution(raw)
        return joint.log_prob(joint.rsample(jax.random.key(0))).sum()

    raw = (jnp.zeros((2, 3)), jnp.full((2, 3), extreme))
    value, grads = jax.value_and_grad(loss)(raw)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(grad).all() for grad in grads)
