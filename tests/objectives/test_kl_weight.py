"""The weight of the divergence: as a number, as a schedule in `fit` and in a plain SVI."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from linear import KEY, PARAMS, X, guide, model
from numpyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from numpyro_vae import (
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    fit,
)
from numpyro_vae.objectives import AnnealedELBO, count_steps, cyclical

DATA = np.random.default_rng(0).normal(size=40).astype(np.float32)
RAMP = optax.linear_schedule(0.0, 1.0, 20)


def mixed_model(x):
    """A global site, a constrained one, and one with an analytic divergence."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 2.0))
        w = numpyro.sample("w", dist.LogNormal(0.0, 0.5))
        numpyro.sample("x", dist.Normal(z + w, 0.5), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "auto", [AutoAmortizedNormal, AutoAmortizedMultivariateNormal, AutoAmortizedFlow]
)
def test_with_a_weight_of_one_it_is_the_elbo(auto):
    guide = auto(mixed_model)
    svi = SVI(mixed_model, guide, optax.adam(1e-2), Trace_ELBO())
    params = svi.get_params(svi.init(KEY, X))
    for particles in (1, 3):
        found, expected = (
            loss(num_particles=particles).loss(KEY, params, mixed_model, guide, X)
            for loss in (lambda **kwargs: AnnealedELBO(1.0, **kwargs), TraceMeanField_ELBO)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_weight_is_that_of_the_divergence():
    at = {w: AnnealedELBO(w).loss(KEY, PARAMS, model, guide, X) for w in (0.0, 1.0, 4.0)}
    loc, scale = PARAMS["slope"] * X, PARAMS["scale"]
    divergence = (0.5 * (scale**2 + loc**2 - 1) - jnp.log(scale)).sum()
    np.testing.assert_allclose(at[1.0] - at[0.0], divergence, rtol=1e-5)
    np.testing.assert_allclose(at[4.0] - at[0.0], 4 * divergence, rtol=1e-5)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"weight is -1.0, expected a number from 0 on"):
        AnnealedELBO(-1.0)


# -- schedules -------------------------------------------------------------------------------------


def point_guide(x):
    """A guide whose likelihood term does not depend on keys."""
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Delta(numpyro.param("loc", 0.3) * jnp.ones(len(x))))


def losses_at(weights):
    found = [AnnealedELBO(w).loss(KEY, {"loc": 0.3}, model, point_guide, X) for w in (0.0, 1.0)]
    return found[0] + np.asarray(weights) * (found[1] - found[0])


def test_a_count_tells_a_plain_svi_the_step():
    loss = AnnealedELBO(optax.linear_schedule(0.0, 1.0, 4))
    svi = SVI(count_steps(model), point_guide, optax.sgd(0.0), loss)
    result = svi.run(KEY, 6, X, progress_bar=False)
    np.testing.assert_allclose(result.losses, losses_at([0, 0.25, 0.5, 0.75, 1, 1]), rtol=1e-5)
    more = svi.run(KEY, 1, X, progress_bar=False, init_state=result.state)
    assert int(more.state.mutable_state["numpyro_vae.num_steps"]["value"]) == 7


@pytest.mark.parametrize("counted", [False, True])
def test_fit_tells_the_step_also_where_training_continues(counted):
    loss = AnnealedELBO(optax.linear_schedule(0.0, 1.0, 4))
    svi = SVI(count_steps(model) if counted else model, point_guide, optax.sgd(0.0), loss)
    options = {"batch_size": 2, "plate": "data", "progress_bar": False}
    data = np.full(4, 0.7, np.float32)  # every batch alike
    result = fit(svi, KEY, data, num_epochs=2, **options)
    more = fit(svi, KEY, data, num_epochs=1, init_state=result.state, **options)
    found = [*result.losses, *more.losses]
    steps = np.diff(found)
    np.testing.assert_allclose(steps[:4], steps[0], rtol=1e-3)
    assert abs(steps[0]) > 1e-3
    np.testing.assert_allclose(steps[4:], 0.0, atol=1e-6)


def test_a_schedule_without_a_step_is_refused():
    svi = SVI(model, guide, optax.sgd(0.0), AnnealedELBO(RAMP))
    state = svi.init(KEY, X)
    with pytest.raises(ValueError, match=r"numpyro_vae.fit, or.*SVI\(count_steps\(model\)"):
        svi.update(state, X)


def make_svi(weight):
    return SVI(model, guide, optax.adam(1e-2), AnnealedELBO(weight))


OPTIONS = {"batch_size": 10, "plate": "data", "progress_bar": False}


def test_a_schedule_that_outlasts_training_is_refused():
    with pytest.raises(
        ValueError,
        match=r"until step 20, and training ends after step 12 \(3 epochs of 4.*num_epochs=5",
    ):
        fit(make_svi(RAMP), KEY, DATA, num_epochs=3, **OPTIONS)
    long = optax.linear_schedule(0.0, 1.0, 1_000)
    with pytest.raises(ValueError, match=r"changes until step 1,\d+"):
        fit(make_svi(long), KEY, DATA, num_epochs=1, **OPTIONS)


def test_early_stopping_waits_for_the_schedule():
    """Of a patience of one epoch; validation losses rise all along, and are those of the ELBO."""
    svi = SVI(model, guide, optax.sgd(-1e-4), AnnealedELBO(RAMP))
    result = fit(svi, KEY, DATA, num_epochs=30, validation=DATA, patience=1, **OPTIONS)
    assert len(result.history["loss"]) == 6  # of four steps; the fifth has the last weight
    expected = fit(
        SVI(model, guide, optax.sgd(-1e-4), AnnealedELBO(1.0)),
        KEY, DATA, num_epochs=1, validation=DATA, **OPTIONS,
    )  # fmt: skip
    found = result.history["validation_loss"][0]
    np.testing.assert_allclose(found, expected.history["validation_loss"][0], rtol=1e-2)


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        (RAMP, 20),
        (cyclical(3, 10), 25),
        (cyclical(2, 10, rising=1.0), 20),
        (optax.constant_schedule(0.5), 0),
        (optax.join_schedules([RAMP, optax.cosine_decay_schedule(1.0, 10)], [20]), 30),
    ],
)
def test_when_a_schedule_ends(schedule, end):
    assert AnnealedELBO(schedule).settles_at(40) == end
    assert AnnealedELBO(schedule).settles_at(16) >= min(end, 17)


def test_cycles():
    schedule = cyclical(2, 8, rising=0.25)
    found = [float(schedule(step)) for step in range(18)]
    cycle = [0.0, 0.5] + [1.0] * 6
    np.testing.assert_allclose(found, [*cycle, *cycle, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"rising is .*, expected a part"):
        cyclical(2, 8, rising=0.0)
