"""Training on data drawn from the model, and with parameters that stay as they are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from helpers import SMALL, make_svi
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import (
    MLP,
    AutoAmortizedDelta,
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    ForwardKL,
    Posterior,
    Simulations,
    fit,
)
from numpyro_vae.training.simulations import SimulationSource
from numpyro_vae.training.sources import ArraySource
from numpyro_vae.training.step import batch_of, trainer_of

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
NOISE = 0.7
X = (RNG.normal(size=(64, 1)) + RNG.normal(0, NOISE, (64, 2))).astype(np.float32)
FROZEN = ("model", "globals")


def conjugate(x, offset=0.0):
    """Two observations of each latent, whose posterior is known."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        loc = (z + offset)[..., None]
        numpyro.sample("x", dist.Normal(loc, NOISE).expand([len(x), 2]).to_event(1), obs=x)


def exact(x, offset=0.0):
    precision = 1 + 2 / NOISE**2
    return (x - np.asarray(offset)[..., None]).sum(-1) / NOISE**2 / precision, precision**-0.5


def assert_exact(encoded):
    """A small network is off by a tenth of a standard deviation, and more at the edges."""
    mean, sd = exact(X)
    error = np.abs(encoded.loc - mean) / sd
    assert error.mean() < 0.12
    assert error.max() < 0.6
    np.testing.assert_allclose(encoded.scale, sd, rtol=0.2)


