"""What every objective does with weights, masks, scales, minibatches, global sites and state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from linear import KEY, PARAMS, X, global_guide, global_model, guide, model, normal
from numpyro import handlers
from numpyro.infer import SVI, RenyiELBO, TraceMeanField_ELBO

from numpyro_vae import (
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    ForwardKL,
    fit,
)
from numpyro_vae.model.plates import minibatch
from numpyro_vae.objectives import (
    AnnealedELBO,
    FreeBitsELBO,
    ImportanceWeightedELBO,
    ReweightedWakeSleep,
)

# In all of these a row counts for itself, so that the loss is a sum over rows.
BY_ROW = {
    "weight": AnnealedELBO(0.3, num_particles=2),
    "free bits": FreeBitsELBO(0.0, num_particles=2),
    "plain": ImportanceWeightedELBO(3, "plain"),
    "stl": ImportanceWeightedELBO(3, "stl"),
    "dreg": ImportanceWeightedELBO(3, "dreg"),
    "wake-sleep": ReweightedWakeSleep(3),
}
by_objective = pytest.mark.parametrize("loss", BY_ROW.values(), ids=BY_ROW)
weighted = partial(minibatch, plate="data", num_data=12)
GLOBALS = {"slope": jnp.array(0.4), "loc": jnp.array(0.2)}


def value_and_grad(loss, model=model, guide=guide):
    found = jax.value_and_grad(lambda params: loss.loss(KEY, params, model, guide, X))(PARAMS)
    return jax.tree.leaves(found)


def with_weights(weights):
    wrap = partial(weighted, weights=jnp.asarray(weights, float))
    return {"model": wrap(model), "guide": wrap(guide)}


@pytest.mark.slow
@by_objective
def test_forward_mode_is_reverse_mode(loss):
    def of(params):
        return loss.loss(KEY, params, model, guide, X)

    found, expected = jax.jacfwd(of)(PARAMS), jax.grad(of)(PARAMS)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


@by_objective
def test_a_minibatch_counts_for_all_rows(loss):
    """Of twelve rows four are seen, with plates of that length, or rows that weigh alike."""
    whole = value_and_grad(loss)
    for wrapped in ({"model": weighted(model), "guide": weighted(guide)}, with_weights(np.ones(4))):
        part = value_and_grad(loss, **wrapped)
        np.testing.assert_allclose(part, 3 * np.array(whole), rtol=1e-4)


@by_objective
def test_the_weights_of_rows_add_up(loss):
    one, other, both = (
        np.array(value_and_grad(loss, **with_weights(weights)))
        for weights in ([1, 0, 0, 2], [0, 3, 0.5, 0], [1, 3, 0.5, 2])
    )
    np.testing.assert_allclose(one + other, both, rtol=1e-4)


@by_objective
def test_a_masked_row_counts_for_nothing(loss):
    mask = jnp.array([True, False, True, True])

    def masked(fn):
        def call(x):
            with handlers.mask(mask=mask):
                return fn(x)

        return call

    found = value_and_grad(loss, masked(model), masked(guide))
    expected = value_and_grad(loss, **with_weights(mask / 3))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [ImportanceWeightedELBO(3), ReweightedWakeSleep(3)])
def test_rows_drawn_by_a_plate_are_those_of_the_guide(loss):
    """The bound of all rows follows from those that a plate subsamples."""

    def model(x):
        with numpyro.plate("data", 4, subsample_size=2) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.7), obs=x[rows])

    def exact_guide(x):
        precision = 1 + 1 / 0.7**2
        with numpyro.plate("data", 4, subsample_size=2) as rows:
            loc = x[rows] / 0.7**2 / precision
            numpyro.sample("z", dist.Normal(loc, precision**-0.5))

    evidence = normal(X, 0.0, np.sqrt(1 + 0.7**2))
    pairs = 2 * (evidence[:, None] + evidence)
    found = -loss.loss(KEY, {}, model, exact_guide, X)
    assert np.isclose(found, pairs, rtol=1e-5).any()


def test_a_scale_counts_inside_the_weights_as_in_numpyro():
    scaled = [handlers.scale(fn, 2.5) for fn in (model, guide)]
    expected = RenyiELBO(num_particles=3).loss(KEY, PARAMS, *scaled, X)
    for loss in (ImportanceWeightedELBO(3), ReweightedWakeSleep(3)):
        np.testing.assert_allclose(loss.loss(KEY, PARAMS, *scaled, X), expected, rtol=1e-5)
    for loss in (AnnealedELBO(0.3), FreeBitsELBO(0.1)):
        plain = loss.loss(KEY, PARAMS, model, guide, X)
        np.testing.assert_allclose(loss.loss(KEY, PARAMS, *scaled, X), 2.5 * plain, rtol=1e-5)


# -- global sites ----------------------------------------------------------------------------------


def test_global_sites_are_drawn_once_and_the_rows_are_weighted():
    """On minibatches too: the bound of twelve rows, of which four are seen."""
    loss = ImportanceWeightedELBO(3, "plain")
    whole = loss.loss(KEY, GLOBALS, global_model, global_guide, X)
    part = loss.loss(KEY, GLOBALS, weighted(global_model), weighted(global_guide), X)
    # The rows count thrice in one of them, and log p(mu) - log q(mu) once in both.
    shared = whole - (part - whole) / 2
    key, _ = jax.random.split(jax.random.fold_in(KEY, 1))
    seeded = handlers.substitute(handlers.seed(global_guide, key), GLOBALS)
    mu = handlers.trace(seeded).get_trace(X)["mu"]["value"]
    expected = normal(mu, 0.2, 0.5) - normal(mu, 0.0, 2.0)
    np.testing.assert_allclose(shared, expected, rtol=1e-3, atol=1e-4)


def test_with_exact_local_guides_it_is_the_elbo_of_the_globals():
    """Whatever the number of particles: the rows have their evidence given the global site."""
    precision = 1 + 1 / 0.7**2

    def exact_guide(x):
        mu = numpyro.sample("mu", dist.Normal(0.2, 0.5))
        with numpyro.plate("data", len(x)):
            loc = (mu + x / 0.7**2) / precision
            numpyro.sample("z", dist.Normal(loc, precision**-0.5))

    mu = jnp.linspace(-4, 4, 4_001)
    density = jnp.exp(normal(mu, 0.2, 0.5))
    rows = normal(X[:, None], mu, np.sqrt(1 + 0.7**2)).sum(0)
    inside = rows + normal(mu, 0.0, 2.0) - normal(mu, 0.2, 0.5)
    expected = jnp.trapezoid(density * inside, mu)
    loss = ImportanceWeightedELBO(2)
    keys = jax.random.split(KEY, 4_000)
    found = jax.jit(jax.vmap(lambda key: -loss.loss(key, {}, global_model, exact_guide, X)))(keys)
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(keys))


def test_what_depends_on_local_latents_from_outside_shares_one_weight():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("pairs", 2):
            numpyro.sample("x", dist.Normal(z[:2] + z[2:], 1.0), obs=x[:2])

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0.1, 0.9))

    found = ImportanceWeightedELBO(4, plate="data").loss(KEY, {}, model, guide, X)
    expected = RenyiELBO(num_particles=4).loss(KEY, {}, model, guide, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"'data' of site 'z' holds 4 of 12 rows, but all sites"):
        ImportanceWeightedELBO(4, plate="data").loss(KEY, {}, weighted(model), weighted(guide), X)


def test_wake_sleep_gives_models_with_global_sites_one_weight():
    found = ReweightedWakeSleep(4).loss(KEY, GLOBALS, global_model, global_guide, X)
    expected = RenyiELBO(num_particles=4).loss(KEY, GLOBALS, global_model, global_guide, X)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_plate_that_no_site_is_in_is_refused():
    with pytest.raises(ValueError, match=r"No site of the model is in plate 'rows'.*\['data'\]"):
        ImportanceWeightedELBO(2, plate="rows").loss(KEY, PARAMS, model, guide, X)


# -- amortized guides, and networks with state -----------------------------------------------------


class Normalized(nnx.Module):
    """Its statistics say how much of the data it has seen."""

    def __init__(self, example_inputs, *, rngs):
        self.linear = nnx.Linear(1, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)

    def __call__(self, inputs):
        return self.norm(self.linear(inputs[:, None]))


def plain_model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


@pytest.mark.slow
@by_objective
def test_networks_keep_their_state_with_several_particles(loss):
    """As one particle would leave it, as the encoder's input is the same for all."""
    guide = AutoAmortizedNormal(plain_model, Normalized)
    states = []
    for objective in (loss, TraceMeanField_ELBO()):
        svi = SVI(plain_model, guide, optax.sgd(0.0), objective)
        state = svi.init(KEY, X)
        for _ in range(2):
            state, value = svi.update(state, X)
        assert np.isfinite(value)
        states.append(state.mutable_state)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *states)


