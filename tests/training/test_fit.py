"""Training: unbiased minibatches, reproducible, safe against what is not finite."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from helpers import make_svi
from models import hierarchical_model, normal_model
from numpyro import handlers
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

from numpyro_vae import MLP, AutoAmortizedNormal, Posterior, fit
from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.data.batch import padded_batches
from numpyro_vae.training.callbacks import StopReason
from numpyro_vae.training.sources import ArraySource, IterableSource
from numpyro_vae.training.step import trainer_of

X = jax.random.normal(jax.random.key(7), (100,)) + 1


def array_source(svi, batch_size):
    return ArraySource(trainer_of(svi), ArrayData.read(X), batch_size, None)


quick = partial(fit, num_epochs=3, batch_size=32, progress_bar=False)


def subsampling_model(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x), subsample_size=32) as rows:
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])


def declared_model(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", 100, subsample_size=len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x)


def test_minibatch_losses_average_to_the_full_loss():
    """Each datum once, in four batches: the mean of their losses is the loss of all data."""

    def noiseless(x):
        """A model whose mean-field ELBO has no Monte Carlo error."""
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(0.0, 0.5), obs=x)
        del mu

    svi = make_svi(noiseless)
    source = array_source(svi, 25)
    state = source.trainer.init(jax.random.key(0), source.first(), None)
    params = source.trainer.params(state)
    losses = [
        source.trainer.evaluate(jax.random.key(1), params, source.first().at(rows))
        for rows in jnp.arange(100).reshape(4, 25)
    ]
    full = svi.loss.loss(jax.random.key(1), params, noiseless, svi.guide, X) / 100
    np.testing.assert_allclose(np.mean(losses), full, rtol=1e-5)


@pytest.mark.parametrize("model", [subsampling_model, declared_model])
def test_three_ways_to_write_a_minibatch_are_one(model):
    expected = quick(make_svi(hierarchical_model), jax.random.key(0), X)
    found = quick(make_svi(model), jax.random.key(0), X)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4)


def test_padding_of_an_evaluation_counts_for_nothing():
    svi = make_svi(hierarchical_model)
    source = array_source(svi, 32)
    state = source.trainer.init(jax.random.key(0), source.first(), None)
    params = source.trainer.params(state)
    *_, (indices, weights) = (map(jnp.asarray, pair) for pair in padded_batches(100, 32))
    assert np.count_nonzero(weights) == 4
    key, batch = jax.random.key(1), source.first().at(indices)
    weighted = replace(batch, weights=weights)
    padded = source.trainer.evaluate(key, params, weighted)
    other = weighted.at(indices.at[4:].set(50))
    np.testing.assert_allclose(source.trainer.evaluate(key, params, other), padded, rtol=1e-6)
    assert padded != source.trainer.evaluate(key, params, batch)


def test_every_row_is_seen_every_epoch_and_a_ragged_end_wraps():
    source = array_source(make_svi(hierarchical_model), 32)
    key = jax.random.key(3)
    first, second = (np.asarray(source.order(key, epoch).rows()) for epoch in (0, 1))
    assert first.shape == (4, 32)
    assert set(first.ravel()[:100]) == set(range(100))
    np.testing.assert_array_equal(first.ravel()[100:], second.ravel()[:28])


def test_the_same_key_gives_the_same_result_bit_for_bit():
    first = quick(make_svi(hierarchical_model), jax.random.key(0), X)
    again = quick(make_svi(hierarchical_model), jax.random.key(0), X)
    other = quick(make_svi(hierarchical_model), jax.random.key(1), X)
    np.testing.assert_array_equal(first.losses, again.losses)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert not np.array_equal(first.losses, other.losses)


def test_result_is_what_svi_takes():
    svi = make_svi(hierarchical_model)
    result = quick(svi, jax.random.key(0), X, validation=X[:40])
    assert result.losses.shape == (12,)
    assert result.stop_reason is StopReason.EPOCHS_DONE
    assert result.history["loss"].shape == result.history["validation_loss"].shape == (3,)
    np.testing.assert_allclose(result.history["loss"][0], result.losses[:4].mean(), rtol=1e-6)
    assert np.isfinite(svi.evaluate(result.state, X))
    jax.tree.map(np.testing.assert_array_equal, svi.get_params(result.state), result.params)
    more = quick(svi, jax.random.key(1), X, init_state=result.state)
    assert more.losses[-1] < result.losses[0]


def test_validation_keys_are_fixed():
    """With nothing learned the validation loss never moves."""
    svi = make_svi(hierarchical_model, loss=Trace_ELBO(), optimizer=0.0)
    result = quick(svi, jax.random.key(0), X, validation=X[:40])
    assert np.ptp(result.history["validation_loss"]) == 0
    assert np.ptp(result.history["loss"]) > 0


def test_early_stopping_returns_the_best_state():
    svi = make_svi(hierarchical_model, optimizer=1.0)  # far too large: it gets worse before long
    result = quick(svi, jax.random.key(0), X, num_epochs=60, validation=X[:40], patience=3)
    scores = result.history["validation_loss"]
    assert len(scores) < 60
    assert result.stop_reason is StopReason.NO_IMPROVEMENT
    assert len(scores) - 1 - scores.argmin() == 3
    again = quick(svi, jax.random.key(0), X, num_epochs=int(scores.argmin()) + 1)
    jax.tree.map(np.testing.assert_array_equal, result.params, again.params)


@pytest.mark.slow
def test_arguments_by_keyword_and_on_other_axes():
    def model(x, scale, y=None):
        with numpyro.plate("data", x.shape[1]):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z[:, None].repeat(2, 1), scale).to_event(1), obs=x.T)
            if y is not None:
                numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    wide = jnp.stack([X, X + 1])
    data = {"x": wide, "scale": 0.5, "y": X}
    result = quick(make_svi(model), jax.random.key(0), data,
                   batch_axes={"x": 1, "scale": None, "y": 0})  # fmt: skip
    by_position = quick(make_svi(model), jax.random.key(0), (wide, 0.5, X),
                        batch_axes=(1, None, 0))  # fmt: skip
    np.testing.assert_array_equal(result.losses, by_position.losses)


@pytest.mark.slow
def test_an_iterable_of_batches_with_a_short_last_one():
    batches = [X[:40], X[40:80], X[80:]]
    svi = make_svi(hierarchical_model)
    result = fit(
        svi, jax.random.key(0), batches, num_data=100, num_epochs=60, validation=X,
        progress_bar=False,
    )  # fmt: skip
    assert result.losses.shape == (180,)
    whole = quick(
        make_svi(hierarchical_model), jax.random.key(0), X, batch_size=40, num_epochs=60,
        validation=X,
    )  # fmt: skip
    gap = result.history["validation_loss"][-1] - whole.history["validation_loss"][-1]
    assert abs(gap) < 0.1


def test_the_rows_of_a_short_batch_weigh_as_much_as_those_of_others():
    source = IterableSource(
        trainer_of(make_svi(hierarchical_model)), [X[:40], X[80:]], 100, 0, None
    )
    batch = list(source._epoch())[1]
    np.testing.assert_allclose(batch.weights, np.r_[np.full(20, 2.0), np.zeros(20)])


def poisoned(x):
    """The likelihood is NaN where x is above 3."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        scale = jnp.where(x > 3.0, jnp.nan, 1.0)
        numpyro.sample("x", dist.Normal(z, scale, validate_args=False), obs=x)


