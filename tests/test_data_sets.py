"""Models of one data set as models of many: densities, padding, guides, wrong uses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density

from numpyro_vae import (
    MLP,
    AutoAmortizedFlow,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    ForwardKL,
    Masked,
    Posterior,
    SetEncoder,
    Simulations,
    data_sets,
    fit,
)
from numpyro_vae.model.simulate import NotSimulableError

NUM_SETS = 3


def schools(y, sigma):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(2.0))
    with numpyro.plate("school", len(y)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        width = numpyro.sample("width", dist.LogNormal(0.1 * mu, 0.5))
        numpyro.sample("y", dist.Normal(theta, sigma * width), obs=y)
    numpyro.deterministic("ratio", mu / tau)


def supports(y, sigma):
    """Bounds of each data set's own, supports of vectors and matrices, a bound that all share."""
    bound = numpyro.sample("bound", dist.Uniform(-sigma.max(), jnp.array([1.0, 2.0])).to_event(1))
    weights = numpyro.sample("weights", dist.Dirichlet(1.0 + sigma[:3]))
    corr = numpyro.sample("corr", dist.LKJCholesky(3, 1.5))
    beyond = numpyro.sample("beyond", dist.TruncatedNormal(bound.sum(), 1.0, low=0.5))
    with numpyro.plate("row", 2, dim=-2), numpyro.plate("column", 5, dim=-1):
        z = numpyro.sample("z", dist.Uniform(-1.0, sigma))
    loc = (corr @ weights).sum() + beyond + z.sum(0)
    numpyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def modifiers(y, sigma):
    """Masks, scales of each data set's own, factors, a site that another one scores."""
    with handlers.scale(scale=sigma[0]):
        a = numpyro.sample("a", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(a, 1.0).mask(False))
    numpyro.sample("b_aux", dist.Normal(a, 3.0), obs=b)
    with numpyro.plate("row", 5), handlers.mask(mask=y > 0):
        c = numpyro.sample("c", dist.Gamma(2.0, 1.0 + b**2))
        numpyro.sample("y", dist.StudentT(3.0, c, sigma), obs=y)
    numpyro.factor("penalty", -(a**2) * sigma[1])


def no_plate(y, sigma):
    """Observations of which NumPyro broadcasts the distribution, and a transformed prior."""
    shift = dist.transforms.AffineTransform(sigma[0], jnp.array([1.0, 2.0, 3.0]))
    raw = dist.TransformedDistribution(dist.Normal(0.0, 1.0).expand([3]), shift)
    total = numpyro.sample("total", raw.to_event(1)).sum()
    flat = numpyro.sample("flat", dist.ImproperUniform(dist.constraints.positive, (), ()))
    numpyro.sample("y", dist.Normal(total, flat), obs=y)


MODELS = [schools, supports, modifiers, no_plate]


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(NUM_SETS, 5)).astype(np.float32)
    return y, rng.uniform(1.0, 2.0, size=(NUM_SETS, 5)).astype(np.float32)


def latents_of(model, *args, **kwargs):
    """Values within the supports, not far from their middle."""
    init = handlers.substitute(substitute_fn=numpyro.infer.init_to_uniform(radius=1.0))
    with init, handlers.seed(rng_seed=1), handlers.trace() as trace:
        model(*args, **kwargs)
    return {
        name: site["value"]
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_density_is_the_sum_of_those_of_all_data_sets(model, data):
    sets = data_sets(model)
    values = latents_of(sets, *data)

    def ours(values):
        return log_density(sets, data, {}, values)[0]

    def of_one(values, y, sigma):
        return log_density(model, (y, sigma), {}, values)[0]

    def numpyros(values):
        return jax.vmap(of_one)(values, *data).sum()

    found, expected = (jax.jit(jax.value_and_grad(fn))(values) for fn in (ours, numpyros))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(*(ravel_pytree(x[1])[0] for x in (found, expected)), atol=1e-4)


def test_draws_are_those_of_each_data_set(data):
    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        data_sets(schools)(*data)
    assert trace["theta"]["value"].shape == (NUM_SETS, 5)
    np.testing.assert_allclose(
        trace["ratio"]["value"], trace["mu"]["value"] / trace["tau"]["value"], rtol=1e-6
    )
    standard = (trace["theta"]["value"] - trace["mu"]["value"][:, None]) / (
        trace["tau"]["value"][:, None]
    )
    assert len(np.unique(standard.round(5))) == standard.size
    assert np.abs(standard).max() < 5


def test_drawn_observations_are_what_later_sites_read(data):
    def chain(y):
        first = numpyro.sample("first", dist.Normal(0.0, 1.0), obs=y[0])
        numpyro.sample("second", dist.Normal(1e3 * first, 1e-3), obs=y[1])

    with handlers.seed(rng_seed=0), handlers.trace() as trace, handlers.uncondition():
        data_sets(chain)(data[0])
    np.testing.assert_allclose(
        trace["second"]["value"], 1e3 * trace["first"]["value"], rtol=1e-3, atol=0.01
    )


def test_each_data_set_has_random_keys_of_its_own(data):
    def model(y):
        noise = jax.random.normal(numpyro.prng_key())
        numpyro.deterministic("noise", noise)
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y[0])

    with handlers.seed(rng_seed=0), handlers.trace() as trace:
        data_sets(model)(data[0])
    assert len(np.unique(trace["noise"]["value"])) == NUM_SETS


