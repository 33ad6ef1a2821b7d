"""Simulations of models that compute an observation from another one, among their arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi

from numpyro_vae import ForwardKL, Simulations, fit
from numpyro_vae.model.reading import ModelReader
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


def counted(x, y, w):
    """Counts among so many as the data have, which are no other observation."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, jnp.abs(y)), obs=x)


def simulate(model, data, to_data=None):
    """A simulated batch, and how often the model is run for it."""
    svi = make_svi(model, loss=ForwardKL())
    simulations = Simulations(len(data[0]), like=data, to_data=to_data)
    state = fit(svi, KEY, simulations, num_epochs=1, progress_bar=False).state
    trainer = trainer_of(svi)
    like = ArraySource(trainer, trainer.read(data, 0), len(data[0]), None)
    source = SimulationSource(trainer, like, simulations)
    plan = source.plan
    table = trainer.draw(plan, state, KEY[None], like.first(), jnp.arange(len(data[0]))[None])
    return batch_of(table, 0), plan.num_passes


def in_order(made):
    return made["x"], made["y"], made["w"]


@pytest.mark.parametrize("to_data", [None, in_order])
def test_observations_are_computed_from_those_simulated(to_data):
    """Those of the data, which are around 10, would show in their means."""
    batch, num_passes = simulate(chain, X, to_data)
    assert num_passes == 3
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


def test_a_model_is_run_once_where_observations_are_computed_from_none_other():
    _, num_passes = simulate(counted, X)
    assert num_passes == 1


def test_censored_observations_need_what_censors_the_simulated_ones():
    def model(x, censored):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            fn = dist.RightCensoredDistribution(dist.Normal(z, 1.0), censored)
            numpyro.sample("x", fn, obs=x)

    data = X[0], np.zeros(len(X[0]), np.int32)
    with pytest.raises(NotSimulableError, match=r"'x' has a censored distribution.*to_data"):
        simulate(model, data)


def test_what_is_read_of_arguments_is_not_known_of_a_model_that_asks_for_values():
    def model(x, group):
        with numpyro.plate("groups", len(np.unique(group))):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[group], 1.0), obs=x)

    group = np.arange(8) % 3
    assert ModelReader(model).sites((X[0][:8], group), {}).reads.arguments is None
    known = ModelReader(chain).sites(tuple(x[:8] for x in X), {}).reads.arguments
    assert known == {"x": frozenset(), "y": {0}, "w": {0, 1}}
