"""Models as they are read, and what a model, an encoder or an option can get wrong."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro import handlers

from numpyro_vae import MLP, AutoAmortizedNormal
from numpyro_vae.encoders import flatten_inputs
from numpyro_vae.model.plates import minibatch
from numpyro_vae.model.reading import ModelReader
from numpyro_vae.model.sites import choose_plate

X = np.linspace(-2, 2, 12, dtype=np.float32)


def rich(x):
    """Plates at several dims, a matrix-valued site, a global, a deterministic one."""
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(x), subsample_size=4, dim=-2) as rows:
        w = numpyro.sample("w", dist.Dirichlet(jnp.ones(3)))
        with numpyro.plate("items", 5, dim=-1):
            m = numpyro.sample("m", dist.Normal(0, 1).expand([2, 2]).to_event(2))
        total = numpyro.deterministic("total", w.sum(-1) + m.sum((-1, -2)))
        numpyro.sample("x", dist.Normal(total, sigma), obs=x[rows][:, None])


def test_read():
    sites = ModelReader(rich).sites((jnp.asarray(X),), {})
    assert list(sites.sites) == ["sigma", "w", "m", "x"]
    plate = choose_plate(sites, "data")
    assert (plate.size, plate.length, plate.dim) == (12, 4, -2)
    w, m = sites.local("data")
    assert w.batch_shape == (4, 1)
    assert w.event_shape == (3,)
    assert w.unconstrained_shape == (2,)
    assert w.datum_shape(plate) == (1, 2)
    assert m.datum_shape(plate) == (5, 2, 2)
    assert m.datum_size(plate) == 20
    assert [site.name for site in sites.globals("data")] == ["sigma"]
    assert [site.name for site in sites.observed("data")] == ["x"]
    assert sites.deterministic == {"total": ("data",)}


def test_the_plate_that_subsamples_is_chosen():
    assert choose_plate(ModelReader(rich).sites((jnp.asarray(X),), {}), None).name == "data"


def test_unpack_puts_the_plate_where_the_site_has_it():
    def model(x):
        with numpyro.plate("items", 3, dim=-2), numpyro.plate("data", len(x), dim=-1):
            numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))

    sites = ModelReader(model).sites((X,), {})
    plate, site = sites.plates["data"], sites.sites["z"]
    packed = jnp.arange(5 * 12 * 6.0).reshape(5, 12, 6)
    value = site.unpack(packed, plate)
    assert value.shape == (5, 3, 12, 2)
    np.testing.assert_array_equal(value[1, :, 7], packed[1, 7].reshape(3, 2))
    np.testing.assert_array_equal(site.rows(value[0], plate), packed[0].reshape(12, 3, 2))


def test_minibatch_weights_only_its_plate():
    weights = jnp.array([3.0, 0.0, 1.0, 1.0])
    model = minibatch(rich, plate="data", num_data=24, indices=jnp.arange(4), weights=weights)
    trace = handlers.trace(handlers.seed(model, 0)).get_trace(jnp.asarray(X))
    assert trace["sigma"]["scale"] is None
    expected = 24 / 12 * 12 / 4 * weights[:, None]  # of all rows, and of those it subsamples
    np.testing.assert_allclose(trace["x"]["scale"], expected)
    np.testing.assert_allclose(trace["m"]["scale"], expected)
    np.testing.assert_array_equal(trace["data"]["value"], jnp.arange(4))


# What a user can get wrong


def normal_model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def no_plate(x):
    z = numpyro.sample("z", dist.Normal(jnp.zeros(len(x)), 1.0).to_event(1))
    numpyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def two_plates(x):
    with numpyro.plate("groups", 3):
        numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def nothing_observed(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(0, 1))


def discrete(x):
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Bernoulli(0.5))
        z = numpyro.sample("z", dist.Normal(k, 1))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def observes(shape, event_dim=0):
    """A model of observed values of a shape."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            scale = jnp.ones((3,) * event_dim)
            fn = dist.Normal(z.reshape(-1, *[1] * event_dim), scale).to_event(event_dim)
            numpyro.sample("x", fn, obs=jnp.zeros(shape))

    return model


class Returns(nnx.Module):
    def __init__(self, output):
        self.output = output

    def __call__(self, inputs):
        return self.output(len(inputs))


def pair(n, size=2):
    return jnp.zeros((n, size)), jnp.zeros((n, size))