@pytest.mark.slow
@by_objective
def test_fit_keeps_it_too(loss):
    svi = SVI(plain_model, AutoAmortizedNormal(plain_model, Normalized), optax.adam(1e-2), loss)
    result = fit(svi, KEY, X, batch_size=3, num_epochs=2, validation=X, progress_bar=False)
    state = result.state.mutable_state
    assert state is not None
    assert not np.allclose(jax.tree.leaves(state)[0], 0.0)
    assert np.isfinite(result.history["validation_loss"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("auto", [AutoAmortizedMultivariateNormal, AutoAmortizedFlow])
def test_joint_families_with_global_sites(auto):
    """All estimates are of the same value, and reach the encoder."""

    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 2.0))
            w = numpyro.sample("w", dist.LogNormal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z + w, 0.5), obs=x)

    guide = auto(model)
    svi = SVI(model, guide, optax.adam(1e-2), TraceMeanField_ELBO())
    params = svi.get_params(svi.init(KEY, X))

    @jax.jit
    def run(params):
        losses = [ImportanceWeightedELBO(3, name) for name in ("plain", "stl", "dreg")]
        return [
            jax.value_and_grad(lambda params, loss=loss: loss.loss(KEY, params, model, guide, X))(
                params
            )
            for loss in losses
        ]

    values, grads = zip(*run(params), strict=True)
    np.testing.assert_allclose(values, values[0], rtol=1e-4)
    for grad in grads:
        for leaf in jax.tree.leaves(grad["auto$params"]):
            assert np.isfinite(leaf).all()
        assert any(leaf.any() for leaf in jax.tree.leaves(grad["auto$params"]))


