"""The mixtures of Normals that posteriors are repaired with."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from numpyro_vae.repair.proposals import Kernels


def kernels():
    draws = np.random.default_rng(0).normal(size=(2, 50, 3)).astype(np.float32)
    draws[..., 1] += 3 * draws[..., 0]
    return jax.tree.map(jnp.asarray, Kernels.around(draws, np.array([50.0, 50.0])))


def test_the_density_is_that_of_the_mixture():
    mixture, value = kernels(), jnp.asarray([[0.1, 0.5, 0.0], [1.0, 2.0, -1.0]])
    found = mixture.log_prob()(value)
    for row in range(2):
        covariance = mixture.scale_tril[row] @ mixture.scale_tril[row].T
        parts = [stats.multivariate_normal(c, covariance) for c in mixture.centers[row]]
        expected = np.log(np.mean([part.pdf(value[row]) for part in parts]))
        np.testing.assert_allclose(found[row], expected, rtol=1e-4)


def test_products_of_matrices_are_not_shortened_on_a_gpu():
    """Or a draw would be weighed by the density of another."""

    def used(mixture, value):
        return mixture.sample(jax.random.key(0), 4), mixture.log_prob()(value)

    text = str(jax.make_jaxpr(used)(kernels(), jnp.zeros((2, 3))))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST") == 3
