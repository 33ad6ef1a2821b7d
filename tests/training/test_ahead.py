"""Steps of a scan that draw ahead: as many steps one by one, and none of their noise inside."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from helpers import make_svi
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import Simulations, fit
from numpyro_vae.model.provenance import inner_jaxprs
from numpyro_vae.objectives import ForwardKL, ImportanceWeightedELBO, ReweightedWakeSleep
from numpyro_vae.training import ahead
from numpyro_vae.training.sources import ArraySource
from numpyro_vae.training.step import Trainer, trainer_of
from numpyro_vae.training.step import _primitives as primitives

RANDOM = {"random_bits", "random_gamma", "threefry2x32"}
X = np.asarray(jax.random.normal(jax.random.key(1), (48, 3)), np.float32)


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample(
            "x", dist.Normal(z.sum(-1, keepdims=True) * np.ones(3), 1).to_event(1), obs=x
        )


def with_network(x):
    decode = nnx_module("decoder", nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(decode(z), 1).to_event(1), obs=x)


def of_rates(x):
    with numpyro.plate("data", len(x)):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("x", dist.Normal(rate[:, None] * np.ones(3), 1).to_event(1), obs=x)


def by_hand(family, model=model, name="z"):
    """A guide that is a function, of a linear map."""

    def guide(x):
        loc = x @ numpyro.param("weights", np.full((3, 2), 0.1, np.float32))
        with numpyro.plate("data", len(x)):
            numpyro.sample(name, family(loc))

    return SVI(model, guide, optax.adam(1e-2), Trace_ELBO())


CASES = {
    "a draw": lambda: make_svi(model),
    "a network": lambda: make_svi(with_network),
    "Trace_ELBO": lambda: make_svi(model, loss=Trace_ELBO(num_particles=3)),
    "importance weights": lambda: make_svi(model, loss=ImportanceWeightedELBO(4)),
    "wake and sleep": lambda: make_svi(model, loss=ReweightedWakeSleep(4)),
    "rates": lambda: by_hand(lambda loc: dist.Gamma(jnp.exp(loc[:, 0])), of_rates, "rate"),
    "a guide by hand": lambda: by_hand(lambda loc: dist.Normal(loc, 0.5).to_event(1)),
}


def losses_of(svi, data=X, **options):
    result = fit(svi, jax.random.key(0), data, num_epochs=3, batch_size=16, **options)
    return result.losses, result.params


@pytest.mark.parametrize("name", CASES)
def test_steps_that_draw_ahead_are_those_taken_one_by_one(name, monkeypatch):
    losses, params = losses_of(CASES[name]())
    monkeypatch.setattr(Trainer, "is_slow_in_scan", lambda *_: True)
    expected, of_loop = losses_of(CASES[name]())
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for found, one_by_one in zip(*map(jax.tree.leaves, (params, of_loop)), strict=True):
        np.testing.assert_allclose(found, one_by_one, rtol=1e-3, atol=1e-4)


def test_steps_on_simulations_draw_ahead_too(monkeypatch):
    options = {"data": Simulations(48, like=X), "freeze": "model"}
    losses, _ = losses_of(make_svi(model, loss=ForwardKL()), **options)
    monkeypatch.setattr(Trainer, "is_slow_in_scan", lambda *_: True)
    expected, _ = losses_of(make_svi(model, loss=ForwardKL()), **options)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)


def scans_of(svi, num_steps=3):
    """The primitives inside of each scan of an epoch."""
    trainer = trainer_of(svi)
    source = ArraySource(trainer, trainer.read(X, 0), 48 // num_steps, None)
    batch = source.first()
    state, order = trainer.init(jax.random.key(0), batch, None), source.order(jax.random.key(0), 0)
    jaxpr = jax.make_jaxpr(trainer._scan)(trainer.transforms, state, batch, order).jaxpr
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    return [names for eqn in scans for names in map(primitives, inner_jaxprs(eqn))]


@pytest.mark.parametrize("name", [name for name in CASES if name != "rates"])
def test_nothing_random_is_left_among_the_steps(name):
    drawing, stepping = scans_of(CASES[name]())
    assert drawing & RANDOM
    assert not stepping & RANDOM


def test_what_reads_parameters_is_drawn_in_the_step():
    """Draws of a Gamma depend on its concentration: only their keys are ready before."""
    *_, stepping = scans_of(CASES["rates"]())
    assert "random_gamma" in stepping


def test_one_step_draws_for_itself():
    assert len(scans_of(make_svi(model), num_steps=1)) == 1


def test_draws_that_would_fill_memory_are_made_in_the_steps(monkeypatch):
    monkeypatch.setattr(ahead, "MOST_BYTES", 3 * 16 * 2 * 4 - 1)
    assert len(scans_of(make_svi(model))) == 1
    monkeypatch.setattr(ahead, "MOST_BYTES", 3 * 16 * 2 * 4)
    assert len(scans_of(make_svi(model))) == 2


def test_a_guide_that_draws_nothing_takes_its_steps_alone():
    svi = by_hand(lambda loc: dist.Delta(loc, event_dim=1))
    losses, _ = losses_of(svi)
    assert len(scans_of(svi)) == 1
    assert np.isfinite(losses).all()
