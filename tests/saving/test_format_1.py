"""Posteriors saved in format 1 are read for good: never write ``format_1`` anew.

It was made by ``python tests/saving/test_format_1.py`` of the cases below, which must stay as they
are, and has what the first version drew of them.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from saved_cases import CASES

from numpyro_vae import Posterior
from numpyro_vae.families import FullRankNormal
from numpyro_vae.saving.arrays import upgrade

# One of the models takes statistics of a batch.
pytestmark = pytest.mark.filterwarnings("ignore:The model's networks .* take statistics of a batch")
FOLDER = pathlib.Path(__file__).parent / "format_1"
NAMES = ("state and dropout", "global sites", "options", "networks in the model")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_is_read(name):
    case = CASES[name]
    posterior = Posterior.load(FOLDER / name.replace(" ", "_"), case.model, **case.again)
    with np.load(FOLDER / "expected.npz") as expected:
        for place, leaf in enumerate(jax.tree.leaves(posterior.params)):
            numbers = jax.random.key_data(leaf) if "key" in str(leaf.dtype) else leaf
            np.testing.assert_array_equal(numbers, expected[f"{name}/{place}"])
        for site, draws in case.draw(posterior).items():
            # Other processors, and other versions of XLA, round otherwise.
            np.testing.assert_allclose(draws, expected[f"{name}/{site}"], rtol=1e-4, atol=1e-4)


def test_correlations_of_a_wide_network_are_what_they_were():
    """They were features times a kernel, without the gain of today."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(3, 1024)).astype(np.float32)
    kernel = rng.normal(size=(1024, 780)).astype(np.float32)
    name = "auto$params['blocks']['z']['head']['lower']['kernel']"
    head = FullRankNormal().head(1024, 40, rngs=nnx.Rngs(0))
    assert head.gain < 1
    head.lower.kernel[...] = upgrade({name: kernel, "other": kernel})[name]
    found = head(jnp.asarray(features))[2]
    np.testing.assert_allclose(found, features @ kernel, rtol=1e-4, atol=1e-3)


if __name__ == "__main__":
    arrays = {}
    for name in NAMES:
        posterior = CASES[name].train()
        posterior.save(FOLDER / name.replace(" ", "_"))
        for place, leaf in enumerate(jax.tree.leaves(posterior.params)):
            is_key = "key" in str(leaf.dtype)
            arrays[f"{name}/{place}"] = jax.random.key_data(leaf) if is_key else leaf
        for site, draws in CASES[name].draw(posterior).items():
            arrays[f"{name}/{site}"] = draws
    np.savez_compressed(FOLDER / "expected.npz", **arrays)
