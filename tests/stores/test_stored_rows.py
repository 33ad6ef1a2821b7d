"""What a posterior says of rows on disk is what it says of them in memory."""

import jax
import numpy as np
import pytest

from numpyro_vae.data import stores
from numpyro_vae.inference import rows, runner
from tests.stores.store_cases import KEY, STORES, drawn, fitted

DATA = drawn()


@pytest.fixture(scope="module")
def posterior():
    return fitted(DATA)


@pytest.fixture(params=STORES)
def stored(request, tmp_path):
    return {"x": STORES[request.param](DATA["x"], tmp_path), "y": DATA["y"]}


@pytest.fixture
def small(monkeypatch):
    """Blocks of ten rows, and batches of eight."""
    monkeypatch.setattr(runner, "ROWS", 8)
    monkeypatch.setattr(rows, "SOME", 6)
    init = stores.Store.__init__
    monkeypatch.setattr(stores.Store, "__init__", lambda self, *a: init(self, *a, read_bytes=160))


def same(one, other, **options):
    options = {"rtol": 1e-4, "atol": 1e-5} | options
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **options), one, other)


def test_draws_weights_and_encodings_are_those_of_data_in_memory(posterior, stored, small):
    same(posterior.encode(stored), posterior.encode(DATA))
    same(posterior.sample(KEY, stored, 5), posterior.sample(KEY, DATA, 5))
    same(posterior.predict(KEY, stored, 3), posterior.predict(KEY, DATA, 3))
    same(posterior.log_evidence(KEY, stored, 4), posterior.log_evidence(KEY, DATA, 4), rtol=1e-3)


def test_the_tree_is_that_of_data_in_memory(posterior, stored, small):
    tree, known = (posterior.to_datatree(KEY, data, 4) for data in (stored, DATA))
    assert tree.attrs == known.attrs
    for group in known.children:
        assert tree[group].dims == known[group].dims
        same(dict(tree[group].data_vars), dict(known[group].data_vars), rtol=1e-3)


def test_checks_and_repairs_are_those_of_data_in_memory(posterior, stored, small):
    report, known = (posterior.check(KEY, data, progress_bar=False) for data in (stored, DATA))
    same(dict(report.dataset.data_vars), dict(known.dataset.data_vars), rtol=1e-2, atol=1e-3)
    flagged = [0, 5, 33]
    made, known = (
        posterior.repair(KEY, data, flagged, method="importance", num_samples=50).dataset
        for data in (stored, DATA)
    )
    np.testing.assert_array_equal(made["cells"], flagged)
    np.testing.assert_allclose(made["log_evidence"], known["log_evidence"], rtol=1e-2)
    posterior.repair(
        KEY, stored, report, method="importance", num_samples=50
    )  # which is of the same rows
