"""What a posterior takes from its fit, and what of a DataTree is left out."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
from helpers import make_svi, train
from models import hierarchical_model
from numpyro.infer import Trace_ELBO

from numpyro_vae import AutoAmortizedNormal, Posterior, fit

KEY = jax.random.key(1)
X = np.linspace(-2, 2, 30).astype(np.float32)


@pytest.fixture(scope="module")
def hierarchical():
    return train(AutoAmortizedNormal(hierarchical_model), X, steps=20)


def test_groups_of_a_tree_can_be_left_out(hierarchical):
    whole = hierarchical.to_datatree(KEY, X, 20)
    some = ("log_likelihood", "posterior", "sample_stats")
    tree = hierarchical.to_datatree(KEY, X, 20, groups=some)
    assert set(tree.children) == set(some)
    for name in some:
        xr.testing.assert_allclose(tree[name].to_dataset(), whole[name].to_dataset(), rtol=1e-5)
    one = hierarchical.to_datatree(KEY, X, 20, groups="observed_data")
    assert set(one.children) == {"observed_data"}
    with pytest.raises(ValueError, match=r"no groups \['prior'\] here, choose from \['posterior'"):
        hierarchical.to_datatree(KEY, X, 20, groups=("posterior", "prior"))


def test_a_posterior_knows_what_its_fit_knew():
    def model(x, kind):
        prior = {"normal": dist.Normal, "laplace": dist.Laplace}[kind]
        with numpyro.plate("data", x.shape[1]):
            z = numpyro.sample("z", prior(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x[0])

    svi = make_svi(model, loss=Trace_ELBO())
    svi.static_kwargs = {"kind": "laplace"}
    result = fit(svi, KEY, X[None], batch_axes=1, num_epochs=2, progress_bar=False)
    draws = Posterior(svi.guide, result).sample(KEY, X[None, :7], 3)["z"]
    assert draws.shape == (3, 7)
    options = {"batch_axes": 1, "static_kwargs": {"kind": "laplace"}}
    again = Posterior(svi.guide, result.params, **options).sample(KEY, X[None, :7], 3)["z"]
    np.testing.assert_array_equal(draws, again)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        Posterior(svi.guide, result, kind="laplace")
