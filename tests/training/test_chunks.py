"""Data on disk: every row once an epoch, as trained on as in memory, and no thread left behind."""

import re
import threading

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import zarr

from numpyro_vae import Simulations, fit
from numpyro_vae.data.stores import is_stored
from numpyro_vae.training.checkpoints import Checkpoints
from numpyro_vae.training.chunks import THREAD, ChunkSource
from numpyro_vae.training.sources import ArraySource
from numpyro_vae.training.step import trainer_of
from tests.helpers import make_svi

KEY = jax.random.key(0)
ROWS = 103


def to_memmap(array, folder):
    stored = np.memmap(folder / "a.dat", array.dtype, "w+", shape=array.shape)
    stored[:] = array
    return stored


def to_zarr(array, folder):
    chunks = (10, *array.shape[1:])
    stored = zarr.create_array(folder / "a.zarr", shape=array.shape, chunks=chunks, dtype="f4")
    stored[:] = array
    return stored


def to_hdf5(array, folder):
    return h5py.File(folder / "a.h5", "w").create_dataset("a", data=array, maxshape=(None, None))


STORES = {"memmap": to_memmap, "zarr": to_zarr, "hdf5": to_hdf5}


@pytest.fixture(params=STORES)
def to_store(request, tmp_path):
    return lambda array: STORES[request.param](np.asarray(array, np.float32), tmp_path)


def model(x, y=0.0):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(y, 1.0))
        loc = jnp.broadcast_to(z[:, None], x.shape)
        numpyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def numbered(num_rows=ROWS):
    """Rows that say which they are."""
    return np.arange(num_rows, dtype=np.float32)[:, None] * np.ones(2, np.float32)


def drawn(num_rows=300):
    rng = np.random.default_rng(0)
    return (rng.normal(size=(num_rows, 1)) + 0.5 * rng.normal(size=(num_rows, 2))).astype("f4")


def source_of(data, batch_size=8, read_bytes=96, model=model, batch_axes=0):
    """A source that reads 12 rows of two numbers at once, or more where chunks are larger."""
    return ChunkSource(trainer_of(make_svi(model)), data, batch_size, batch_axes, None, read_bytes)


def seen(source, epoch=0, key=KEY):
    """The arguments of all batches of an epoch."""
    pairs = source._windows(key, epoch)
    return [batch.at(rows).arguments() for batch, order in pairs for rows in order]


def rows_of(batches):
    return np.concatenate([np.asarray(args[0])[:, 0] for args, _ in batches]).astype(int)


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD)]


def quick(data, *, num_epochs=2, **options):
    options = {"batch_size": 32, "progress_bar": False} | options
    return fit(make_svi(model), KEY, data, num_epochs=num_epochs, **options)


# -- the batches -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 8, 50, ROWS])
def test_every_row_comes_once_an_epoch(to_store, batch_size):
    source = source_of(to_store(numbered()), batch_size)
    for epoch in range(3):
        rows = rows_of(seen(source, epoch))
        assert len(rows) == source.num_steps * batch_size
        counts = np.bincount(rows, minlength=ROWS)
        assert counts.min() == 1
        assert counts.sum() - ROWS == -ROWS % batch_size
        assert counts.max() <= 2


def test_all_rows_at_once_stay_in_order(to_store):
    source = source_of(to_store(numbered()), ROWS)
    np.testing.assert_array_equal(rows_of(seen(source)), np.arange(ROWS))


@pytest.mark.slow
def test_rows_that_fill_the_last_batch_up_are_any_rows(tmp_path):
    source = source_of(to_memmap(numbered(), tmp_path), 50)
    times, extra = 400, 47
    counts = sum(
        np.bincount(rows_of(seen(source, epoch)), minlength=ROWS) for epoch in range(times)
    )
    share = extra / ROWS
    error = np.sqrt(times * share * (1 - share))
    assert np.abs(counts - times * (1 + share)).max() < 5 * error


