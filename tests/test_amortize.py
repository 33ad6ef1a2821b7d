"""A trained posterior in one call."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
from helpers import SMALL
from numpyro.contrib.control_flow import scan

from numpyro_vae import (
    RNN,
    AutoAmortizedDelta,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    ConvNet,
    Posterior,
    ResidualMLP,
    amortize,
    data_sets,
    phases,
)
from numpyro_vae.choices import (
    choose_guide,
    choose_posterior,
    choose_refining,
    judge_posterior,
    optimizers,
)
from numpyro_vae.inference.rows import Rows
from numpyro_vae.model.covariates import WithCovariates
from numpyro_vae.objectives import ForwardKL, ImportanceWeightedELBO

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
NOISE = 0.5
Z = RNG.normal(size=(600, 1))
X = (Z + RNG.normal(0, NOISE, (600, 3))).astype(np.float32)
QUIET = {"progress_bar": False}


def model(x, noise=NOISE):
    """Three observations of the sum of two latents, whose joint posterior is known."""
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 0.5**0.5).expand([2]).to_event(1))
        loc = jnp.broadcast_to(z.sum(-1, keepdims=True), x.shape)
        numpyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=x)


def exact(x):
    """The mean of either latent, and the covariance of the two."""
    precision = np.eye(2) / 0.5 + 3 / NOISE**2
    covariance = np.linalg.inv(precision)
    return (covariance @ np.full((2, len(x)), x.sum(-1) / NOISE**2)).T, covariance


@pytest.fixture(scope="module")
def posterior():
    return amortize(model, KEY, X, num_steps=600, num_simulation_steps=900, **QUIET)


@pytest.mark.slow
def test_the_posterior_is_the_exact_one(posterior):
    """As nearly as so short a training comes, and Monte Carlo error."""
    mean, covariance = exact(X)
    draws = posterior.sample(jax.random.key(1), X[:100], 2000)["z"]
    sd = covariance[0, 0] ** 0.5
    np.testing.assert_allclose(draws.mean(0), mean[:100], atol=0.25 * sd)
    found = np.mean([np.cov(draws[:, row].T) for row in range(100)], axis=0)
    np.testing.assert_allclose(found, covariance, rtol=0.15)
    report = posterior.check(jax.random.key(2), X[:100], **QUIET)
    assert (report.verdict <= 1).mean() > 0.95


@pytest.mark.slow
def test_the_same_key_gives_the_same_posterior(posterior):
    again = amortize(model, KEY, X, num_steps=600, num_simulation_steps=900, **QUIET)
    jax.tree.map(np.testing.assert_array_equal, posterior.params, again.params)


@pytest.mark.slow
def test_it_says_what_it_does(capsys):
    amortize(model, KEY, X, num_steps=20, num_simulation_steps=10)
    told = capsys.readouterr().out
    assert "AutoAmortizedFlow with ResidualMLP, for ['z'] of 600 rows" in told
    assert "The ELBO of the data: 4 epochs" in told
    assert "The forward KL of simulations: 7 epochs" in told  # of one batch each
    assert "The ELBO of simulations: 3 epochs" in told
    assert "60 data" in told  # a tenth is held out, and checked


@pytest.mark.slow
def test_every_choice_can_be_replaced():
    guide = AutoAmortizedNormal(model, SMALL)
    held_out = X[:50]
    posterior = amortize(
        model,
        KEY,
        X,
        guide=guide,
        optimizer=lambda num_steps: optax.sgd(0.0),
        validation=held_out,
        batch_size=60,
        num_steps=20,
        num_simulation_steps=0,
        static_kwargs={"noise": 0.3},
        **QUIET,
    )
    assert posterior.guide is guide
    assert posterior.static_kwargs == {"noise": 0.3}


@pytest.mark.slow
def test_a_model_that_cannot_be_simulated_is_trained_on_the_data(capsys):
    def improper(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
            loc = jnp.broadcast_to(z[:, None], x.shape)
            numpyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)

    posterior = amortize(improper, KEY, X, num_steps=20, num_simulation_steps=10)
    assert "No simulations. Site 'z' has an improper prior" in capsys.readouterr().out
    assert np.isfinite(posterior.sample(KEY, X, 2)["z"]).all()


@pytest.mark.slow
def test_simulations_that_do_harm_are_undone(capsys):
    """Those of a prior that does not know the data, which the network then forgets."""
    options = {"guide": AutoAmortizedNormal(model, SMALL), "num_steps": 600, "natural_steps": 0}
    posterior = amortize(model, KEY, X + 8, num_simulation_steps=600, **options)
    assert "better verdicts before: the last 2." in capsys.readouterr().out
    first = amortize(model, KEY, X + 8, num_simulation_steps=0, **options, **QUIET)
    jax.tree.map(np.testing.assert_array_equal, posterior.params, first.params)


# By phase and number of steps, how many of 100 rows are not fine, and the divergence.
JUDGED = {
    "the last": ({}, (3, 0)),
    "better verdicts": ({(2, 0): (20, 0.0)}, (2, 0)),
    "steps": ({(3, 8): (29, 0.9), (2, 8): (29, 0.8)}, (2, 8)),
    "steps for a hundredth of a nat": ({(3, 8): (30, 0.02)}, (3, 8)),
    "the first is hardly better": ({(1, 0): (27, 0.0)}, (3, 0)),
    "the first": ({(1, 0): (20, 0.0)}, (1, 0)),
    "the first with the steps of the others": ({(3, 8): (29, 0.0), (1, 8): (0, 0.0)}, (1, 8)),
}


@pytest.mark.parametrize("name", JUDGED)
def test_what_is_kept(name):
    judged, (phase, steps) = JUDGED[name]

    def judge(posterior):
        at = int(posterior.params["phase"]), posterior.natural_steps
        bad, divergence = judged.get(at, (30, 0.03))
        return np.repeat([1, 0], [bad, 100 - bad]), divergence

    guide, phases = AutoAmortizedNormal(model, SMALL), [{"phase": n} for n in (1, 2, 3)]
    posterior, undone = choose_posterior(guide, phases, [0, 8], judge)
    assert (int(posterior.params["phase"]), posterior.natural_steps) == (phase, steps)
    assert undone == 3 - phase


def test_a_posterior_without_finite_weights_is_the_worst_of_all(recwarn):
    guide = AutoAmortizedNormal(model, SMALL)
    options = {"num_steps": 1, "num_simulation_steps": 0, "natural_steps": 0} | QUIET
    good = amortize(model, KEY, X, guide=guide, **options)
    bad = Posterior(guide, jax.tree.map(lambda x: x * np.nan, good.params))
    verdict, divergence = judge_posterior(KEY, X[:5], bad)
    assert (verdict == 3).all()
    assert divergence == np.inf


@pytest.mark.slow
def test_models_that_take_their_data_whole():
    def selects(x):
        with numpyro.plate("data", len(x), subsample_size=60) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            loc = jnp.broadcast_to(z[:, None], (len(z), 3))
            numpyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x[rows])

    options = {"num_steps": 20, "num_simulation_steps": 5, **QUIET}
    selected = amortize(selects, KEY, X, batch_size=60, **options)
    assert selected.sample(KEY, X, 3)["z"].shape == (3, 600)
    whole = amortize(model, KEY, X[:50], batch_axes=None, **options)
    assert whole.sample(KEY, X[:50], 3)["z"].shape == (3, 50, 2)


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ([X], {}, "data is a list, expected an array"),
        (X, {"num_steps": 0}, "num_steps is 0"),
        (X, {"num_simulation_steps": -5}, "num_simulation_steps is -5"),
        (X[:0], {}, "data is empty"),
        (X * np.nan, {}, "NaN or infinite"),
        (
            X,
            {"plate": "rows", "guide": AutoAmortizedNormal(model)},
            r"plate='rows', and the guide is of plate 'data'.*AutoAmortizedNormal\(model, plate=",
        ),
    ],
)
def test_bad_input(data, options, message):
    with pytest.raises(ValueError, match=message):
        amortize(model, KEY, data, **options, **QUIET)


NO_STEPS = {
    "it has no density": lambda: AutoAmortizedDelta(model),
    "heads read values": lambda: AutoAmortizedNormal(pair, dependencies={"w": ["z"]}),
    "different factors": lambda: AutoAmortizedNormal(partial(pair, factor=0.5)),
}


def pair(x, factor=1.0):
    with numpyro.plate("data", len(x)):
        with numpyro.handlers.scale(scale=factor):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        loc = jnp.broadcast_to((z + w)[:, None], x.shape)
        numpyro.sample("x", dist.Normal(loc, NOISE).to_event(1), obs=x)


@pytest.mark.parametrize("reason", NO_STEPS)
def test_steps_that_rows_cannot_take_are_refused_before_training(reason, monkeypatch):
    monkeypatch.delattr(phases, "fit")
    guide = NO_STEPS[reason]()
    with pytest.raises(ValueError, match=f"natural_steps.*{reason}.*leave natural_steps out"):
        amortize(guide.model, KEY, X, guide=guide, natural_steps=8, **QUIET)


@pytest.mark.parametrize(
    ("guide", "reason"),
    [
        (AutoAmortizedDelta(model, SMALL), "has no density"),
        pytest.param(
            AutoAmortizedNormal(partial(pair, factor=0.5), SMALL),
            "scales its local sites by unlike",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_guides_without_weights_are_trained_on_the_data(guide, reason, capsys):
    """They learn nothing from simulations, and nothing can be checked."""
    options = {"num_steps": 5, "num_simulation_steps": 5}
    posterior = amortize(guide.model, KEY, X[:40], guide=guide, **options)
    told = capsys.readouterr().out
    assert re.search(f"No simulations. .*{reason}", told)
    assert re.search(f"No checks. .*{reason}", told)
    assert np.isfinite(posterior.sample(KEY, X[:5], 2)["z"]).all()


class TestOptimizer:
    def test_one_for_all_phases(self):
        adam = optax.adam(1e-3)
        assert optimizers(adam)(100) is adam

    def test_one_of_each_number_of_steps(self):
        assert optimizers(lambda num_steps: num_steps + 1)(100) == 101

    @pytest.mark.parametrize("optimizer", [optax.adam, numpyro.optim.Adam])
    def test_one_that_would_take_the_number_for_its_rate(self, optimizer):
        with pytest.raises(TypeError, match=r"of a learning rate.*Pass \w+\(1e-3\)"):
            amortize(model, KEY, X, optimizer=optimizer, **QUIET)


@pytest.mark.slow
def test_frames_and_batches_of_all_rows():
    """Frames take rows by their labels, and some rows of a batch are held out."""
    frame = pd.DataFrame(X[:40], index=np.arange(40)[::-1])
    options = {"num_steps": 5, "num_simulation_steps": 5, "batch_size": 40, **QUIET}
    posteriors = [
        amortize(model, KEY, data, guide=AutoAmortizedNormal(model, SMALL), **options)
        for data in (X[:40], frame)
    ]
    jax.tree.map(np.testing.assert_array_equal, *(posterior.params for posterior in posteriors))


def tempered(x, factor):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.handlers.scale(scale=factor):
            numpyro.sample("x", dist.Normal(z, NOISE), obs=x)


def test_scaled_data_have_no_forward_kl():
    """The latents that they are simulated with are not of the posterior that is wanted."""

    def phases(factor):
        data = X[:, 0], np.full(len(X), factor, np.float32)
        guide = AutoAmortizedNormal(tempered)
        rows = Rows.read(guide, {}, data, 0)
        return [type(loss) for _, loss, _ in choose_refining(guide, 9, None, rows)]

    assert phases(0.2) == [ImportanceWeightedELBO]
    assert phases(1.0) == [ForwardKL, ImportanceWeightedELBO]


class TestChoice:
    def of_size(self, size, shape=(3,)):
        def model(x):
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
                loc = z.sum(-1).reshape(-1, *[1] * len(shape))
                loc = jnp.broadcast_to(loc, x.shape)
                numpyro.sample("x", dist.Normal(loc, 1.0).to_event(len(shape)), obs=x)

        return choose_guide(model, np.zeros((4, *shape), np.float32))

    def test_the_family_follows_the_number_of_latents(self):
        assert type(self.of_size(1)) is AutoAmortizedFlow
        assert type(self.of_size(16)) is AutoAmortizedFlow
        assert type(self.of_size(17)) is AutoAmortizedMultivariateNormal
        assert type(self.of_size(32)) is AutoAmortizedMultivariateNormal
        assert type(self.of_size(33)) is AutoAmortizedLowRankMultivariateNormal

    @pytest.mark.parametrize(
        ("shape", "encoder"),
        [((3,), ResidualMLP), ((8, 8), ResidualMLP), ((16, 16), ConvNet), ((32, 32, 3), ConvNet)],
    )
    def test_the_encoder_follows_the_shape_of_the_data(self, shape, encoder):
        assert self.of_size(2, shape).encoder is encoder

    def test_the_plate_of_the_data_may_be_named(self):
        def grouped(x, group):
            with numpyro.plate("groups", 3):
                mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
            with numpyro.plate("people", len(x)):
                z = numpyro.sample("z", dist.Normal(mu[group], 1.0))
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

        data = (np.zeros(4, np.float32), np.arange(4) % 3)
        with pytest.raises(ValueError, match="plate="):
            choose_guide(grouped, data)
        guide = choose_guide(grouped, data, plate="people")
        guide.setup(*data)
        assert [site.name for site in guide.local_sites] == ["z"]
        assert guide.inputs == WithCovariates((("[0][1]", 0),))

    def test_data_sets_have_their_own_encoder(self):
        def school(y):
            mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
            with numpyro.plate("pupils", len(y)):
                numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

        sets = data_sets(school)
        assert choose_guide(sets, np.zeros((4, 5), np.float32)).encoder == sets.encoder

    def test_masked_latents_are_independent(self):
        def masked(x, there):
            with numpyro.plate("data", len(x)), numpyro.handlers.mask(mask=there):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
                numpyro.sample("w", dist.Normal(0.0, 1.0))
                numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

        data = (np.zeros(4, np.float32), np.ones(4, bool))
        assert type(choose_guide(masked, data)) is AutoAmortizedNormal

    def test_sequences(self):
        def chain(x):
            def step(z, x):
                with numpyro.plate("data", x.shape[0], dim=-1):
                    z = numpyro.sample("z", dist.Normal(z, 1.0))
                    numpyro.sample("x", dist.Normal(z, 1.0), obs=x)
                return z, None

            scan(step, jnp.zeros(x.shape[0]), jnp.moveaxis(x, 1, 0))

        guide = choose_guide(chain, np.zeros((4, 7), np.float32))
        assert guide.encoder is RNN