def schedule(steps, rate=1e-2):
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Trace_ELBO(), ForwardKL()], ids=["ELBO", "ForwardKL"])
@pytest.mark.parametrize("every", [1, None], ids=["fresh", "fixed"])
def test_simulations_lead_to_the_exact_posterior(loss, every):
    svi = make_svi(conjugate, loss=loss, optimizer=schedule(1200))
    source = Simulations(64 * 60, like=X, redraw_every=every)
    result = fit(svi, KEY, source, num_epochs=20, progress_bar=False)
    encoded = Posterior(svi.guide, result).encode(X)["z"]
    assert_exact(encoded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide", [AutoAmortizedNormal, AutoAmortizedMultivariateNormal, AutoAmortizedFlow]
)
def test_the_loss_is_the_guides_density_of_the_simulated_latents(guide):
    """Of every family, whose draw is one auxiliary site, on constrained supports too."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            s = numpyro.sample("s", dist.Gamma(2.0, 1.0))
            numpyro.sample("x", dist.Normal(z, s), obs=x)

    svi = SVI(model, guide(model, SMALL), optax.sgd(0.0), ForwardKL())
    source = Simulations(8, like=X[:8, 0])
    result = fit(svi, KEY, source, num_epochs=1, progress_bar=False)
    trainer = trainer_of(svi)
    data = trainer.read(X[:8, 0], 0)
    plan = SimulationSource(trainer, ArraySource(trainer, data, 8, None), source).plan
    batch, keys = ArraySource(trainer, data, 8, None).first(), KEY[None]
    table, _ = trainer.draw(plan, result.state, keys, batch, batch.indices[None])
    made = batch_of(table, 0)
    _, loss = trainer.step(result.state, made)
    encoding = svi.guide.encode(result.params, made.arrays[0])
    packed = encoding.pack(made.latents.drawn)
    _, log_det = encoding.constrain(packed)
    expected = -(encoding.log_prob(packed) - log_det).mean()
    np.testing.assert_allclose(loss, expected, rtol=2e-4)


@pytest.mark.slow
def test_plain_svi_simulates_by_itself():
    svi = make_svi(conjugate, loss=ForwardKL(), optimizer=schedule(1200))
    result = svi.run(KEY, 1200, X, progress_bar=False)
    encoded = Posterior(svi.guide, result).encode(X)["z"]
    assert_exact(encoded)


@pytest.mark.slow
def test_forward_kl_covers_both_modes_of_a_product():
    """Of `a * b = 1` the ELBO takes one of two modes; simulations have both."""

    def model(x):
        with numpyro.plate("data", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(a * b, 0.1), obs=x)

    x = np.full(64, 1.0, np.float32)
    means = {}
    for loss in (Trace_ELBO(), ForwardKL()):
        svi = make_svi(model, loss=loss, optimizer=schedule(600, 2e-2))
        result = svi.run(jax.random.key(1), 600, x, progress_bar=False)
        encoded = Posterior(svi.guide, result).encode(x)["a"]
        means[type(loss)] = float(encoded.loc[0]), float(encoded.scale[0])
    one, both = means[Trace_ELBO], means[ForwardKL]
    assert abs(one[0]) > 3 * one[1]
    assert abs(both[0]) < 0.3
    assert both[1] > 0.7


@pytest.mark.slow
def test_global_sites_are_drawn_from_the_guide_and_covariates_come_from_the_data():
    def model(offset, x):
        b = numpyro.sample("b", dist.Normal(0.0, 10.0))
        conjugate(x, offset + b)

    offset = np.linspace(-3, 3, 64).astype(np.float32)
    data = (offset, X + offset[:, None] + 5.0)
    svi = make_svi(
        model,
        loss=Trace_ELBO(num_particles=4),
        optimizer=schedule(800, 3e-2),
        inputs=lambda offset, x: jnp.concatenate([offset[:, None], x], -1),
    )
    first = fit(svi, KEY, data, num_epochs=800, progress_bar=False)
    other = SVI(model, svi.guide, schedule(1500), ForwardKL())
    second = fit(
        other,
        KEY,
        Simulations(64 * 50, like=data),
        num_epochs=30,
        init_params=first.params,
        freeze=FROZEN,
        progress_bar=False,
    )
    for name in ("b_auto_loc", "b_auto_scale"):
        np.testing.assert_array_equal(second.params[name], first.params[name])
    b, width = float(first.params["b_auto_loc"]), float(first.params["b_auto_scale"])
    encoded = Posterior(other.guide, second).encode(data)["z"]
    mean, sd = exact(data[1], offset + b)
    # The guide does not see the global site, so that its draws spread the latent's posterior.
    spread = np.sqrt(sd**2 + (width * 2 / NOISE**2 * sd**2) ** 2)
    np.testing.assert_allclose(encoded.loc, mean, atol=0.35 * sd)
    np.testing.assert_allclose(encoded.scale, spread, rtol=0.15)


class TestFreezing:
    def model(self, x):
        w = numpyro.param("w", 0.5)
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal((w * z + b)[:, None], 0.5).to_event(1), obs=x)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "optimizer",
        [optax.adamw(1e-2, weight_decay=0.1), numpyro.optim.Adam(1e-2)],
        ids=["optax", "numpyro"],
    )
    def test_what_is_frozen_stays_and_the_rest_moves(self, optimizer):
        svi = make_svi(self.model, loss=Trace_ELBO(), optimizer=optimizer)
        options = {"num_epochs": 2, "batch_size": 32, "progress_bar": False}
        first = fit(svi, KEY, X, **options)
        parts = {
            "model": {"w"},
            "guide": {"auto$params", "b_auto_loc", "b_auto_scale"},
            FROZEN: {"w", "b_auto_loc", "b_auto_scale"},
            ("auto", "w"): {"auto$params", "w"},
        }
        for freeze, names in parts.items():
            found = fit(svi, KEY, X, init_state=first.state, freeze=freeze, **options)
            for name, value in first.params.items():
                same = jax.tree.map(np.array_equal, value, found.params[name])
                assert all(jax.tree.leaves(same)) == (name in names), (freeze, name)
        free = fit(svi, KEY, X, init_state=first.state, **options)
        assert free.params["w"] != first.params["w"]

    @pytest.mark.slow
    def test_what_is_not_frozen_moves_as_it_would_alone(self):
        """Frozen parameters are constants: the others take the steps they take without them."""
        svi = make_svi(self.model, loss=Trace_ELBO())
        options = {"num_epochs": 3, "batch_size": 32, "progress_bar": False}
        found = fit(svi, KEY, X, init_params={"w": jnp.array(0.3)}, freeze="model", **options)
        assert found.params["w"] == np.float32(0.3)
        constant = numpyro.handlers.substitute(self.model, data={"w": jnp.array(0.3)})
        hidden = numpyro.handlers.block(constant, hide=["w"])
        alone = fit(make_svi(hidden, loss=Trace_ELBO()), KEY, X, **options)
        np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-5)

    @pytest.mark.slow
    def test_the_state_of_a_frozen_network_stays(self):
        """The params of a result have the networks' state, from which another fit goes on."""
        decoder = nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))

        def model(x):
            decode = nnx_module("decoder", decoder)
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
                numpyro.sample("x", dist.Normal(decode(z[:, None]), 1.0).to_event(1), obs=x[:, :1])

        svi = make_svi(model, loss=Trace_ELBO())
        options = {"num_epochs": 2, "batch_size": 32, "progress_bar": False}
        first = fit(svi, KEY, X, **options)
        for freeze in ("model", "decoder"):
            found = fit(svi, KEY, X, init_params=first.params, freeze=freeze, **options)
            for name in ("decoder$params", "decoder$state"):
                jax.tree.map(np.testing.assert_array_equal, found.params[name], first.params[name])
        free = fit(svi, KEY, X, init_params=first.params, **options)
        leaves = (jax.tree.leaves(result.params["decoder$state"]) for result in (free, first))
        assert not all(map(np.array_equal, *leaves))

    def test_bad_names(self):
        svi = make_svi(self.model, loss=Trace_ELBO())
        options = {"num_epochs": 1, "progress_bar": False}
        with pytest.raises(ValueError, match=r"freeze= names 'decoder'.*'auto\$params'"):
            fit(svi, KEY, X, freeze="decoder", **options)
        with pytest.raises(ValueError, match="nothing is left to train"):
            fit(svi, KEY, X, freeze=("model", "guide"), **options)
        with pytest.raises(ValueError, match=r"say nothing of its parameters.*'b_auto_loc'.*'w'"):
            fit(svi, KEY, Simulations(64, like=X), **options)


