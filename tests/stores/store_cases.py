"""A small posterior, and its data on disk."""

import itertools

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.sparse
import zarr

from numpyro_vae import Posterior, fit
from numpyro_vae.inference.regions import Regions
from tests.helpers import make_svi

KEY = jax.random.key(0)
ROWS = 37


def model(x, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("cells", len(x)):
        z = numpyro.sample("z", dist.Normal(mu + y, 1.0).expand([len(x)]))
        numpyro.deterministic("twice", 2 * z)
        loc = jnp.broadcast_to(z[:, None], x.shape)
        numpyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def drawn(num_rows=ROWS):
    rng = np.random.default_rng(0)
    y = rng.normal(size=num_rows).astype("f4")
    x = y[:, None] + rng.normal(size=(num_rows, 1)) + 0.5 * rng.normal(size=(num_rows, 3))
    return {"x": np.where(rng.random(x.shape) < 0.7, x, 0.0).astype("f4"), "y": y}


def fitted(data, model=model):
    svi = make_svi(model)
    return Posterior(svi.guide, fit(svi, KEY, data, num_epochs=2, progress_bar=False))


def to_memmap(array, folder):
    stored = np.memmap(folder / "a.dat", array.dtype, "w+", shape=array.shape)
    stored[:] = array
    return stored


def to_zarr(array, folder):
    chunks = (5, *array.shape[1:])
    stored = zarr.create_array(folder / "a.zarr", shape=array.shape, chunks=chunks, dtype="f4")
    stored[:] = array
    return stored


def to_hdf5(array, folder):
    return h5py.File(folder / "a.h5", "w").create_dataset("a", data=array)


def to_csr(array, folder):
    return scipy.sparse.csr_array(array)


STORES = {"memmap": to_memmap, "zarr": to_zarr, "hdf5": to_hdf5, "csr": to_csr}


class Killed(BaseException):
    """As when a process ends."""


def kill(run, parts):
    """Let a run end when it has written so many parts, and another one of which it tells no one."""
    count, writers = itertools.count(), {"_create": Regions._create, "_fill": Regions._fill}

    def breaks(write):
        def written(*args):
            write(*args)
            if next(count) >= parts:
                raise Killed

        return written

    with pytest.MonkeyPatch.context() as patch:
        for name, write in writers.items():
            patch.setattr(Regions, name, breaks(write))
        with pytest.raises(Killed):
            run()