@pytest.mark.slow
@pytest.mark.parametrize("iterable", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(iterable):
    x = jnp.where(jnp.arange(100) == 77, 9.0, jnp.clip(X, -2, 2))
    data = [x[:25], x[25:50], x[50:75], x[75:]] if iterable else x
    options = {"num_data": 100} if iterable else {"batch_size": 25}
    with pytest.warns(UserWarning, match=r"1 of 4 steps, first at step \d of epoch 0, at site 'x'"):
        result = fit(make_svi(poisoned), jax.random.key(0), data, num_epochs=1,
                     progress_bar=False, **options)  # fmt: skip
    assert np.isnan(result.losses).sum() == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


def test_batch_statistics_survive_a_bad_batch():
    class Normalized(nnx.Module):
        def __init__(self, example_inputs, *, rngs):
            self.linear = nnx.Linear(1, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, inputs):
            return self.norm(self.linear(inputs[:, None]))

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0, validate_args=False), obs=x)

    bad = X.at[60].set(1e30)  # its square overflows in the batch statistics
    svi = SVI(model, AutoAmortizedNormal(model, Normalized), optax.adam(1e-2), Trace_ELBO())
    with pytest.warns(UserWarning, match="Steps were skipped"):
        result = fit(svi, jax.random.key(0), bad, batch_size=25, num_epochs=2, progress_bar=False)
    assert "auto$state" in result.params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.params))


def test_nothing_finite_is_an_error_that_names_the_site():
    svi = make_svi(poisoned)
    with pytest.raises(FloatingPointError, match="site 'x' of the model"):
        quick(svi, jax.random.key(0), jnp.full(100, 9.0))


