"""Checks name a site's dimensions as a DataTree does, so that they share coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import (
    AutoAmortizedFlow,
    AutoAmortizedNormal,
    Calibration,
    Posterior,
    fit,
)

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
COORDS = {
    "item": ("a", "b", "c"),
    "u_dim_0": ["p", "q"],
    "person": tuple(f"no. {number}" for number in range(8)),
}


def model(x):
    with numpyro.plate("person", len(x), dim=-2):
        u = numpyro.sample("u", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        share = numpyro.sample("share", dist.Dirichlet(jnp.ones(3)))
        with numpyro.plate("item", x.shape[1], dim=-1):
            z = numpyro.sample("z", dist.Normal(u[..., 0], 1.0))
            numpyro.sample("x", dist.Normal(z + u[..., 1] * share[..., 0], 0.5), obs=x)


@pytest.fixture(scope="module")
def posterior():
    guide = AutoAmortizedNormal(model, plate="person")
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    return Posterior(guide, fit(svi, KEY, X, num_epochs=1, progress_bar=False))


def test_variables_of_a_site_have_its_dimensions_and_coordinates(posterior):
    groups = ("posterior", "sample_stats")
    tree = posterior.to_datatree(KEY, X, 2, groups=groups, coords=COORDS)
    checks = ("collapse", Calibration(num_simulations=8))
    report = posterior.check(KEY, X, checks, coords=COORDS, progress_bar=False)
    tree = report.add_to(tree)
    for name in ("u", "z"):
        site, kl = tree["posterior"][name].isel(chain=0, draw=0), tree["checks"][f"kl_{name}"]
        assert kl.dims == site.dims
        for dim in kl.dims:
            np.testing.assert_array_equal(kl.get_index(dim), site.get_index(dim))
        inner = site.dims[1:]
        assert tree["checks"][f"activity_{name}"].dims == inner
        assert tree["prior_sbc"][name].dims == ("chain", "draw", *inner)
    # What is said of all shares together has none of their dimensions.
    assert tree["posterior"]["share"].dims[-2:] == ("share_batch_1", "share_dim_0")
    assert tree["checks"]["kl_share"].dims == ("person",)
    assert tree["prior_sbc"]["share"].dims[-2:] == ("share_batch_1", "share_dim_0")
    # Three shares are two unconstrained values, whose variances are compared.
    activity = tree["checks"]["activity_share"]
    assert activity.dims == ("share_batch_1", "share_unconstrained_0")
    assert activity.shape == (1, 2)


def test_latents_that_are_drawn_jointly_have_one_divergence_together():
    def pair(x):
        with numpyro.plate("person", len(x)):
            u, v = (numpyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("u", "v"))
            numpyro.sample("x", dist.Normal(u + v, 0.5), obs=x)

    guide = AutoAmortizedFlow(pair)
    svi = SVI(pair, guide, optax.adam(1e-2), Trace_ELBO())
    trained = Posterior(guide, fit(svi, KEY, X[:, 0], num_epochs=1, progress_bar=False))
    report = trained.check(KEY, X[:, 0], ("collapse",), progress_bar=False)
    assert report.dataset["kl_u_v"].dims == ("person",)
    assert {"activity_u", "activity_v"} <= set(report.dataset)
