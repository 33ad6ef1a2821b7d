"""The encoder that is chosen for a model reads covariates, which the posterior depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedNormal, Posterior, fit
from numpyro_vae.choices import choose_guide
from numpyro_vae.model.covariates import WithCovariates
from numpyro_vae.saving.codec import pack, unpack

RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3)).astype(np.float32)
SHIFT = RNG.normal(size=20).astype(np.float32)
QUIET = {"progress_bar": False}


def shifted(x, shift, scale=1.0):
    """The posterior of z is one of ``x`` less the shift."""
    with numpyro.plate("data", len(shift)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        loc = jnp.broadcast_to((z + shift)[:, None], (len(shift), 3))
        numpyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)


def trained(model, data, **options):
    guide = choose_guide(model, data, **options)
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    result = fit(svi, jax.random.key(0), data, batch_size=10, num_epochs=1, **QUIET, **options)
    return Posterior(guide, result)


def test_the_posterior_depends_on_covariates():
    posterior = trained(shifted, (X, SHIFT))
    some = posterior.sample(jax.random.key(1), (X, SHIFT), 5)["z"]
    others = posterior.sample(jax.random.key(1), (X, SHIFT + 1), 5)["z"]
    assert not np.isclose(some, others).any()


def test_rows_are_selected_as_those_of_the_data():
    posterior = trained(shifted, (X, SHIFT))
    every = posterior.sample(jax.random.key(1), (X, SHIFT), 5)["z"]
    some = posterior.sample(jax.random.key(1), (X[:4], SHIFT[:4]), 5)["z"]
    np.testing.assert_allclose(every[:, :4], some, rtol=1e-4)


def test_a_model_without_its_observations_draws_from_the_prior():
    posterior = trained(shifted, (X, SHIFT))
    drawn = posterior.predict(jax.random.key(1), (None, SHIFT), 2000)["x"]
    np.testing.assert_allclose(drawn.mean((0, 2)), SHIFT, atol=0.15)


@pytest.mark.parametrize(
    ("data", "batch_axes", "found"),
    [
        ((X, SHIFT), 0, (("[0][1]", 0),)),
        ({"x": X, "shift": SHIFT}, 0, (("[1]['shift']", 0),)),
        ((X, SHIFT, 2.0), (0, 0, None), (("[0][1]", 0),)),
        ((X, SHIFT, np.float32(2.0)), (0, 0, None), (("[0][1]", 0),)),
    ],
)
def test_arrays_of_rows_that_are_not_observed_are_covariates(data, batch_axes, found):
    guide = choose_guide(shifted, data, batch_axes=batch_axes)
    assert guide.inputs == WithCovariates(found)


def test_what_observed_values_are_computed_from_is_not():
    def logs(x, there):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=jnp.where(there, jnp.log(x), 0.0))

    there = np.arange(20) % 2 > 0
    assert choose_guide(logs, (np.exp(SHIFT), there)).inputs is None


def test_what_is_not_finite_is_not():
    def ignores(x, comment):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    assert choose_guide(ignores, (SHIFT, np.where(SHIFT > 0, np.nan, 0))).inputs is None


def test_covariates_are_found_by_position_as_by_name():
    posterior, rng_key = trained(shifted, {"x": X, "shift": SHIFT}), jax.random.key(1)
    by_name = posterior.sample(rng_key, {"x": X, "shift": SHIFT}, 5)["z"]
    np.testing.assert_array_equal(posterior.sample(rng_key, (X, SHIFT), 5)["z"], by_name)


def test_a_covariate_that_is_not_given_is_named():
    def named(x, **given):
        shifted(x, given["shift"] if "shift" in given else given["moved"])

    posterior = trained(named, {"x": X, "shift": SHIFT})
    with pytest.raises(ValueError, match=r"covariates at \[\"\[1\]\['shift'\]\"\]"):
        posterior.sample(jax.random.key(1), {"x": X, "moved": SHIFT}, 5)


def test_it_can_be_saved():
    inputs = WithCovariates((("[0][1]", 0), ("[1]['x']", 1)))
    assert unpack(pack(inputs)) == inputs


def test_a_model_that_reads_the_values_of_its_arguments_has_none():
    def checked(x, shift):
        if np.isnan(shift).any():
            raise ValueError("No shift.")
        shifted(x, shift)

    assert choose_guide(checked, (X, SHIFT)).inputs is None


def test_what_inputs_makes_of_no_observations_is_told():
    guide = AutoAmortizedNormal(shifted, inputs=lambda x, shift: jnp.log(x))
    svi = SVI(shifted, guide, optax.adam(1e-3), Trace_ELBO())
    posterior = Posterior(guide, svi.get_params(svi.init(jax.random.key(0), np.exp(X), SHIFT)))
    with pytest.raises(TypeError) as error:
        posterior.predict(jax.random.key(1), (None, SHIFT), 5)
    notes = " ".join(error.value.__notes__)  # JAX has one too
    assert "inputs= was called with data that have no observations" in notes