LENGTHS = np.array([5, 2, 3])


def test_padding_has_no_density(data):
    sets, sizes = data_sets(schools), {"school": LENGTHS}
    values = latents_of(sets, *data, sizes=sizes)
    found, _ = log_density(sets, data, {"sizes": sizes}, values)
    expected = 0.0
    for i, length in enumerate(LENGTHS):
        one = {k: v[i] if v.ndim == 1 else v[i, :length] for k, v in values.items()}
        expected += log_density(schools, tuple(x[i, :length] for x in data), {}, one)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def trained(maker, sets, data, **options):
    """A guide with the parameters that it starts from."""
    svi = SVI(sets, maker(sets, **options), optax.sgd(0.0), Trace_ELBO())
    return svi.guide, fit(svi, jax.random.key(0), data, num_epochs=1, progress_bar=False)


def padded(data, filler):
    """Data whose padding is made of a number."""
    there = np.arange(5) < LENGTHS[:, None]
    y, sigma = (np.where(there, x, filler).astype(np.float32) for x in data)
    return {"y": y, "sigma": sigma, "sizes": {"school": LENGTHS}}


@pytest.fixture(scope="module", params=[AutoAmortizedNormal, AutoAmortizedMultivariateNormal])
def guide_of_sizes(request, data):
    encoder = {"encoder": lambda inputs, *, rngs: MLP(inputs, hidden_sizes=(4,), rngs=rngs)}
    return trained(request.param, data_sets(schools), padded(data, 1.0), **encoder)


@pytest.mark.slow
def test_padding_has_no_density_in_the_guide(guide_of_sizes, data):
    guide, result = guide_of_sizes
    arguments = padded(data, 1.0)
    encoding = guide.encode(result.params, **arguments)
    np.testing.assert_array_equal(encoding.mask.sum(-1), 2 + 2 * LENGTHS)
    packed = jax.random.normal(jax.random.key(0), encoding.mask.shape)
    other = jnp.where(encoding.mask, packed, 7.0)
    np.testing.assert_allclose(encoding.log_prob(packed), encoding.log_prob(other), rtol=1e-6)
    seeded = handlers.seed(handlers.substitute(guide, data=result.params), 0)
    totals = []
    for values in (packed, other):
        drawn = encoding.constrain(values)[0]
        auxiliary = {"_auto_mu_tau_theta_width_latent": values}
        total, trace = log_density(seeded, (), arguments, {**drawn, **auxiliary})
        np.testing.assert_allclose(trace["theta"]["value"], drawn["theta"], rtol=1e-5)
        totals.append(total)
    log_det = jnp.log(drawn["tau"]) + (np.log(drawn["width"]) * encoding.mask[:, -5:]).sum(-1)
    expected = (encoding.log_prob(packed) - log_det).sum()
    np.testing.assert_allclose(totals, [expected] * 2, rtol=1e-5)


@pytest.mark.slow
def test_padding_changes_nothing(guide_of_sizes, data):
    posterior = Posterior(*guide_of_sizes)
    weights = [
        posterior.log_weights(jax.random.key(1), padded(data, filler), 4) for filler in (1.0, 3.0)
    ]
    np.testing.assert_allclose(*weights, rtol=1e-5)


