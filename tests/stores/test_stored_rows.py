"""What a posterior says of rows on disk is what it says of them in memory."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_vae import Posterior, fit
from numpyro_vae.data import stores
from numpyro_vae.inference import rows, runner
from numpyro_vae.inference.marginal import log_density
from tests.helpers import make_svi
from tests.stores.store_cases import KEY, ROWS, STORES, drawn, fitted

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


@pytest.mark.slow
def test_draws_weights_and_encodings_are_those_of_data_in_memory(posterior, stored, small):
    same(posterior.encode(stored), posterior.encode(DATA))
    same(posterior.sample(KEY, stored, 5), posterior.sample(KEY, DATA, 5))
    same(posterior.predict(KEY, stored, 3), posterior.predict(KEY, DATA, 3))
    same(posterior.log_evidence(KEY, stored, 4), posterior.log_evidence(KEY, DATA, 4), rtol=1e-3)


@pytest.mark.slow
def test_the_tree_is_that_of_data_in_memory(posterior, stored, small):
    tree, known = (posterior.to_datatree(KEY, data, 4) for data in (stored, DATA))
    assert tree.attrs == known.attrs
    for group in known.children:
        assert tree[group].dims == known[group].dims
        same(dict(tree[group].data_vars), dict(known[group].data_vars), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["zarr", "csr"], indirect=True)
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


def of_all_rows(x, y):
    with numpyro.plate("cells", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])
    numpyro.deterministic("total", z.sum())


def with_global(x, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("cells", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])


def reads_data(model):
    """A guide of the global site that looks at the data."""

    def guide(x, y):
        scale = numpyro.param("scale", 0.1, constraint=dist.constraints.positive)
        return {"mu": numpyro.sample("mu", dist.Normal(x.mean(), scale))}

    return guide


@pytest.mark.slow
@pytest.mark.parametrize("model", [of_all_rows, with_global])
def test_what_needs_all_rows_reads_them(model, tmp_path, small):
    stored = {"x": STORES["zarr"](DATA["x"], tmp_path), "y": DATA["y"]}
    options = {"global_guide": reads_data} if model is with_global else {}
    svi = make_svi(model, **options)
    result = fit(svi, KEY, DATA, num_epochs=1, batch_size=ROWS, progress_bar=False)
    posterior = Posterior(svi.guide, result)
    trees = [posterior.to_datatree(KEY, data, 3, groups="posterior") for data in (stored, DATA)]
    same(*(dict(tree.posterior.data_vars) for tree in trees), rtol=1e-3)


def test_a_guide_that_knows_its_rows_reads_them_all(tmp_path, small):
    guide = AutoNormal(with_global)
    svi = SVI(with_global, guide, optax.adam(1e-2), Trace_ELBO())
    posterior = Posterior(guide, svi.run(KEY, 3, progress_bar=False, **DATA))
    stored = {"x": STORES["zarr"](DATA["x"], tmp_path), "y": DATA["y"]}
    draws = [posterior.sample(KEY, data, 3) for data in (stored, DATA)]
    same(*draws)


def counting(x, y):
    """A model in which the prior of a global site knows how many rows there are."""
    mu = numpyro.sample("mu", dist.Normal(0.0, len(x) ** 0.5))
    numpyro.deterministic("share", mu / len(x))
    with numpyro.plate("cells", len(x)):
        z = numpyro.sample("z", dist.Normal(mu + y, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None], 0.5).to_event(1), obs=x)


def counts_data(model):
    """A guide of the global site that is the narrower the more rows there are."""

    def guide(x, y):
        loc = numpyro.param("loc", 0.3)
        return {"mu": numpyro.sample("mu", dist.Normal(loc, 1 / len(x)))}

    return guide


@pytest.mark.slow
def test_what_counts_all_rows_counts_those_on_disk(small, tmp_path):
    stored = {"x": STORES["memmap"](DATA["x"], tmp_path), "y": DATA["y"]}
    svi = make_svi(counting, global_guide=counts_data)
    params = fit(svi, KEY, DATA, num_epochs=1, progress_bar=False)
    posterior = Posterior(svi.guide, params)
    same(posterior.sample(KEY, stored, 5), posterior.sample(KEY, DATA, 5))
    tree, known = (posterior.to_datatree(KEY, data, 4) for data in (stored, DATA))
    same(tree.posterior["share"], known.posterior["share"])
    densities = [
        log_density(posterior._runner, read, KEY, {"mu": np.zeros(2, np.float32)}, 4).values
        for read in map(posterior._runner.read, (stored, DATA))
    ]
    same(*densities)
