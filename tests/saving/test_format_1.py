"""Posteriors saved in format 1 are read for good: never write ``format_1`` anew.

It was made by ``python tests/saving/test_format_1.py`` of the cases below, which must stay as they
are, and has what the first version drew of them.
"""

import pathlib

import jax
import numpy as np
import pytest
from saved_cases import CASES

from numpyro_vae import Posterior

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
