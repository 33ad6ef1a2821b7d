"""Classes that are summed over, beside continuous latents or alone, known in part or not at all."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.contrib.control_flow import scan
from numpyro.contrib.funsor import config_enumerate
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, init_to_median
from numpyro.infer.autoguide import AutoNormal
from scipy import stats
from scipy.special import logsumexp

from numpyro_vae import (
    MLP,
    AutoAmortizedNormal,
    ForwardKL,
    Importance,
    Posterior,
    Simulations,
    fit,
)

NUM_DATA, NOISE = 200, 0.5
WEIGHTS, CENTRES = np.array([0.2, 0.3, 0.5]), np.array([-2.0, 0.0, 1.5])
SPREAD = np.sqrt(1 + NOISE**2)
SMALL = partial(MLP, hidden_sizes=(32,), activation=nnx.tanh)
ENUMERATE = {"enumerate": "parallel"}
KEY = jax.random.key(1)


def mixture(x, infer=ENUMERATE):
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Categorical(jnp.array(WEIGHTS)), infer=infer)
        z = numpyro.sample("z", dist.Normal(jnp.array(CENTRES)[k], 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x)


def draw(seed):
    rng = np.random.default_rng(seed)
    k = rng.choice(3, NUM_DATA, p=WEIGHTS)
    return k, rng.normal(CENTRES[k], SPREAD).astype(np.float32)


CLASSES, X = draw(0)
JOINT = np.log(WEIGHTS) + stats.norm(CENTRES, SPREAD).logpdf(X[:, None])  # log p(k, x)
EVIDENCE = logsumexp(JOINT, axis=1)
EXACT = np.exp(JOINT - EVIDENCE[:, None])


def inference(model, num_steps, loss=None, **options):
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, num_steps))
    guide = AutoAmortizedNormal(model, SMALL, **options)
    return SVI(model, guide, optimizer, loss or TraceEnum_ELBO())


def train(svi, data, num_epochs):
    return fit(
        svi, jax.random.key(0), data, batch_size=50, num_epochs=num_epochs, progress_bar=False
    )


@pytest.fixture(scope="module", params=["fit", "svi.run"])
def posterior(request):
    svi = inference(mixture, 800)
    if request.param == "fit":
        return Posterior(svi.guide, train(svi, X, 200))
    return Posterior(svi.guide, svi.run(jax.random.key(0), 800, X, progress_bar=False))


def test_probabilities_of_the_classes_are_exact(posterior):
    keys = jax.random.split(jax.random.key(1), 16)
    found = np.stack(
        [posterior.probabilities(key, X, 4, num_particles=200)["k"] for key in keys], axis=0
    )
    assert np.abs(found.sum(-1) - 1).max() < 1e-5
    error = np.sqrt(found.var(0, ddof=1) / len(keys) + 1e-4**2)
    assert np.abs((found.mean(0) - EXACT) / error).max() < 5.5  # of 600 draws of Student's t


def test_evidence_is_within_two_hundredths_of_a_nat(posterior):
    found = posterior.check(
        jax.random.key(2), X, checks=(Importance(num_samples=20_000), "collapse")
    ).dataset
    assert np.abs(found["log_evidence"].values - EVIDENCE).max() <= 0.02
    # A Normal comes close to the posterior, which is a mixture of three, and cannot reach it.
    assert 0 < (EVIDENCE - found["elbo"].values).mean() < 0.03


def test_classes_are_drawn_as_often_as_they_are_probable(posterior):
    num_samples = 2000
    draws = posterior.sample(jax.random.key(3), X, num_samples)
    assert draws["k"].shape == draws["z"].shape == (num_samples, NUM_DATA)
    found = (draws["k"][..., None] == np.arange(3)).mean(0)
    # The guide's own error is added: z is drawn from it, and the class given z is exact.
    error = np.sqrt(EXACT * (1 - EXACT) / num_samples)
    assert (np.abs(found - EXACT) <= 4.5 * error + 0.01).all()
    pooled = (found - EXACT).mean(0)
    assert np.abs(pooled).max() <= 0.005


def test_classes_of_a_row_do_not_depend_on_the_other_rows(posterior):
    whole = posterior.sample(jax.random.key(5), X, 3)["k"]
    np.testing.assert_array_equal(posterior.sample(jax.random.key(5), X[:7], 3)["k"], whole[:, :7])


def two_classes(x, y):
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Categorical(jnp.array(WEIGHTS)), infer=ENUMERATE)
        b = numpyro.sample("b", dist.Bernoulli(jnp.array([0.2, 0.5, 0.9])[k]), infer=ENUMERATE)
        z = numpyro.sample("z", dist.Normal(jnp.array(CENTRES)[k], 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x)
        numpyro.sample("y", dist.Normal(2.0 * b, 1.0), obs=y)


def test_two_sites_are_summed_over_together():
    rng = np.random.default_rng(4)
    on = np.array([0.2, 0.5, 0.9])
    y = rng.normal(2.0 * (rng.random(NUM_DATA) < on[CLASSES])).astype(np.float32)
    joint = JOINT[..., None] + np.log(np.stack([1 - on, on], axis=1))
    joint = joint + stats.norm([0, 2], 1).logpdf(y[:, None])[:, None]  # data, k, b
    evidence = logsumexp(joint, axis=(1, 2))
    exact = np.exp(joint - evidence[:, None, None])

    svi = inference(two_classes, 800)
    result = train(svi, (X, y), 200)
    posterior = Posterior(svi.guide, result)
    found = posterior.probabilities(jax.random.key(1), (X, y), 20, num_particles=200)
    assert np.abs(found["k"] - exact.sum(2)).max() < 0.01
    assert np.abs(found["b"] - exact.sum(1)).max() < 0.01
    draws = posterior.sample(jax.random.key(2), (X, y), 1000)
    both = (draws["k"][..., None] == np.arange(3)) & (draws["b"][..., None] == 1)
    assert np.abs(both.mean(0) - exact[..., 1]).mean() < 0.02  # they are drawn jointly
    log_evidence = posterior.log_evidence(jax.random.key(3), (X, y), 1, num_particles=2000)[0]
    assert np.abs(log_evidence - evidence).max() <= 0.02


def global_centres(x):
    centres = numpyro.sample("centres", dist.Normal(jnp.array(CENTRES), 1.0).to_event(1))
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Categorical(jnp.array(WEIGHTS)), infer=ENUMERATE)
        numpyro.sample("x", dist.Normal(centres[k], SPREAD), obs=x)


def exact_centres():
    """The posterior mean and sd of each centre, on a grid of eight sd around the mode or more."""
    grids = [np.linspace(centre - 1.2, centre + 1.2, 41) for centre in CENTRES]
    logs = [
        np.log(weight) + stats.norm(grid[:, None], SPREAD).logpdf(X)
        for grid, weight in zip(grids, WEIGHTS, strict=True)
    ]
    priors = [stats.norm(c, 1).logpdf(grid) for grid, c in zip(grids, CENTRES, strict=True)]
    of_two = np.logaddexp(logs[0][:, None], logs[1])
    log_p = np.stack([np.logaddexp(of_two, log).sum(-1) for log in logs[2]], axis=-1)
    log_p += priors[0][:, None, None] + priors[1][:, None] + priors[2]
    p = np.exp(log_p - logsumexp(log_p))
    marginals = [p.sum(axes) for axes in ((1, 2), (0, 2), (0, 1))]
    loc = np.array([grid @ q for grid, q in zip(grids, marginals, strict=True)])
    square = np.array([grid**2 @ q for grid, q in zip(grids, marginals, strict=True)])
    return loc, np.sqrt(square - loc**2)


def test_without_continuous_local_latents_there_is_no_network():
    start = partial(AutoNormal, init_loc_fn=init_to_median)  # or centres may change places
    svi = inference(global_centres, 800, global_guide=start)
    result = train(svi, X, 200)
    assert {name.removeprefix("auto_") for name in result.params} == {
        "centres_auto_loc",
        "centres_auto_scale",
    }
    posterior = Posterior(svi.guide, result)
    assert posterior.encode(X) == {}
    centres = posterior.sample(jax.random.key(1), X, 500, var_names=["centres"])["centres"]
    joint = np.log(WEIGHTS) + stats.norm(centres[:, None], SPREAD).logpdf(X[:, None])
    evidence = logsumexp(joint, axis=-1)  # draws, data
    found = posterior.log_evidence(jax.random.key(1), X, 500, num_particles=1)
    np.testing.assert_allclose(found, evidence, atol=1e-5)
    exact = np.exp(joint - evidence[..., None]).mean(0)
    found = posterior.probabilities(jax.random.key(1), X, 500)["k"]
    np.testing.assert_allclose(found, exact, atol=1e-5)
    loc, scale = exact_centres()
    # The guide takes the centres for independent, which narrows it and moves it a little.
    assert (np.abs(centres.mean(0) - loc) < 0.4 * scale).all()
    assert (centres.std(0) < 1.05 * scale).all()
    report = posterior.check(jax.random.key(2), X, checks=(Importance(num_samples=200), "collapse"))
    assert f"{NUM_DATA} data" in str(report)


def test_a_model_that_is_marked_as_a_whole_is_the_same():
    as_a_whole = config_enumerate(partial(mixture, infer=None))
    losses = [train(inference(model, 20), X, 5).losses for model in (mixture, as_a_whole)]
    np.testing.assert_array_equal(*losses)


def semi_supervised(x, y):
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Categorical(jnp.array(WEIGHTS)), infer=ENUMERATE)
        # A label says what the class is; where there is none, it says nothing.
        numpyro.sample("label", dist.Delta(k).mask(y >= 0), obs=y)
        z = numpyro.sample("z", dist.Normal(jnp.array(CENTRES)[k], 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x)


def test_labels_are_observations_of_the_class():
    """Not ``obs_mask=``, which NumPyro does not enumerate, nor one-hot class probabilities.

    With those, a labelled row would have p(x | k) in the evidence in place of p(x, k), which
    says nothing of how probable the class is.
    """
    labelled = np.arange(NUM_DATA) % 4 == 0
    labels = np.where(labelled, CLASSES, -1)
    known = JOINT[np.arange(NUM_DATA), CLASSES]

    svi = inference(semi_supervised, 1600)
    data = (X, labels)
    result = train(svi, data, 400)
    posterior = Posterior(svi.guide, result)
    found = posterior.probabilities(jax.random.key(1), data, 20, num_particles=200)["k"]
    assert (found[labelled] == np.eye(3)[CLASSES[labelled]]).all()
    assert np.abs(found - EXACT)[~labelled].max() < 0.01
    found = posterior.log_evidence(jax.random.key(2), data, 1, num_particles=2000)[0]
    assert np.abs(found - np.where(labelled, known, EVIDENCE)).max() <= 0.02
    # To forget the labels is to ask for the classes of other rows.
    found = posterior.probabilities(jax.random.key(1), (X, labels * 0 - 1), 20, num_particles=200)
    assert np.abs(found["k"] - EXACT).max() < 0.01


def test_labelled_rows_are_repaired_by_importance():
    """All classes but the label are impossible, and that leaves the prior of z what it is."""
    x, labels = np.array([-2.0, 0.0, 0.3], np.float32), np.array([0, 2, 1])
    svi = inference(semi_supervised, 1)
    posterior = Posterior(svi.guide, svi.get_params(svi.init(jax.random.key(0), x, labels)))
    rows, options = [0, 1, 2], {"method": "importance", "num_samples": 1000}
    repaired = posterior.repair(jax.random.key(1), (x, labels), rows, **options)
    assert not len(repaired.remaining)
    z, precision = repaired.groups["posterior"]["z"], 1 + 1 / NOISE**2
    error = 5 / np.sqrt(1000 * precision)
    exact = (CENTRES[labels] + x / NOISE**2) / precision
    np.testing.assert_allclose(z.mean(0), exact, atol=error)


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceGraph_ELBO()], ids=lambda x: type(x).__name__)
def test_an_objective_that_does_not_enumerate_is_refused(loss):
    with pytest.raises(ValueError, match=r"\['k'\].*TraceGraph_ELBO|\['k'\].*Trace_ELBO") as error:
        fit(inference(mixture, 1, loss), jax.random.key(0), X, num_epochs=1, progress_bar=False)
    assert "Train with numpyro.infer.TraceEnum_ELBO" in str(error.value)


def test_a_discrete_latent_that_is_not_enumerated_is_refused():
    svi = inference(partial(mixture, infer=None), 1)
    with pytest.raises(ValueError, match=r"Site 'k' in plate 'data' is discrete.*enumerate"):
        svi.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"Site 'k' in plate 'data' is discrete.*enumerate"):
        fit(svi, jax.random.key(0), X, num_epochs=1, progress_bar=False)


def fixed_centres(x):
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Categorical(jnp.array(WEIGHTS)), infer=ENUMERATE)
        numpyro.sample("x", dist.Normal(jnp.array(CENTRES)[k], SPREAD), obs=x)
        numpyro.factor("known", -(numpyro.param("anything", 1.0) ** 2))


def test_the_validation_loss_is_that_of_all_rows():
    guide = AutoAmortizedNormal(fixed_centres)
    svi = SVI(fixed_centres, guide, optax.sgd(0.0), TraceEnum_ELBO())
    exact, rows = 1 - EVIDENCE, 130  # whole batches, and one that is cut short
    options = {"num_epochs": 1, "progress_bar": False, "validation": X[:rows]}
    of_arrays = fit(svi, jax.random.key(0), X, batch_size=50, **options)
    batches = [X[:100], X[100:180], X[180:]]
    of_batches = fit(svi, jax.random.key(0), batches, num_data=NUM_DATA, **options)
    for result in (of_arrays, of_batches):
        found = result.history["validation_loss"]
        np.testing.assert_allclose(found, exact[:rows].mean(), rtol=1e-5)
    expected = [exact[:100].mean(), exact[100:180].mean(), exact[180:].mean()]
    np.testing.assert_allclose(of_batches.losses, expected, rtol=1e-5)


STAYS = np.array([[0.8, 0.2], [0.3, 0.7]])


def chain(x):
    with numpyro.plate("data", len(x)):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))

    def step(k, x):
        with numpyro.plate("data", len(x)):
            k = numpyro.sample("k", dist.Categorical(jnp.array(STAYS)[k]), infer=ENUMERATE)
            numpyro.sample("x", dist.Normal(a + 2.0 * k, 1.0), obs=x)
        return k, None

    scan(step, jnp.zeros(len(x), int), x.T)


def test_a_chain_of_classes_is_weighed_but_not_trained_as_numpyro_sums_it():
    """By TraceEnum_ELBO the model below has a loss of 53.8 at a point where it should have 45.6."""
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    guide = AutoAmortizedNormal(chain, SMALL)
    svi = SVI(chain, guide, optax.adam(1e-2), TraceEnum_ELBO())
    with pytest.raises(ValueError, match=r"\['k'\] are to be enumerated inside a scan.*ForwardKL"):
        fit(svi, jax.random.key(0), x, num_epochs=1, progress_bar=False)
    svi = SVI(chain, guide, optax.adam(1e-2), ForwardKL())
    result = fit(svi, jax.random.key(0), Simulations(64, like=x), num_epochs=1, progress_bar=False)
    posterior = Posterior(guide, result)
    a, (loc, scale) = posterior.sample(KEY, x, 5)["a"], posterior.encode(x)["a"]
    forward = np.stack([np.ones_like(a), np.zeros_like(a)], -1)
    for column in x.T:
        likelihood = stats.norm(a[..., None] + np.array([0.0, 2.0]), 1.0).pdf(column[:, None])
        forward = forward @ STAYS * likelihood
    expected = np.log(forward.sum(-1)) + stats.norm.logpdf(a) - stats.norm.logpdf(a, loc, scale)
    np.testing.assert_allclose(posterior.log_weights(KEY, x, 5), expected, atol=1e-4)


def imputed(x, seen):
    """As NumPyro's tutorial on discrete imputation has it, which is right under NUTS."""
    with numpyro.plate("data", len(x)):
        prior = dist.Categorical(jnp.array(WEIGHTS))
        k = numpyro.sample("k", prior.mask(False), infer=ENUMERATE)
        known = jnp.where((seen >= 0) & (k != seen), -jnp.inf, prior.log_prob(k))
        numpyro.factor("known", known)
        z = numpyro.sample("z", dist.Normal(jnp.array(CENTRES)[k], 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x)


def test_a_class_that_is_switched_off_is_scored_where_the_model_scores_it():
    x, seen = X[:6], np.array([-1, 0, 1, -1, 2, -1])
    svi = inference(imputed, 1)
    with pytest.raises(ValueError, match=r"\['k'\] are to be enumerated, and switched off"):
        fit(svi, jax.random.key(0), (x, seen), num_epochs=1, progress_bar=False)
    guide = AutoAmortizedNormal(imputed, SMALL, inputs=lambda x, seen: x)
    svi = SVI(imputed, guide, optax.adam(1e-2), TraceEnum_ELBO())
    posterior = Posterior(guide, svi.get_params(svi.init(KEY, x, seen)))
    z, (loc, scale) = posterior.sample(KEY, (x, seen), 5)["z"], posterior.encode((x, seen))["z"]
    joint = np.log(WEIGHTS) + stats.norm(CENTRES, 1.0).logpdf(z[..., None])
    joint = np.where((seen[:, None] >= 0) & (seen[:, None] != np.arange(3)), -np.inf, joint)
    expected = logsumexp(joint, axis=-1) + stats.norm.logpdf(x, z, NOISE)
    expected -= stats.norm.logpdf(z, loc, scale)
    np.testing.assert_allclose(posterior.log_weights(KEY, (x, seen), 5), expected, atol=1e-4)
