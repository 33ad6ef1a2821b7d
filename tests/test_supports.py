"""Local sites of any support, event shape and plate."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import MLP, AutoAmortizedFlow, AutoAmortizedNormal, ForwardKL, Simulations, fit
from numpyro_vae.model.supports import inside

X = jnp.linspace(-2, 2, 40)
SMALL = partial(MLP, hidden_sizes=(8,))

MODELS = {}


def model_case(fn):
    MODELS[fn.__name__] = fn
    return fn


@model_case
def positive_and_interval(x):
    with numpyro.plate("data", len(x)):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        p = numpyro.sample("p", dist.Beta(2.0, 2.0))
        numpyro.sample("x", dist.Normal(rate * p, 1.0), obs=x)


@model_case
def simplex_and_matrix(x):
    with numpyro.plate("data", len(x)):
        w = numpyro.sample("w", dist.Dirichlet(jnp.ones(3)))
        m = numpyro.sample("m", dist.Normal(0, 1).expand([2, 3]).to_event(2))
        chol = numpyro.sample("chol", dist.LKJCholesky(3))
        mean = (w * m.sum(-2)).sum(-1) + chol[..., 2, 0]
        numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)


@model_case
def ordered_and_improper(x):
    ordered = dist.TransformedDistribution(
        dist.Normal(0, 1).expand([3]).to_event(1), dist.transforms.OrderedTransform()
    )
    with numpyro.plate("data", len(x)):
        cuts = numpyro.sample("cuts", ordered)
        free = numpyro.sample("free", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("x", dist.Normal(cuts[..., 0] + free, 1.0), obs=x)


@model_case
def plate_at_another_dim(x):
    with numpyro.plate("data", len(x), dim=-2):
        a = numpyro.sample("a", dist.Normal(0, 1))
        with numpyro.plate("items", 3, dim=-1):
            z = numpyro.sample("z", dist.Dirichlet(jnp.ones(2)))
        numpyro.sample("x", dist.Normal(a + z[..., :1, 0], 1.0), obs=x[:, None])


@model_case
def nested_plates(x):
    with numpyro.plate("data", len(x), dim=-1):
        a = numpyro.sample("a", dist.Normal(0, 1))
        with numpyro.plate("items", 3, dim=-2):
            b = numpyro.sample("b", dist.HalfNormal(1.0))
            numpyro.sample("x", dist.Normal(a + b, 1.0), obs=jnp.stack([x, x, x]))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_supports(name):
    model = MODELS[name]
    guide = AutoAmortizedNormal(model, SMALL, plate="data")
    svi = SVI(model, guide, optax.adam(1e-2), Trace_ELBO())
    state = jax.jit(svi.init)(jax.random.key(0), X)
    result = svi.run(jax.random.key(0), 3, X, progress_bar=False, init_state=state)
    assert np.isfinite(result.losses).all()

    @jax.jit
    def said(params):
        draws = guide.sample_posterior(jax.random.key(1), params, X[:7], sample_shape=(4, 2))
        quantiles = guide.quantiles(params, [0.1, 0.5, 0.9], X[:7])
        return draws, quantiles, guide.median(params, X[:7])

    draws, quantiles, medians = said(result.params)
    model = handlers.substitute(handlers.seed(model, 0), data=medians)
    trace = handlers.trace(model).get_trace(X[:7])
    for site_name, draw in draws.items():
        site = trace[site_name]
        shape = site["value"].shape
        assert draw.shape == (4, 2, *shape)
        assert quantiles[site_name].shape == (3, *shape)
        assert medians[site_name].shape == shape
        support = site["fn"].support
        assert np.asarray(support(draw)).all()
        assert np.asarray(support(quantiles[site_name])).all()


@pytest.mark.parametrize("name", MODELS)
def test_log_density_is_that_of_the_transformed_normal(name):
    """The guide's density against the Normal's and the Jacobian by automatic differentiation."""
    model = MODELS[name]
    guide = AutoAmortizedNormal(model, SMALL, plate="data")

    @jax.jit
    def both(rng_key):
        trace = handlers.trace(handlers.seed(guide, 0)).get_trace(X[:3])
        params = {"auto$params": trace["auto$params"]["value"]}
        encoding = guide.encode(params, X[:3])
        packed = encoding.sample(jax.random.split(rng_key, 3), 1)[0]
        values, log_det = encoding.constrain(packed)
        found = jnp.zeros(3)
        for site_name, value in values.items():
            log_prob = trace[site_name]["fn"].log_prob(value)
            axis = log_prob.ndim + guide.plate.dim
            found += log_prob.sum(tuple(i for i in range(log_prob.ndim) if i != axis))
        return found, encoding.log_prob(packed) - log_det

    np.testing.assert_allclose(*both(jax.random.key(2)), rtol=2e-3, atol=2e-3)


# -- draws that rounding has put on the bounds of a support -------------------------------------

BOUNDS = [
    (-3.0, 3.0),
    (0.0, 1.0),
    (0.0, 1e8),
    (-1e8, 0.0),
    (1e6, 1e6 + 8),
    (0.0, 1e-20),
    (7.0, 9.0),
]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_draws_on_the_bounds_of_an_interval_are_moved_inside(bounds):
    lower, upper = np.float32(bounds)
    support = constraints.interval(lower, upper)
    within = np.linspace(lower, upper, 9, dtype=np.float32)[1:-1]
    moved = inside(support, jnp.array([lower, *within, upper]))
    assert np.isfinite(biject_to(support).inv(moved)).all()
    np.testing.assert_array_equal(moved[1:-1], within)
    np.testing.assert_allclose(
        moved, [lower, *within, upper], rtol=1e-6, atol=1e-6 * (upper - lower)
    )


@pytest.mark.parametrize(
    ("support", "draws"),
    [
        (constraints.positive, [0.0, 1e-30, 1.0]),
        (constraints.greater_than(1e6), [1e6, 2e6]),
        (constraints.less_than(-1e6), [-1e6, -2e6]),
        (constraints.independent(constraints.unit_interval, 1), [0.0, 0.5, 1.0]),
        (constraints.real, [0.0, 1e30]),
    ],
    ids=str,
)
def test_draws_on_a_bound_are_moved_inside(support, draws):
    moved = inside(support, jnp.array(draws))
    assert np.isfinite(biject_to(support).inv(moved)).all()
    np.testing.assert_allclose(moved, draws, rtol=1e-6, atol=1e-30)


def test_draws_of_counts_stay():
    counts = jnp.array([0, 3])
    assert inside(constraints.nonnegative_integer, counts) is counts


def test_the_forward_kl_stands_draws_on_a_bound():
    """Of a Gamma of concentration 0.02 one draw in six is zero in float32."""

    def model(x):
        with numpyro.plate("data", len(x)):
            rate = numpyro.sample("rate", dist.Gamma(0.02, 1.0))
            numpyro.sample("x", dist.Normal(rate, 1.0), obs=x)

    assert (dist.Gamma(0.02, 1.0).sample(jax.random.key(0), (1000,)) == 0).mean() > 0.1
    svi = SVI(model, AutoAmortizedFlow(model, SMALL), optax.adam(1e-3), ForwardKL())
    found = fit(
        svi,
        jax.random.key(0),
        Simulations(512, like=X),
        num_epochs=3,
        validation=X,
        progress_bar=False,
    )
    assert np.isfinite(found.losses).all()
    assert np.isfinite(found.history["validation_loss"]).all()
