"""Models that subsample another plate than the guide's: one of columns, across its rows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from linear_gaussian import LINEAR
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedMultivariateNormal, AutoAmortizedNormal, Posterior, fit

NUM_ROWS, NUM_COLUMNS, HELD = 60, 12, 4
RNG = np.random.default_rng(0)
EFFECTS = 3 * RNG.normal(size=NUM_COLUMNS)
X = RNG.normal(size=(NUM_ROWS, 1)) + EFFECTS + RNG.normal(size=(NUM_ROWS, NUM_COLUMNS))
X = X.astype(np.float32)


def columns():
    return numpyro.plate("columns", NUM_COLUMNS, subsample_size=HELD, dim=-1)


def model(x):
    with columns():
        effect = numpyro.sample("effect", dist.Normal(0.0, 3.0))
    with numpyro.plate("rows", len(x), dim=-2):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with columns():
            numpyro.sample("x", dist.Normal(z + effect, 1.0), obs=numpyro.subsample(x, event_dim=0))


def within_columns(x):
    with numpyro.plate("rows", len(x), dim=-2), columns():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=numpyro.subsample(x, event_dim=0))


@pytest.fixture(scope="module")
def posterior():
    guide = AutoAmortizedNormal(model, LINEAR, plate="rows")
    svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(5e-2, 900)), Trace_ELBO())
    options = {"batch_size": 20, "num_epochs": 300, "progress_bar": False}
    return Posterior(guide, fit(svi, jax.random.key(0), X, **options))


def test_globals_are_of_the_columns_that_the_model_holds():
    """Their guide once drew columns of its own, other than those of the trace."""
    guide = AutoAmortizedNormal(model, LINEAR, plate="rows")
    params = {"effect_auto_loc": jnp.arange(NUM_COLUMNS), "effect_auto_scale": jnp.full(12, 1e-6)}
    trace = handlers.trace(handlers.seed(handlers.substitute(guide, params), 1)).get_trace(X)
    np.testing.assert_allclose(trace["effect"]["value"], trace["columns"]["value"], atol=1e-4)


def test_effects_of_columns_are_learned(posterior):
    expected = X.mean(0) / (1 + (1 + 1) / NUM_ROWS / 9)
    np.testing.assert_allclose(posterior.params["effect_auto_loc"], expected, atol=0.2)


def test_the_encoder_reads_all_columns(posterior):
    """The exact posterior of a row given the effects that were learned."""
    effects = np.asarray(posterior.params["effect_auto_loc"])
    encoded = posterior.encode(X)["z"]
    expected = (X - effects).sum(1) / (1 + NUM_COLUMNS)
    np.testing.assert_allclose(encoded.loc[:, 0], expected, atol=0.15)
    np.testing.assert_allclose(encoded.scale, (1 + NUM_COLUMNS) ** -0.5, rtol=0.15)


def test_latents_in_the_columns_are_those_of_the_columns_that_the_model_holds():
    """Each has a posterior by itself: ``N(x / 2, 1 / 2)``."""
    guide = AutoAmortizedNormal(within_columns, partial(LINEAR, hidden_sizes=(16,)), plate="rows")
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, 900))
    svi = SVI(within_columns, guide, optimizer, Trace_ELBO())
    options = {"batch_size": 20, "num_epochs": 300, "progress_bar": False}
    result = fit(svi, jax.random.key(0), X, **options)
    encoded = Posterior(guide, result).encode(X)["z"]
    np.testing.assert_allclose(encoded.loc, X / 2, atol=0.3)  # of columns units apart
    np.testing.assert_allclose(encoded.scale.mean(0), 0.5**0.5, rtol=0.1)


def test_joint_latents_in_the_columns_are_refused():
    guide = AutoAmortizedMultivariateNormal(within_columns, LINEAR, plate="rows")
    message = r"'z' lies in plate 'columns'.*4 of 12.*AutoAmortizedNormal"
    with pytest.raises(ValueError, match=message):
        handlers.seed(guide, 0)(X)


def test_heads_that_read_some_columns_are_refused():
    guide = AutoAmortizedNormal(model, LINEAR, plate="rows", condition_on=["effect"])
    with pytest.raises(ValueError, match=r"'effect' lies in plate 'columns'.*subsample_size"):
        handlers.seed(guide, 0)(X)