BAD = {
    "no plate": (no_plate, {}, r"No latent site lies in a plate.*\['z'\].*numpyro.plate"),
    "two plates": (two_plates, {}, r"'groups': \['a'\], 'data': \['z'\].*plate='groups'"),
    "unknown plate": (normal_model, {"plate": "rows"}, r"named 'rows'.*\['data'\]"),
    "nothing observed": (nothing_observed, {}, "Nothing is observed in plate 'data'.*inputs="),
    "discrete": (discrete, {}, "Site 'k' in plate 'data' is discrete.*enumerate"),
    "column": (observes((12, 1)), {}, r"Site 'x' in plate 'data' observes.*\(12, 1\).*\(12,\)"),
    "several": (observes((4, 12)), {}, r"Site 'x' in plate 'data' observes.*\(4, 12\).*\(12,\)"),
    "longer": (observes((12, 4), 1), {}, r"values of shape \(12, 4\).*event \(3,\)"),
    "scale": (normal_model, {"scale": "variance"}, "log_variance"),
    "features": (
        normal_model,
        {"encoder": Returns(lambda n: jnp.zeros((n, 3, 4)))},
        r"shape \(12, 3, 4\) for site 'z' in plate 'data', which has shape \(2,\).*\(12, k\)",
    ),
    "rows": (normal_model, {"encoder": Returns(lambda n: jnp.zeros((1, 3)))}, r"returned \(1, 3\)"),
    "triple": (
        normal_model,
        {"encoder": Returns(lambda n: (*pair(n), jnp.zeros(n)))},
        "returned tuple; expected features",
    ),
    "pair": (
        normal_model,
        {"encoder": Returns(partial(pair, size=3))},
        r"loc has shape \(12, 3\).*\{'z': 2\}.*\(12, 2\)",
    ),
    "pair by site": (
        normal_model,
        {"encoder": Returns(lambda n: ({"z": jnp.zeros((n, 3))}, {"z": jnp.zeros((n, 3))}))},
        r"loc for site 'z' in plate 'data' has shape \(12, 3\); expected \(12, 2\)",
    ),
    "sites": (
        normal_model,
        {"encoder": Returns(lambda n: ({"y": jnp.zeros((n, 2))}, {"y": jnp.zeros((n, 2))}))},
        r"covers the sites \['y'\].*\['z'\]",
    ),
    "inputs": (
        normal_model,
        {"inputs": lambda x: x[:5]},
        r"shape \(5,\); plate 'data' has 12 of 12 rows",
    ),
    "scalar inputs": (normal_model, {"inputs": lambda x: 1.0}, r"shape \(\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_models_and_encoders_are_refused(case):
    model, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        handlers.seed(AutoAmortizedNormal(model, **options), 0)(jnp.asarray(X))


def test_what_is_no_encoder_is_refused():
    guide = AutoAmortizedNormal(normal_model, lambda inputs, rngs: "encoder")
    with pytest.raises(TypeError, match=r"(?s)encoder\(example_inputs.*of type str.*nnx.Module"):
        handlers.seed(guide, 0)(jnp.asarray(X))


def test_a_call_without_data_after_set_up():
    def model(x=None, size=12):
        with numpyro.plate("data", size):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoAmortizedNormal(model)
    handlers.seed(guide, 0)(jnp.asarray(X))
    with pytest.raises(ValueError, match="Nothing is observed in plate 'data'"):
        handlers.seed(guide, 0)(None)


def test_mlp_options():
    with pytest.raises(ValueError, match=r"hidden_sizes must be sizes of at least 1, found \(\)"):
        MLP(X, hidden_sizes=(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="data along the leading axis"):
        flatten_inputs(jnp.zeros(()))


@pytest.mark.parametrize("dtype", [np.uint8, bool, np.float16, np.float32])
def test_mlp_reads_any_dtype_and_several_inputs(dtype):
    inputs = {"a": jnp.ones((3, 2), dtype), "b": jnp.ones((3, 2, 2), dtype)}
    encoder = MLP(inputs, hidden_sizes=(4,), rngs=nnx.Rngs(0))
    features = encoder(inputs)
    assert features.shape == (3, 4)
    assert jnp.issubdtype(features.dtype, jnp.floating)
    grads = jax.grad(lambda kernel: (flatten_inputs(inputs) @ kernel).sum())(jnp.ones((6, 4)))
    np.testing.assert_allclose(grads, 3.0)