def test_windows_hold_a_few_reads_and_batches_rows_from_several(tmp_path):
    source = source_of(to_memmap(numbered(1003), tmp_path))
    (spans, order), *_ = source.plan(np.random.default_rng(1))
    assert max(len(spans) for spans, _ in source.plan(np.random.default_rng(1))) < 12
    lengths = [span.stop - span.start for span in spans]
    starts = np.repeat([span.start for span in spans], lengths)
    assert order.size == sum(lengths)
    assert len(np.unique(starts[order[0]])) > 2


def test_reads_are_whole_chunks_of_the_store(tmp_path):
    source = source_of(to_zarr(numbered(), tmp_path), read_bytes=200)  # 25 rows
    assert source.read_rows == 20
    assert source_of(source.store.data, read_bytes=1).read_rows == 10


def test_the_same_key_gives_the_same_batches_and_another_epoch_others(to_store):
    data = to_store(numbered())
    first, again = (rows_of(seen(source_of(data))) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first != rows_of(seen(source_of(data), 1))).any()
    assert (first != rows_of(seen(source_of(data), 0, jax.random.key(1)))).any()


def test_arrays_stay_together_along_axes_of_their_own(to_store):
    def two(x, scale, *, y):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(y[0], scale))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def keyword(x, y, scale):
        return two(x, scale, y=y)

    data = {"x": to_store(numbered()), "y": jnp.asarray(numbered()).T, "scale": 2.0}
    axes = {"x": 0, "y": 1, "scale": None}
    batches = seen(source_of(data, model=keyword, batch_axes=axes))
    assert len(batches) == -(-ROWS // 8)
    for _, kwargs in batches:
        np.testing.assert_array_equal(kwargs["x"], kwargs["y"].T)
        assert kwargs["scale"] == 2.0


def test_what_is_on_disk(to_store):
    stored = to_store(numbered())
    assert is_stored(stored)
    assert is_stored({"x": numbered(), "y": stored})
    assert not is_stored((numbered(), stored), (0, None))
    assert not is_stored(stored, None)
    assert not is_stored((jnp.zeros(3), 1.0))


# -- training --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fit_is_as_good_as_in_memory(to_store):
    x = drawn()
    options = {"num_epochs": 40, "validation": x}
    results = [quick(data, **options) for data in (to_store(x[np.argsort(x[:, 0])]), x)]
    assert results[0].num_data == len(x)
    assert results[0].losses.shape == results[1].losses.shape
    last = [result.history["validation_loss"][-1] for result in results]
    assert abs(last[0] - last[1]) < 0.03


def test_the_elbo_of_batches_is_unbiased_as_in_memory(tmp_path):
    x = drawn(64)
    svi = make_svi(model)
    trainer = trainer_of(svi)
    stored = ChunkSource(trainer, to_memmap(x, tmp_path), 8, 0, None, 96)
    state = trainer.init(KEY, stored.first(), None)
    params = trainer.params(state)
    batches = [batch.at(rows) for batch, order in stored._windows(KEY, 0) for rows in order]
    keys = jax.random.split(KEY, 2000)
    evaluate = jax.vmap(trainer.evaluate, in_axes=(0, None, None))
    each = np.stack([evaluate(keys, params, batch) for batch in batches]).mean(0)
    whole = ArraySource(trainer, stored.data.read(x), 64, None)
    every = evaluate(keys, params, whole.first())
    error = np.hypot(each.std(), every.std()) / np.sqrt(len(keys))
    assert abs(each.mean() - every.mean()) < 5 * error


@pytest.mark.slow
def test_a_fit_goes_on_from_its_checkpoint_bit_for_bit(to_store, tmp_path):
    data = to_store(drawn())
    straight = quick(data, num_epochs=4)
    for num_epochs in (2, 4):
        folder = Checkpoints(tmp_path / "run", every_minutes=0.0)
        result = quick(data, num_epochs=num_epochs, checkpoint=folder)
    np.testing.assert_array_equal(result.losses, straight.losses)
    jax.tree.map(np.testing.assert_array_equal, result.params, straight.params)


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    def poisoned(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            scale = jnp.where(x[:, 0] > 30.0, jnp.nan, 1.0)
            numpyro.sample("x", dist.Normal(z, scale, validate_args=False), obs=x[:, 0])

    x = np.clip(drawn(), -2, 2)
    x[77] = 31.0
    source = source_of(to_memmap(x, tmp_path), 30, model=poisoned)
    state = source.trainer.init(KEY, source.first(), None)
    with pytest.warns(
        UserWarning, match=r"1 of 10 steps, first at step \d of epoch 0, at site 'x'"
    ):
        state, losses = source.run(state, KEY, 0)
    assert np.isnan(losses).sum() == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(source.trainer.params(state)))
    assert not readers()


# -- errors ----------------------------------------------------------------------------------------


class Store:
    """An array on disk that can fail, or change its length."""

    chunks = None

    def __init__(self, array):
        self.array, self.fails_after = array, np.inf

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    ndim = property(lambda self: self.array.ndim)

    def __array__(self, dtype=None, copy=None):
        raise AssertionError("the whole store was read")

    def __getitem__(self, key):
        self.fails_after -= 1
        if self.fails_after < 0:
            raise OSError("the disk is gone")
        return self.array[key]


def test_arrays_of_other_lengths_are_an_error(to_store):
    with pytest.raises(ValueError, match=r"disagrees on the number of data: .*103.*102"):
        quick((to_store(numbered()), numbered(102)))


def test_a_store_that_changes_its_length_is_an_error(tmp_path):
    stored = to_hdf5(drawn(), tmp_path)

    def grow(epoch, state, metrics):
        stored.resize(301, axis=0)

    with pytest.raises(ValueError, match="data has 301 rows, and had 300 when it was first read"):
        quick(stored, callbacks=[grow])


def test_a_store_that_shrinks_during_an_epoch_is_an_error():
    store = Store(drawn())
    source = source_of(store)
    windows = source._windows(KEY, 0)
    next(windows)
    store.array = store.array[:10]
    with pytest.raises(ValueError, match=r"data\[\d+:\d+\] has 0 rows, and had \d+ when"):
        list(windows)
    assert not readers()


def test_what_fails_in_the_thread_is_raised_and_the_thread_ends():
    store = Store(drawn())
    source = source_of(store)
    state = source.trainer.init(KEY, source.first(), None)
    store.fails_after = 12
    with pytest.raises(OSError, match="the disk is gone"):
        source.run(state, KEY, 0)
    assert not readers()


def test_no_thread_is_left_where_training_ends_or_fails(to_store):
    data = to_store(drawn())
    quick(data)
    assert not readers()

    def interrupt(*args, **kwargs):
        raise RuntimeError("stop")

    source = source_of(data)
    state = source.trainer.init(KEY, source.first(), None)
    source.trainer.scan = interrupt
    with pytest.raises(RuntimeError, match="stop"):
        source.run(state, KEY, 0)
    del source.trainer.scan
    assert not readers()


def test_a_value_that_is_not_finite_is_named_by_its_place(to_store):
    source = source_of(to_store(drawn()))
    source.store.data[250] = np.nan
    state = source.trainer.init(KEY, source.first(), None)
    message = r"data\[(\d+):\d+\] has 2 values .* the first in row (\d+), .* at \['x'\]"
    with pytest.raises(ValueError, match=message) as raised:
        source.run(state, KEY, 0)
    assert sum(map(int, re.match(message, str(raised.value)).groups())) == 250
    assert not readers()


def test_wrong_options_are_named(to_store):
    data = to_store(numbered())
    with pytest.raises(ValueError, match="batch_size is 104, expected a number from 1 to the 103"):
        quick(data, batch_size=104)
    with pytest.raises(ValueError, match="num_data= is for iterables"):
        quick(data, num_data=103)
    with pytest.raises(ValueError, match=r"Simulations\(like=\) takes data in memory, not on disk"):
        quick(Simulations(100, like=data))