# -- simulations -----------------------------------------------------------------------------------


def with_level(x):
    level = numpyro.sample("level", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(level, 0.5))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


AT_50 = handlers.condition(with_level, {"level": jnp.array(50.0)})


@pytest.mark.parametrize(
    "loss",
    [
        ForwardKL(),
        ReweightedWakeSleep(2, wake_phi=False, sleep=lambda sites, x: ((sites["x"],), {})),
    ],
    ids=["forward KL", "sleep"],
)
def test_simulations_keep_a_global_that_handlers_condition_fixes(loss):
    """Latents are near 50, where the guide is; with the level from its prior they were near 0."""

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(numpyro.param("loc", 50.0), 1.0))

    params, x = {"loc": jnp.array(50.0)}, jnp.full(32, 50.0)
    gradient = jax.grad(lambda params: loss.loss(KEY, params, AT_50, guide, x))(params)
    assert 0 < abs(gradient["loc"]) < 4 * 0.5 * np.sqrt(32)


def test_the_sleep_of_an_amortized_guide_keeps_it_too():
    dreams = []

    def sleep(sites, x):
        dreams.append(sites["x"])
        return (sites["x"],), {}

    guide, x = AutoAmortizedNormal(AT_50), jnp.full(32, 50.0)
    loss = ReweightedWakeSleep(2, sleep=sleep)
    svi = SVI(AT_50, guide, optax.adam(1e-3), loss)
    params = svi.get_params(svi.init(KEY, x))
    dreams.clear()
    loss.loss(KEY, params, AT_50, guide, x)
    np.testing.assert_allclose(np.mean(dreams), 50.0, atol=1.0)
