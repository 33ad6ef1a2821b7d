"""Posteriors and fits in many threads: NumPyro's handlers are for one thread at a time."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import jax
import numpy as np
import pytest
from helpers import make_svi
from models import hierarchical

from numpyro_vae import Posterior, fit

KEY = jax.random.key(0)
THREADS = 8
EXACT = hierarchical()
X = EXACT.data[:40]
METHODS = {
    "encode": lambda posterior, x: posterior.encode(x),
    "sample": lambda posterior, x: posterior.sample(KEY, x, 5),
    "predict": lambda posterior, x: posterior.predict(KEY, x, 5),
    "log_evidence": lambda posterior, x: posterior.log_evidence(KEY, x, 5, num_particles=2),
}


@pytest.fixture(scope="module")
def result():
    svi = make_svi(EXACT.model)
    return fit(svi, KEY, EXACT.data, num_epochs=1, progress_bar=False)


def cold(result):
    """A posterior of which nothing is compiled and whose guide has read no model."""
    return Posterior(make_svi(EXACT.model).guide, result)


@pytest.mark.slow
def test_threads_from_cold_find_what_one_finds(result):
    posterior = cold(result)
    # Each size of data is traced anew, and each thread begins with another method.
    jobs = [(name, size) for size in (40, 17) for name in METHODS] * 2
    expected = {job: METHODS[job[0]](posterior, X[: job[1]]) for job in jobs}
    posterior, together = cold(result), Barrier(THREADS)

    def run(jobs):
        together.wait()
        return [(job, METHODS[job[0]](posterior, X[: job[1]])) for job in jobs]

    turns = [jobs[start:] + jobs[:start] for start in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(run, turns):
            for job, value in found:
                jax.tree.map(
                    partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), value, expected[job]
                )


def test_fits_in_threads_are_those_of_one_thread():
    """Each with an SVI of its own; before, their handlers saw each other's sites."""

    def run(seed):
        key = jax.random.key(seed)
        return fit(make_svi(EXACT.model), key, X, num_epochs=2, progress_bar=False).losses

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    for seed in (0, 3):
        np.testing.assert_array_equal(found[seed], run(seed))
