"""Callbacks watch a fit, and may stop it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from models import normal_model
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.svi import SVIState

from numpyro_vae import MLP, AutoAmortizedNormal, Posterior, fit
from numpyro_vae.training.callbacks import EarlyStopping, StopReason

X = jnp.linspace(-2.0, 2.0, 40)


def run(**options):
    guide = AutoAmortizedNormal(normal_model, partial(MLP, hidden_sizes=(4,)))
    svi = SVI(normal_model, guide, optax.adam(1e-2), Trace_ELBO())
    options = {"num_epochs": 4, "batch_size": 20, "progress_bar": False} | options
    return fit(svi, jax.random.key(0), X, **options)


def test_a_callback_sees_every_epoch():
    seen = []

    def watch(epoch, state, metrics):
        seen.append((epoch, state, dict(metrics)))

    result = run(callbacks=[watch], validation=X)
    assert [epoch for epoch, *_ in seen] == [0, 1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, seen[-1][1].optim_state, result.state.optim_state)
    for name in ("loss", "validation_loss"):
        np.testing.assert_array_equal([found[name] for *_, found in seen], result.history[name])
    assert result.stop_reason is StopReason.EPOCHS_DONE


def test_a_callback_stops_training():
    others = []
    result = run(callbacks=[lambda epoch, *_: epoch == 1, lambda epoch, *_: others.append(epoch)])
    assert len(result.history["loss"]) == 2
    assert others == [0, 1]  # all are called, whoever stops
    assert result.stop_reason is StopReason.CALLBACK
    jax.tree.map(np.testing.assert_array_equal, result.params, run(num_epochs=2).params)


def test_one_callback_may_be_given_alone():
    assert len(run(callbacks=lambda epoch, *_: epoch == 1).history["loss"]) == 2


def test_an_error_in_a_callback_is_the_users():
    def broken(epoch, state, metrics):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        run(callbacks=[broken])


def test_the_progress_bar_says_what_was_reached(capsys):
    run(progress_bar=True, num_epochs=2)
    assert "2/2" in (text := capsys.readouterr().err)
    assert "loss " in text


def test_early_stopping_keeps_the_best_state_and_passes_over_nan():
    stopping = EarlyStopping(2)
    scores = [np.nan, 3.0, 2.0, np.nan, 2.5]
    stops = [
        stopping(epoch, SVIState(epoch, None, None), {"validation_loss": score})
        for epoch, score in enumerate(scores)
    ]
    assert stops == [False, False, False, False, True]
    assert stopping.best_state == SVIState(2, None, None)


class Pair(nnx.Module):
    """Returns loc and a standard deviation, or with ``log=True`` its logarithm."""

    def __init__(self, example_inputs, *, log=False, rngs):
        self.linear, self.log = nnx.Linear(1, 2, rngs=rngs), log

    def __call__(self, inputs):
        loc, raw = jnp.split(self.linear(inputs[:, None]), 2, axis=-1)
        return loc, raw - 1 if self.log else nnx.softplus(raw)


def fit_pair(encoder, model=normal_model, num_epochs=1, **options):
    guide = AutoAmortizedNormal(model, encoder, **options)
    svi = SVI(model, guide, optax.adam(3e-2), Trace_ELBO())
    options = {"num_epochs": num_epochs, "batch_size": 20, "progress_bar": False}
    return Posterior(guide, fit(svi, jax.random.key(0), X, **options))


def subsampling_model(x):
    with numpyro.plate("data", len(x), subsample_size=20) as rows:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])


@pytest.mark.parametrize("model", [normal_model, subsampling_model])
def test_a_standard_deviation_read_as_a_log_scale_is_noticed_once(model):
    with pytest.warns(UserWarning, match=r'negative nowhere.*scale="scale"') as caught:
        fit_pair(Pair, model, num_epochs=3)
    assert len(caught) == 1


@pytest.mark.parametrize("scale", ["scale", "log_scale", "softplus"])
def test_what_is_declared_is_not_doubted(scale):
    fit_pair(Pair, scale=scale)  # where a warning is an error


def test_a_log_scale_is_not_doubted():
    fit_pair(partial(Pair, log=True))


def test_an_encoder_of_standard_deviations_learns_the_exact_one():
    scale = fit_pair(Pair, num_epochs=300, scale="scale").encode(X)["z"].scale
    np.testing.assert_allclose(scale.mean(), 0.2**0.5, rtol=0.05)


def test_where_to_start_is_said_once():
    state = run().state
    with pytest.raises(ValueError, match=r"init_params= names \['a'\].*init_state="):
        run(init_state=state, init_params={"a": 1.0})