def mean_of(y, sigma):
    """The exact posterior is Normal."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("observation", len(y)):
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y)


def exact(y, sigma, lengths):
    there = np.arange(y.shape[1]) < lengths[:, None]
    precision = 1 + (there / sigma**2).sum(-1)
    return (there * y / sigma**2).sum(-1) / precision, precision**-0.5


@pytest.mark.slow
def test_simulations_train_the_posterior_of_any_data_set():
    """A set encoder; data sets of 2 to 8 observations."""
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.5, 2.0, size=(256, 8)).astype(np.float32)
    lengths = rng.integers(2, 9, size=256)
    like = {
        "y": np.zeros_like(sigma),
        "sigma": sigma,
        "sizes": {"observation": lengths},
    }
    sets = data_sets(mean_of)
    assert isinstance(sets.inputs(**like), Masked)
    assert isinstance(sets.encoder(sets.inputs(**like), rngs=nnx.Rngs(0)), SetEncoder)
    encoder = partial(
        SetEncoder, element_sizes=(32,), hidden_sizes=(32,), pooling="sum", activation=nnx.tanh
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 400))
    svi = SVI(sets, AutoAmortizedNormal(sets, encoder), optimizer, ForwardKL())
    simulations = Simulations(4096, like=like)
    options = {"num_epochs": 25, "batch_size": 256, "progress_bar": False}
    result = fit(svi, jax.random.key(0), simulations, **options)
    mu = rng.normal(size=(256, 1))
    y = (mu + sigma * rng.normal(size=sigma.shape)).astype(np.float32)
    draws = Posterior(svi.guide, result).sample(jax.random.key(1), like | {"y": y}, 2000)["mu"]
    loc, scale = exact(y, sigma, lengths)
    assert np.sqrt(np.mean(((draws.mean(0) - loc) / scale) ** 2)) < 0.35  # after so few steps
    np.testing.assert_allclose((draws.std(0) / scale).mean(), 1.0, atol=0.1)


def shared(y, x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu * x, 1.0).to_event(1), obs=y)


def test_an_array_that_all_data_sets_share(data):
    y, x = data[0], np.arange(5.0, dtype=np.float32)
    sets = data_sets(shared, batch_axes=(0, None))
    values = {"mu": np.arange(1.0, 4.0, dtype=np.float32)}
    expected = sum(log_density(shared, (y[i], x), {}, {"mu": values["mu"][i]})[0] for i in range(3))
    np.testing.assert_allclose(log_density(sets, (y, x), {}, values)[0], expected, rtol=1e-5)


def run(model, *args, **kwargs):
    with handlers.seed(rng_seed=0):
        data_sets(model)(*args, **kwargs)


def test_what_has_no_place_in_a_data_set_is_named(data):
    def scanned(y, sigma):
        scan(lambda z, _: (numpyro.sample("z", dist.Normal(z, 1.0)), None), 0.0, None, length=3)

    def weighed(y, sigma):
        with numpyro.plate("row", 5), handlers.scale(scale=sigma):
            numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    def mixture(y, sigma):
        numpyro.sample("k", dist.Categorical(jnp.ones(2) / 2), infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match="'k' is a discrete latent"):
        run(mixture, *data)
    with pytest.raises(ValueError, match=r"control flow .*scan"):
        run(scanned, *data)
    with pytest.raises(ValueError, match=r"'y' is scaled by an array of shape \(5,\)"):
        run(weighed, *data)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((np.zeros((3, 5)), np.zeros((4, 5))), {}, "disagrees on the number of data"),
        ((), {}, "no array with a datum axis"),
        ((np.zeros((3, 5)), 1.0), {}, r"data\[1\] is 1.0 of type float"),
        ((np.zeros((3, 5)),) * 2, {"sizes": {"school": [1, 2]}}, "integer for each of 3"),
        ((np.zeros((3, 5)),) * 2, {"sizes": {"school": [1.0] * 3}}, "integer for each of 3"),
        ((np.zeros((3, 5)),) * 2, {"sizes": {"class": [1] * 3}}, "has \\['school'\\]"),
        ((np.zeros((3, 5)),) * 2, {"sizes": {"school": [1, 2, 6]}}, "has 5 rows"),
    ],
)
def test_arguments_that_are_no_data_sets_are_named(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(schools, *args, **kwargs)


def test_data_sets_of_different_shapes_are_to_be_padded():
    data = [np.zeros(3), np.zeros(4)], np.zeros((2, 4))
    with pytest.raises(ValueError, match=r"disagrees on the number.*say with sizes="):
        run(schools, *data)


def test_a_model_whose_plates_depend_on_values_is_named():
    def model(y, count):
        with numpyro.plate("row", int(count)):
            numpyro.sample("y", dist.Normal(0.0, 1.0), obs=y[: int(count)])

    sets, data = data_sets(model), (np.zeros((3, 4)), np.array([2, 3, 4]))
    with pytest.raises(ValueError, match=r"asks for the values of its arguments.*sizes="):
        run(model, *data)
    with pytest.raises(ValueError, match=r"asks for the values of its arguments.*sizes="):
        handlers.seed(AutoAmortizedNormal(sets), 0)(*data)


def test_an_improper_prior_cannot_be_simulated(data):
    sets = data_sets(no_plate)
    data = data[0][:, 0], data[1]
    svi = SVI(sets, AutoAmortizedFlow(sets), optax.adam(1e-3), ForwardKL())
    with pytest.raises(NotSimulableError, match="'flat' has an improper prior"):
        fit(svi, jax.random.key(0), Simulations(4, like=data), num_epochs=1, progress_bar=False)