def test_keyboard_interrupt_returns_what_was_learned(monkeypatch):
    run, calls = ArraySource.run, []

    def interrupted(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(ArraySource, "run", interrupted)
    result = quick(make_svi(hierarchical_model), jax.random.key(0), X, num_epochs=10)
    monkeypatch.undo()
    assert result.stop_reason is StopReason.INTERRUPTED
    expected = quick(make_svi(hierarchical_model), jax.random.key(0), X, num_epochs=2)
    jax.tree.map(np.testing.assert_array_equal, result.params, expected.params)


def test_importance_weighted_objective_is_scaled_per_datum():
    """The bound of a minibatch estimates that of all data, not that of powered weights."""
    loss = RenyiELBO(num_particles=16)
    svi = make_svi(normal_model, loss=loss)
    source = array_source(svi, 25)
    state = source.trainer.init(jax.random.key(0), source.first(), None)
    params = source.trainer.params(state)
    keys = jax.random.split(jax.random.key(1), 64)
    batches = jnp.arange(100).reshape(4, 25)
    found = np.mean([
        source.trainer.evaluate(key, params, source.first().at(rows))
        for key in keys[:16] for rows in batches
    ])  # fmt: skip
    full = jax.jit(lambda key: loss.loss(key, params, normal_model, svi.guide, X) / 100)
    samples = np.array([full(key) for key in keys])
    assert abs(found - samples.mean()) < 5 * samples.std() / np.sqrt(16)


def test_a_hand_written_guide_can_be_fitted():
    def guide(x):
        loc, scale = (
            numpyro.param("a", 0.1),
            numpyro.param("s", 0.5, constraint=dist.constraints.positive),
        )
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc * x, scale))

    svi = SVI(normal_model, guide, optax.adam(1e-2), Trace_ELBO())
    result = quick(svi, jax.random.key(0), X, num_epochs=150)
    assert result.params["a"] == pytest.approx(0.8, abs=0.06)


BAD = {
    "empty": (jnp.zeros(0), {}, "data is empty"),
    "batch too large": (X, {"batch_size": 101}, "batch_size is 101.*1 to the 100 rows"),
    "batch too small": (X, {"batch_size": -1}, "batch_size is -1"),
    "lengths disagree": ((X, X[:50]), {}, r"disagrees.*'data\[0\]': 100.*'data\[1\]': 50"),
    "no datum axis": ((X, 3.0), {}, r"data\[1\] is 3.0 of type float.*batch_axes"),
    "nan": (X.at[13].set(jnp.nan), {}, "1 values that are NaN or infinite, the first in row 13"),
    "inf": ({"x": X.at[2].set(jnp.inf)}, {}, r"data\['x'\].*row 2"),
    "beyond float32": (np.full(100, 1e300), {}, "float64.*beyond the range of float32"),
    "no epochs": (X, {"num_epochs": 0}, "num_epochs is 0"),
    "patience alone": (X, {"patience": 3}, "early stopping needs validation"),
    "validation of another form": (
        X,
        {"validation": (X, X)},
        r"validation has arrays at the arguments \['0', '1'\], the data at \['0'\]",
    ),
    "iterable of unknown length": ([X], {"batch_size": None}, "num_data="),
    "exhausted": (iter([]), {"batch_size": None, "num_data": 100}, "yields no batch"),
    "unknown plate": (X, {"plate": "rows"}, "No latent site lies in a plate named 'rows'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    data, options, message = BAD[case]
    options = {"num_epochs": 1, "batch_size": 32} | options
    with pytest.raises(ValueError, match=message):
        fit(make_svi(hierarchical_model), jax.random.key(0), data, progress_bar=False, **options)


def test_what_is_no_data_is_refused():
    with pytest.raises(TypeError, match="an iterable of batches; found int"):
        quick(make_svi(hierarchical_model), jax.random.key(0), 3)


@pytest.mark.slow
def test_nan_is_welcome_where_the_model_leaves_it_out():
    """What is missing gives the result of any number in its place; what is observed may not be."""

    def model(x):
        present = ~jnp.isnan(x)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            with handlers.mask(mask=present):
                numpyro.sample("x", dist.Normal(z, 0.5), obs=jnp.where(present, x, 0.0))

    x = X.at[::3].set(jnp.nan)
    guide = AutoAmortizedNormal(model, partial(MLP, hidden_sizes=(8,)))
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    result = fit(svi, jax.random.key(0), x, num_epochs=2, progress_bar=False, validation=x)
    assert np.isfinite(result.losses).all()
    assert np.isfinite(result.history["validation_loss"]).all()
    assert np.isfinite(Posterior(guide, result).log_weights(jax.random.key(1), x, 5)).all()
    batches = fit(svi, jax.random.key(0), [x], num_data=100, num_epochs=2, progress_bar=False)
    assert np.isfinite(batches.losses).all()


@pytest.mark.slow
def test_data_that_the_model_takes_whole():
    """Without a datum axis an epoch is a step on all data, as svi.run takes it."""
    svi = SVI(normal_model, AutoAmortizedNormal(normal_model), optax.adam(1e-2), Trace_ELBO())
    options = {"batch_axes": None, "progress_bar": False}
    result = fit(svi, jax.random.key(0), X, num_epochs=30, validation=X, **options)
    assert result.losses.shape == (30,)
    assert result.history["validation_loss"][-1] < result.history["validation_loss"][0]
    by_axis = fit(svi, jax.random.key(0), X, num_epochs=30, batch_size=100, progress_bar=False)
    assert abs(result.losses[-5:].mean() - by_axis.losses[-5:].mean()) < 0.1
    with pytest.raises(ValueError, match=r"batch_size is 10, but with batch_axes=None"):
        fit(svi, jax.random.key(0), X, num_epochs=1, batch_size=10, **options)
