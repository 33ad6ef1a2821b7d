"""Programs of a guide of data sets with latents in a plate, padded, say what the posterior says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from serving_cases import KEY, load

from numpyro_vae import AutoAmortizedNormal, NestedSetEncoder, Posterior, data_sets, fit

SMALL = partial(NestedSetEncoder, element_sizes=(4,), hidden_sizes=(5,))
SIZES = {"group": np.array([3, 2]), "row": np.array([[4, 1, 2], [3, 4, 0]])}
Y = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
DATA = {"y": Y, "sizes": SIZES}
INPUTS = {"y": Y} | {f"sizes['{name}']": size.astype(np.int32) for name, size in SIZES.items()}


def groups(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("group", y.shape[0], dim=-2):
        theta = numpyro.sample("theta", dist.Normal(mu, 0.5))
        with numpyro.plate("row", y.shape[1], dim=-1):
            numpyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@pytest.fixture(scope="module")
def posterior():
    """Of parameters of which none is where it started, so that heads read features and values."""
    sets = data_sets(groups)
    svi = SVI(sets, AutoAmortizedNormal(sets, SMALL), optax.sgd(0.0), Trace_ELBO())
    result = fit(svi, jax.random.key(0), DATA, num_epochs=1, progress_bar=False)
    leaves, treedef = jax.tree.flatten(result.params)
    rng = np.random.default_rng(1)
    moved = [x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return Posterior(svi.guide, result._replace(params=jax.tree.unflatten(treedef, moved)))


@pytest.mark.slow
def test_programs_of_data_sets(posterior, tmp_path):
    folder = tmp_path / "served"
    manifest = posterior.export(folder, DATA, platforms=["cpu"], num_samples=7)
    assert manifest["sizes"] == {"group": [2, 3], "row": [1, 4]}
    assert {name: told["shape"] for name, told in manifest["inputs"].items()} == {
        "y": ["rows", 3, 4],
        "sizes['group']": ["rows"],
        "sizes['row']": ["rows", 3],
    }
    assert list(manifest["artifacts"]) == ["sample", "importance"]
    assert "family DiagonalNormal and read the sites ['mu']" in manifest["left_out"]["encode"]
    program, arrays = load(folder, "importance")
    keys = np.tile(jax.random.key_data(KEY), (2, 1)), np.arange(2, dtype=np.int32)
    found = program(arrays, *keys, INPUTS)
    for name, draws in posterior.sample(KEY, DATA, 7).items():
        np.testing.assert_allclose(found["draws"][name], draws, rtol=1e-4, atol=1e-5)
    weights = posterior.log_weights(KEY, DATA, 7)
    np.testing.assert_allclose(found["log_weights"], weights, rtol=1e-4, atol=1e-4)
    padded = np.where(np.arange(4) < SIZES["row"][..., None], Y, np.float32(99.0))
    found = program(arrays, *keys, INPUTS | {"y": padded})
    np.testing.assert_allclose(found["log_weights"], weights, rtol=1e-4, atol=1e-4)
