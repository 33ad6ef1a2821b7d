"""What a model scales, its guide scales, and its densities count."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import SMALL, make_svi
from numpyro import handlers
from numpyro.infer import Trace_ELBO, TraceMeanField_ELBO
from numpyro.infer.util import log_density

from numpyro_vae import (
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    Posterior,
    fit,
)

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0, 1.1, 64).astype(np.float32)
WEIGHTS = jnp.linspace(0.5, 2.0, 64)


def model(x, latent=1.0, data=1.0):
    with numpyro.plate("data", len(x)):
        with handlers.scale(scale=latent):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with handlers.scale(scale=data):
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def with_global(x):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.LogNormal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z + b, 0.5), obs=x)


SCALED = {
    "latent": (lambda x: model(x, latent=4.0), 4.0),
    "data": (lambda x: model(x, data=3.0), 1.0),
    "everything": (handlers.scale(model, scale=1 / 64), 1 / 64),
    "by row": (handlers.scale(model, scale=WEIGHTS), WEIGHTS),
    "with a global": (handlers.scale(with_global, scale=0.25), 0.25),
}


def trained(scaled, auto=AutoAmortizedNormal, epochs=1):
    guide = auto(scaled, SMALL)
    svi = make_svi(scaled, loss=Trace_ELBO())
    svi.guide = guide
    result = fit(svi, KEY, X, num_epochs=epochs, progress_bar=False)
    return guide, result, Posterior(guide, result)


@pytest.mark.slow
@pytest.mark.parametrize("auto", [AutoAmortizedNormal, AutoAmortizedMultivariateNormal])
@pytest.mark.parametrize("case", SCALED)
def test_weights_and_elbo_are_those_of_numpyro(case, auto):
    """The weight of a row is NumPyro's difference of densities, by the scale of its latents."""
    scaled, of_latents = SCALED[case]
    guide, result, posterior = trained(scaled, auto)
    draws = posterior.sample(KEY, X, 2)
    found = posterior.log_weights(KEY, X, 2)
    for number in range(2):
        values = {name: jnp.asarray(value[number]) for name, value in draws.items()}
        log_p, _ = log_density(scaled, (X,), {}, {**result.params, **values})
        if auto is AutoAmortizedMultivariateNormal:  # of which z is a function
            unconstrained = jnp.log(values["z"]) if case == "with a global" else values["z"]
            values["_auto_z_latent"] = unconstrained[:, None]
            del values["z"]
        log_q, _ = log_density(guide, (X,), {}, {**result.params, **values})
        expected = log_p - log_q
        if "b" in values:  # a Normal at its site, and AutoNormal's
            scale = result.params["b_auto_scale"]
            log_q_b = dist.Normal(result.params["b_auto_loc"], scale).log_prob(values["b"])
            expected -= 0.25 * (dist.Normal(0.0, 1.0).log_prob(values["b"]) - log_q_b)
        np.testing.assert_allclose((found[number] * of_latents).sum(), expected, rtol=2e-5)


def test_every_site_of_the_guide_has_the_factor_of_the_models():
    for auto, site in (
        (AutoAmortizedNormal, "z"),
        (AutoAmortizedMultivariateNormal, "_auto_z_latent"),
    ):
        trace = handlers.trace(handlers.seed(auto(SCALED["by row"][0]), KEY)).get_trace(X)
        np.testing.assert_allclose(trace[site]["scale"], WEIGHTS)
    guide = AutoAmortizedNormal(SCALED["with a global"][0])
    trace = handlers.trace(handlers.seed(guide, KEY)).get_trace(X)
    assert trace["b"]["scale"] == trace["z"]["scale"] == 0.25


@pytest.mark.parametrize(("case", "sd"), [("latent", 0.707), ("everything", 0.447)])
def test_the_posterior_is_that_of_the_scaled_elbo(case, sd):
    """p(z) p(x|z)^(1/4) has precision 1 + 4/4; a factor of everything changes nothing."""
    scaled, _ = SCALED[case]
    svi = make_svi(scaled, loss=TraceMeanField_ELBO(num_particles=4), optimizer=2e-2)
    result = fit(svi, KEY, X, num_epochs=600, progress_bar=False)
    posterior = Posterior(svi.guide, result)
    np.testing.assert_allclose(posterior.encode(X)["z"].scale.mean(), sd, rtol=0.05)
    weights = posterior.log_weights(KEY, X, 100)
    assert np.median(weights.std(0)) < 0.2
    if case == "everything":
        exact = dist.Normal(0.0, np.sqrt(1.25)).log_prob(X).sum()
        evidence = posterior.log_evidence(KEY, X, 50).sum(1).mean()
        np.testing.assert_allclose(evidence, exact, atol=0.3)


@pytest.mark.slow
def test_latents_masked_as_a_whole_are_scored_by_another_site():
    """``z ~ N(0, 1).mask(False)`` and ``sample("z_aux", prior, obs=z)`` are the model without."""

    def elsewhere(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
            numpyro.sample("z_aux", dist.Normal(0.0, 1.0), obs=z)
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    svis = [make_svi(fn, loss=Trace_ELBO()) for fn in (model, elsewhere)]
    results = [fit(svi, KEY, X, num_epochs=20, progress_bar=False) for svi in svis]
    np.testing.assert_allclose(results[0].losses, results[1].losses, rtol=1e-5)
    posteriors = [Posterior(*pair) for pair in zip((s.guide for s in svis), results, strict=True)]
    weights = [posterior.log_weights(KEY, X, 10) for posterior in posteriors]
    np.testing.assert_allclose(*weights, atol=1e-4)
    tree = posteriors[1].to_datatree(KEY, X, 10)
    assert list(tree["observed_data"].data_vars) == ["x"]
    assert list(tree["posterior_predictive"].data_vars) == ["x"]
    assert posteriors[1].repair(KEY, X, [0, 1], method="importance").remaining.size == 0


def test_entries_that_a_latent_masks_itself_stay_masked_if_it_is_masked_as_a_whole():
    """A flat prior of the first and third entry: the second one counts for nobody."""
    entries = jnp.array([True, False, True])

    def flat(x):
        with numpyro.plate("data", len(x)):
            with handlers.mask(mask=False):
                prior = dist.Normal(0.0, 1.0).expand([3]).mask(entries).to_event(1)
                z = numpyro.sample("z", prior)
            numpyro.sample("x", dist.Normal(z[:, 0] + z[:, 2], 0.5), obs=x)

    _, _, posterior = trained(flat)
    key = jax.random.key(1)
    z = posterior.sample(key, X, 3)["z"]
    loc, scale = posterior.encode(X)["z"]
    log_q = dist.Normal(loc, scale).log_prob(z)[..., jnp.array([0, 2])].sum(-1)
    likelihood = dist.Normal(z[..., 0] + z[..., 2], 0.5).log_prob(X)
    np.testing.assert_allclose(posterior.log_weights(key, X, 3), likelihood - log_q, atol=1e-4)


def test_local_latents_of_unlike_scales_have_no_weights():
    def unlike(x):
        with numpyro.plate("data", len(x)):
            with handlers.scale(scale=2.0):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z + w, 0.5), obs=x)

    message = r"unlike factors: .*'z'.*one handlers\.scale"
    _, _, posterior = trained(unlike)
    assert posterior.sample(KEY, X, 2)["w"].shape == (2, 64)
    with pytest.raises(ValueError, match=message):
        posterior.log_weights(KEY, X, 2)
    with pytest.raises(ValueError, match=message):
        AutoAmortizedMultivariateNormal(unlike).setup(X)
