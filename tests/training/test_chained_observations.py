"""Simulations of models that compute an observation from another one, among their arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi

from numpyro_vae import ForwardKL, Simulations, fit
from numpyro_vae.model.simulate import NotSimulableError
from numpyro_vae.objectives import ReweightedWakeSleep
from numpyro_vae.training.simulations import SimulationSource
from numpyro_vae.training.sources import ArraySource
from numpyro_vae.training.step import batch_of, trainer_of

KEY = jax.random.key(0)
X = tuple(np.random.default_rng(0).normal(10, 3, (3, 4096)).astype(np.float32))


def chain(x, y, w):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
        numpyro.sample("y", dist.Normal(z + 2 * x, 1.0), obs=y)
        numpyro.sample("w", dist.Normal(y - x, 1.0), obs=w)


def simulate(model, data, to_data=None):
    """A batch simulated as a fit does it."""
    svi = make_svi(model, loss=ForwardKL())
    simulations = Simulations(len(data[0]), like=data, to_data=to_data)
    state = fit(svi, KEY, simulations, num_epochs=1, progress_bar=False).state
    trainer = trainer_of(svi)
    like = ArraySource(trainer, trainer.read(data, 0), len(data[0]), None)
    source = SimulationSource(trainer, like, simulations)
    rows = jnp.arange(len(data[0]))[None]
    table, settled = trainer.draw(source.plan, state, KEY[None], like.first(), rows)
    assert settled.all()
    return batch_of(table, 0)


def in_order(made):
    return made["x"], made["y"], made["w"]


@pytest.mark.parametrize("to_data", [None, in_order])
def test_observations_are_computed_from_those_simulated(to_data):
    """Those of the data, which are around 10, would show in their means."""
    batch = simulate(chain, X, to_data)
    (x, y, w), z = batch.arrays, np.asarray(batch.latents.drawn["z"])
    for residual in (x - z, y - z - 2 * x, w - (y - x)):
        assert abs(residual.mean()) < 5 / len(x) ** 0.5
        np.testing.assert_allclose(residual.std(), 1.0, rtol=5 / (2 * len(x)) ** 0.5)
        assert abs(np.corrcoef(residual, z)[0, 1]) < 5 / len(x) ** 0.5


def guide(x, y, w):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize("phase", ["forward KL", "sleep"])
def test_plain_svi_simulates_them_too(phase):
    found = {}

    def read(x, y, w):
        found.update(x=x, y=y, w=w)
        guide(x, y, w)

    def sleep(values, x, y, w):
        found.update(values)
        return (values["x"], values["y"], values["w"]), {}

    if phase == "sleep":
        ReweightedWakeSleep(2, sleep=sleep).loss(KEY, {}, chain, guide, *X)
    else:
        ForwardKL().loss(KEY, {}, chain, read, *X)
    x, y, w = (found[name] for name in "xyw")
    for residual, variance in ((x, 2), (y - 2 * x, 2), (w - (y - x), 1)):
        assert abs(residual.mean()) < 5 * (variance / len(x)) ** 0.5
        np.testing.assert_allclose(residual.var(), variance, rtol=0.15)


def test_censored_observations_need_what_censors_the_simulated_ones():
    def model(x, censored):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.RightCensoredDistribution(dist.Normal(z, 1.0), censored)
            numpyro.sample("x", fn, obs=x)

    data = X[0], np.zeros(len(X[0]), np.int32)
    with pytest.raises(NotSimulableError, match=r"'x' has a censored distribution.*to_data"):
        simulate(model, data)


SERIES = np.random.default_rng(1).normal(10, 3, (4096, 5)).astype(np.float32)


def shifted(y):
    """A series of which each value is around a share of the one before, read off the data."""
    before = jnp.concatenate([jnp.zeros((len(y), 1)), y[:, :-1]], axis=1)
    with numpyro.plate("data", len(y)):
        phi = numpyro.sample("phi", dist.Uniform(-0.99, 0.99))
        mean = phi[:, None] * before
        numpyro.sample("y", dist.Normal(mean, 0.5).to_event(1), obs=y)


def through_a_latent(x, y):
    """The prior of a latent reads an observation among the arguments."""
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        z = numpyro.sample("z", dist.Normal(2 * x, 0.5))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


def is_noise(residuals, scale):
    """Whether there are as many as there are rows, around 0, of a scale."""
    assert abs(residuals.mean()) < 5 * scale / len(residuals) ** 0.5
    np.testing.assert_allclose(residuals.std(0), scale, rtol=5 / (2 * len(residuals)) ** 0.5)


def test_a_series_is_simulated_step_by_step():
    """The values of the data, around 10, would show in the residuals."""
    batch = simulate(shifted, (SERIES,))
    (y,), phi = batch.arrays, np.asarray(batch.latents.drawn["phi"])[:, None]
    is_noise(y[:, :1], 0.5)
    is_noise(y[:, 1:] - phi * y[:, :-1], 0.5)


def test_latents_are_drawn_given_the_simulated_observations():
    batch = simulate(through_a_latent, X[:2])
    (x, y), z = batch.arrays, np.asarray(batch.latents.drawn["z"])
    is_noise(z - 2 * x, 0.5)
    is_noise(y - z, 1.0)


@pytest.mark.parametrize("phase", ["forward KL", "sleep"])
def test_plain_svi_simulates_a_series_step_by_step(phase):
    found = {}

    def guide(y):
        found.update(y=y)
        with numpyro.plate("data", len(y)):
            found["phi"] = numpyro.sample("phi", dist.Uniform(-0.99, 0.99))

    def sleep(values, y):
        return (values["y"],), {}

    loss = ForwardKL() if phase == "forward KL" else ReweightedWakeSleep(2, sleep=sleep)
    loss.loss(KEY, {}, shifted, guide, SERIES)
    y, phi = found["y"], found["phi"][:, None]
    is_noise(y[:, 1:] - phi * y[:, :-1], 0.5)


def drifting(x):
    """No data are those that it makes of themselves."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(x.mean() + 1.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_data_that_never_settle_are_refused():
    with pytest.raises(NotSimulableError, match=r"change each time.*argument of its own"):
        simulate(drifting, X[:1])


def test_a_loss_on_data_that_never_settle_is_nan():
    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(0.0, 1.0))

    assert np.isnan(ForwardKL().loss(KEY, {}, drifting, guide, X[0]))