class TestBadInput:
    def fit(self, model, data=X, loss=None, guide=AutoAmortizedNormal, **options):
        svi = SVI(model, guide(model, SMALL), optax.adam(1e-3), loss or Trace_ELBO())
        source = Simulations(64, like=data, **options)
        return fit(svi, KEY, source, num_epochs=1, progress_bar=False)

    def test_an_improper_prior(self):
        def model(x):
            with numpyro.plate("data", len(x)):
                improper = dist.ImproperUniform(dist.constraints.real, (), ())
                z = numpyro.sample("z", improper)
                numpyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

        with pytest.raises(ValueError, match="Site 'z' has an improper prior"):
            self.fit(model)

    def test_a_factor(self):
        def model(x):
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
                numpyro.factor("x", dist.Normal(z[:, None], 1.0).log_prob(x).sum(-1))

        svi = make_svi(model, loss=Trace_ELBO(), inputs=lambda x: x)
        with pytest.raises(ValueError, match=r"Site 'x' is a numpyro.factor"):
            fit(svi, KEY, Simulations(64, like=X), num_epochs=1, progress_bar=False)

    def log_model(self, x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("log_x", dist.Normal(z, 1.0), obs=jnp.log(x))

    @pytest.mark.slow
    def test_what_has_no_place_among_the_arguments(self):
        x = np.exp(X[:, 0])
        with pytest.raises(ValueError, match=r"site 'log_x' are not one.*to_data="):
            self.fit(self.log_model, x)
        result = self.fit(self.log_model, x, to_data=lambda made: jnp.exp(made["log_x"]))
        assert np.isfinite(result.losses).all()
        svi = make_svi(self.log_model, loss=ForwardKL())
        with pytest.raises(ValueError, match=r"site 'log_x' are not one.*Simulations"):
            svi.run(KEY, 1, x, progress_bar=False)

    def test_no_density(self):
        with pytest.raises(ValueError, match=r"no density at the latents \['z'\]"):
            self.fit(conjugate, loss=ForwardKL(), guide=AutoAmortizedDelta)

    def test_options(self):
        with pytest.raises(ValueError, match=r"real_fraction is 0\.5, but ForwardKL"):
            self.fit(conjugate, loss=ForwardKL(), real_fraction=0.5)
        with pytest.raises(ValueError, match=r"real_fraction is 1\.0"):
            Simulations(10, like=X, real_fraction=1.0)
        with pytest.raises(ValueError, match="num_data is 0"):
            Simulations(0, like=X)
        with pytest.raises(ValueError, match="redraw_every is 0"):
            Simulations(10, like=X, redraw_every=0)


@pytest.mark.slow
def test_a_share_of_each_batch_stays_real():
    """With data that the model cannot have drawn, the loss says how many of them there are."""
    far = X + 1000.0
    losses = {}
    for fraction in (0.0, 0.25, 0.5):
        svi = make_svi(
            conjugate,
            partial(MLP, hidden_sizes=(8,), standardize=False),
            loss=Trace_ELBO(),
            optimizer=optax.sgd(0.0),
            inputs=lambda x: x / 1e3,
        )
        source = Simulations(64, like=far, real_fraction=fraction)
        losses[fraction] = fit(svi, KEY, source, num_epochs=1, progress_bar=False).losses[0]
    assert losses[0.0] < 10
    np.testing.assert_allclose(losses[0.5] / losses[0.25], 2.0, rtol=1e-2)


@pytest.mark.slow
def test_models_that_take_all_data_and_select_rows_themselves():
    def model(x):
        with numpyro.plate("data", len(x), subsample_size=16) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            loc = jnp.broadcast_to(z[:, None], (len(z), 2))
            numpyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x[rows])

    svi = make_svi(model, loss=ForwardKL(), optimizer=schedule(1200))
    source = Simulations(64 * 20, like=X)
    result = fit(svi, KEY, source, batch_size=16, num_epochs=20, progress_bar=False)
    encoded = Posterior(svi.guide, result).encode(X)["z"]
    assert_exact(encoded)


def test_the_forward_kl_of_a_tempered_model_is_refused():
    """Its latents are of another posterior; the ELBO of the same simulations is right."""

    def tempered(x, of_all=1.0, of_data=1.0):
        with numpyro.plate("data", len(x)), numpyro.handlers.scale(scale=of_all):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            with numpyro.handlers.scale(scale=of_data):
                numpyro.sample("x", dist.Normal(z, NOISE), obs=x)

    def losses(loss, **scales):
        svi = make_svi(partial(tempered, **scales), loss=loss)
        data = Simulations(64, like=X[:, 0])
        return fit(svi, KEY, data, num_epochs=1, freeze=FROZEN, progress_bar=False).losses

    for of_all in (1.0, 0.2):
        with pytest.raises(ValueError, match=r"scales its observed sites.*Train .* with an ELBO"):
            losses(ForwardKL(), of_all=of_all, of_data=0.2)
    assert np.isfinite(losses(Trace_ELBO(), of_data=0.2)).all()
    assert np.isfinite(losses(ForwardKL(), of_all=0.2)).all()  # the posterior is the same
