"""Data in the forms that other libraries have them: sparse, in Parquet, in frames, from loaders."""

import warnings

import anndata
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from numpyro_vae import Columns, Posterior, amortize, fit
from numpyro_vae.data.sparse import SparseRows, as_rows
from numpyro_vae.data.stores import Store, in_memory
from tests.helpers import make_svi

KEY = jax.random.key(0)
ROWS = 60


def model(x):
    with numpyro.plate("cells", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        rate = jnp.broadcast_to(jnp.exp(z)[:, None], x.shape)
        numpyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def counts(num_rows=ROWS):
    rng = np.random.default_rng(0)
    return rng.poisson(np.exp(rng.normal(-0.5, 1.0, (num_rows, 1))), (num_rows, 4)).astype("f4")


X = counts()


def quick(data, **options):
    svi = make_svi(model)
    options = {"num_epochs": 2, "batch_size": 20, "progress_bar": False} | options
    return svi, fit(svi, KEY, data, **options)


@pytest.fixture(scope="module")
def trained():
    """What dense counts on disk are trained to, which are read as others are."""
    return quick(SparseRows(scipy.sparse.csr_array(X)))


def backed(path):
    """The counts of an AnnData that is on disk."""
    with warnings.catch_warnings():  # of what anndata asks of pandas
        warnings.simplefilter("ignore")
        anndata.AnnData(X=scipy.sparse.csr_matrix(X)).write_h5ad(path)
        return anndata.read_h5ad(path, backed="r").X


SPARSE = {
    "array": lambda path: scipy.sparse.csr_array(X),
    "matrix": lambda path: scipy.sparse.csr_matrix(X),
    "anndata": lambda path: anndata.AnnData(X=scipy.sparse.csr_matrix(X)).X,
    "backed": backed,
}


@pytest.mark.parametrize("make", SPARSE.values(), ids=SPARSE)
def test_sparse_counts_are_dense_where_they_are_read(trained, make, tmp_path):
    data, (svi, known) = make(tmp_path / "a.h5ad"), trained
    result = quick(data, validation=data)[1]
    np.testing.assert_array_equal(result.losses, known.losses)
    posterior = Posterior(svi.guide, known)
    np.testing.assert_allclose(posterior.encode(data)["z"].loc, posterior.encode(X)["z"].loc, 1e-5)
    assert isinstance(as_rows(data), SparseRows)


def test_a_block_of_sparse_rows_is_all_that_is_dense(monkeypatch):
    sizes, read = [], SparseRows.__getitem__
    monkeypatch.setattr(
        SparseRows, "__getitem__", lambda *args: (sizes.append(len(x := read(*args))), x)[1]
    )
    store = Store(as_rows(scipy.sparse.csr_array(X)), 0, read_bytes=160)
    for rows in np.split(np.arange(ROWS), 6):
        np.testing.assert_array_equal(store.take(rows), X[rows])
    assert max(sizes) == store.read_rows == 10
    some = np.array([59, 3, 3, 17])
    np.testing.assert_array_equal(store.take(some), X[some])


def test_batches_of_sparse_rows_come_from_an_iterable(trained):
    batches = [scipy.sparse.csr_array(X[:20]), scipy.sparse.csr_array(X[20:40])]
    result = quick(batches, num_data=40, batch_size=None)[1]
    assert np.isfinite(result.losses).all()


def test_sparse_matrices_of_other_formats_are_refused():
    with pytest.raises(TypeError, match=r"of format 'csc', expected compressed sparse rows.*tocsr"):
        quick(scipy.sparse.csc_array(X))


@pytest.mark.slow
def test_amortize_makes_them_dense():
    np.testing.assert_array_equal(in_memory({"x": scipy.sparse.csr_array(X)})["x"], X)
    posterior = amortize(
        model,
        KEY,
        scipy.sparse.csr_array(X),
        num_steps=4,
        num_simulation_steps=0,
        progress_bar=False,
    )
    assert posterior.sample(KEY, X, 3)["z"].shape == (3, ROWS)


# -- Parquet ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two files with groups of seven rows: columns a to d, a name, and one with gaps."""
    table = pa.table({name: X[:, place] for place, name in enumerate("abcd")})
    table = table.append_column("name", pa.array([f"cell {n}" for n in range(ROWS)]))
    gaps = [None if n == 31 else n for n in range(ROWS)]
    table = table.append_column("gaps", pa.array(gaps, pa.int64()))
    table = table.append_column("floats", pa.array(gaps, pa.float32()))
    path = tmp_path / "cells"
    path.mkdir()
    pq.write_table(table.slice(0, 25), path / "0.parquet", row_group_size=7)
    pq.write_table(table.slice(25), path / "1.parquet", row_group_size=7)
    return path


def test_columns_are_an_array_on_disk(folder):
    found = Columns(folder, ["a", "b", "c", "d"])
    assert (found.shape, found.dtype, found.chunks) == ((ROWS, 4), np.float32, (7, 4))
    np.testing.assert_array_equal(found, X)
    for start, stop in ((0, 60), (0, 7), (3, 11), (24, 26), (30, 30), (59, 70), (60, 61)):
        np.testing.assert_array_equal(found[start:stop], X[start:stop])
    np.testing.assert_array_equal(found[[5, 40]], X[[5, 40]])
    np.testing.assert_array_equal(Columns(folder, "b")[10:20], X[10:20, 1])
    dataset = pyarrow.dataset.dataset(folder)
    np.testing.assert_array_equal(Columns(dataset, ["d", "a"])[3:30], X[3:30, [3, 0]])


def test_columns_are_trained_on_and_judged(trained, folder):
    data = {"x": Columns(folder, list("abcd"))}
    svi, result = quick(data)
    assert result.num_data == ROWS
    posterior = Posterior(svi.guide, result)
    np.testing.assert_allclose(posterior.encode(data)["z"].loc, posterior.encode(X)["z"].loc, 1e-5)


def test_tables_are_arrays():
    table = pa.table({name: X[:, place] for place, name in enumerate("abcd")})
    np.testing.assert_array_equal(quick(table)[1].losses, quick(X)[1].losses)
    assert as_rows({"x": table["a"]})["x"].shape == (ROWS,)


def test_wrong_columns_are_named(folder):
    with pytest.raises(KeyError, match="There is no column 'e', choose from"):
        Columns(folder, ["a", "e"])
    with pytest.raises(TypeError, match="Column 'name' is of type string, expected numbers"):
        Columns(folder)
    with pytest.raises(ValueError, match=r"Column 'gaps' lacks 1 of its values.*int64 has no NaN"):
        np.asarray(Columns(folder, "gaps"))
    assert np.isnan(np.asarray(Columns(folder, "floats"))).sum() == 1
    with pytest.raises(TypeError, match=r"choose its columns, as in numpyro_vae.Columns"):
        quick(pyarrow.dataset.dataset(folder))
    with pytest.raises(TypeError, match=r"choose its columns, as in numpyro_vae.Columns"):
        quick(pq.ParquetFile(folder / "0.parquet"))


# -- frames and loaders ----------------------------------------------------------------------------


def test_frames_are_arrays():
    frame = pd.DataFrame(X, columns=["format", "chunks", "shape", "indexes"])
    np.testing.assert_array_equal(quick(frame)[1].losses, quick(X)[1].losses)


def two(x, y):
    with numpyro.plate("cells", len(x)):
        z = numpyro.sample("z", dist.Normal(y, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_a_loader_of_grain():
    grain = pytest.importorskip("grain")
    pairs = [(X[n, 0], X[n, 1]) for n in range(ROWS)]
    loader = grain.MapDataset.source(pairs).shuffle(seed=0).to_iter_dataset().batch(20)
    result = fit(make_svi(two), KEY, loader, num_epochs=2, num_data=ROWS, progress_bar=False)
    assert result.losses.shape == (6,)
    assert np.isfinite(result.losses).all()


class Tensor:
    """What a tensor of torch is to NumPy."""

    def __init__(self, array):
        self.array, self.shape, self.ndim = array, array.shape, array.ndim

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_a_loader_that_makes_lists_of_tensors():
    batches = [[Tensor(X[n : n + 20, 0]), Tensor(X[n : n + 20, 1])] for n in (0, 20, 40)]
    known = [(X[n : n + 20, 0], X[n : n + 20, 1]) for n in (0, 20, 40)]
    options = {"num_epochs": 2, "num_data": ROWS, "progress_bar": False}
    losses = [fit(make_svi(two), KEY, data, **options).losses for data in (batches, known)]
    np.testing.assert_array_equal(*losses)


def test_a_loader_of_torch():
    torch = pytest.importorskip("torch")
    tensors = torch.utils.data.TensorDataset(torch.tensor(X[:, 0]), torch.tensor(X[:, 1]))
    loader = torch.utils.data.DataLoader(tensors, batch_size=20, shuffle=True)
    result = fit(make_svi(two), KEY, loader, num_epochs=2, num_data=ROWS, progress_bar=False)
    assert result.losses.shape == (6,)
    assert np.isfinite(result.losses).all()
