"""Another model, family, scale or shape than the saved one is an error that says what differs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import linen, nnx
from numpyro import handlers
from numpyro.contrib.module import flax_module
from numpyro.infer import init_to_median
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from saved_cases import CASES, X, grouped

from numpyro_vae import (
    MLP,
    AmortizedGuide,
    AutoAmortizedFlow,
    AutoAmortizedNormal,
    Posterior,
    data_sets,
)
from numpyro_vae.families import DiagonalNormal
from numpyro_vae.saving.manifest import read_folder


class Features(nnx.Module):
    """An encoder of one's own."""

    def __init__(self, example_inputs, *, width=4, rngs):
        self.linear = nnx.Linear(example_inputs.shape[-1], width, rngs=rngs)

    def __call__(self, inputs):
        return self.linear(inputs)


def make_model(*, size=2, plate="data", site="z", high=4.0, hidden=3, family=dist.Normal):
    def model(x, *, noise=0.5):
        loc = numpyro.sample("loc", dist.Uniform(-4.0, high))
        network = flax_module("net", linen.Dense(hidden), input_shape=(1, size))
        with numpyro.plate(plate, len(x)):
            z = numpyro.sample(site, family(loc, 1.0).expand([size]).to_event(1))
            mean = network(z).sum(-1)[..., None] + jnp.zeros(3)
            numpyro.sample("x", dist.Normal(mean, noise).to_event(1), obs=x)

    return model


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "posterior"
    guide = AutoAmortizedNormal(make_model(), Features, inputs=lambda x, **_: x)
    posterior = initial(guide, X)
    posterior.static_kwargs = {"noise": 0.25}
    posterior.save(path)
    return path


def initial(guide, *args):
    """A posterior that has not been trained."""
    params = {}
    for fn in (guide, guide.model):
        trace = handlers.trace(handlers.seed(fn, 0)).get_trace(*args)
        params |= {name: msg["value"] for name, msg in trace.items() if msg["type"] == "param"}
    return Posterior(guide, params)


def identity(x, **_):
    return x


def load(path, model=None, encoder=Features, **options):
    return Posterior.load(path, model or make_model(), encoder, inputs=identity, **options)


@pytest.mark.slow
def test_the_same_is_no_error(path):
    assert load(path).static_kwargs == {"noise": 0.25}
    assert load(path).encode(X)["z"].loc.shape == (24, 2)
    again = {"scale": "log_scale", "prefix": "auto", "condition_on": [], "global_guide": AutoNormal}
    load(path, **again, static_kwargs={"noise": 0.25})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"site": "w"}, r"site 'z' is .*'local'.* in it, and missing in this model. Pass the mod"),
        ({"plate": "rows"}, r"site 'z' is .*'data'.* in it, and .*'rows'"),
        ({"size": 3}, r"site 'z' is .*'shape': \[2\].* in it, and .*'shape': \[3\]"),
        ({"high": 5.0}, r"support 'loc' is .*upper_bound=4.0.* in it, and .*upper_bound=5.0"),
        ({"family": dist.LogNormal}, r"support 'z' is .*Real.* in it, and .*Positive"),
        ({"hidden": 5}, r"parameter 'net\$params' is .*\(2, 3\).* in it, and .*\(2, 5\)"),
    ],
)
def test_another_model(path, options, named):
    with pytest.raises(ValueError, match=f"{path} does not fit: {named}"):
        load(path, make_model(**options))


def test_a_model_of_other_arguments(path):
    with pytest.raises(ValueError, match=r"does not run with the arguments .*\(24, 3\).*missing"):
        load(path, lambda x, y, *, noise: make_model()(x))


def test_another_encoder(path):
    wide = partial(Features, width=5)
    with pytest.raises(ValueError, match=r"does not fit this encoder.*shape \(4, 2\).*\(5, 2\)"):
        load(path, encoder=wide)
    with pytest.raises(ValueError, match=r"does not fit this encoder"):
        load(path, encoder=MLP)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": "log_variance"}, r"scale=.*LogScale.*, and now it is .*LogVariance"),
        ({"prefix": "other"}, r"prefix=auto, and now it is other. Leave it out"),
        ({"global_guide": AutoDelta}, r"global_guide=.*AutoNormal.*now it is .*AutoDelta"),
        ({"condition_on": ["loc"]}, r"condition_on=.*now it is .*loc"),
        ({"static_kwargs": {"noise": 0.5}}, r"noise=0.25, and now it is 0.5"),
    ],
)
def test_other_options(path, options, named):
    with pytest.raises(ValueError, match=named):
        load(path, **options)


def test_options_that_do_not_exist(path):
    with pytest.raises(TypeError, match=r"no options of the guide \['rank'\], only .*'scale'"):
        load(path, rank=2)
    with pytest.raises(TypeError, match=r"no static keyword arguments \['beta'\], only \['noise'"):
        load(path, static_kwargs={"beta": 2})


def test_what_is_to_be_passed_again_is_named(path, tmp_path):
    missing = r"holds no code.*encoder= \(test_differences.Features\), inputs= \(.*<lambda>\)"
    with pytest.raises(TypeError, match=missing):
        Posterior.load(path, make_model())
    posterior = load(path)
    posterior.static_kwargs = {"noise": jnp.ones(3)}
    posterior.save(tmp_path / "saved")
    with pytest.raises(TypeError, match=r"static keyword arguments .*noise= \(an object of type"):
        load(tmp_path / "saved")
    load(tmp_path / "saved", static_kwargs={"noise": jnp.ones(3)})


def test_what_a_model_of_data_sets_brings_is_not_to_be_passed_again(tmp_path):
    def one_set(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("row", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    posterior = initial(AutoAmortizedNormal(data_sets(one_set)), y)
    posterior.save(tmp_path / "saved")
    loaded = Posterior.load(tmp_path / "saved", data_sets(one_set))
    found, known = (p.sample(jax.random.key(1), y, 3)["mu"] for p in (loaded, posterior))
    np.testing.assert_array_equal(found, known)


def test_a_family_of_ones_own_is_passed_again(tmp_path):
    class Own(DiagonalNormal):
        pass

    initial(AmortizedGuide(make_model(), family=Own()), X).save(tmp_path / "saved")
    with pytest.raises(TypeError, match=r"family= \(an object of type test_differences.*Own"):
        Posterior.load(tmp_path / "saved", make_model())
    loaded = Posterior.load(tmp_path / "saved", make_model(), family=Own())
    assert isinstance(loaded.guide.family, Own)


@pytest.mark.slow
def test_options_of_a_family_are_compared(tmp_path):
    start = partial(AutoNormal, init_loc_fn=init_to_median)
    guide = AutoAmortizedFlow(make_model(), hidden_sizes=(4,), global_guide=start)
    initial(guide, X).save(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"num_layers=4, and now it is 3"):
        Posterior.load(tmp_path / "saved", make_model(), num_layers=3)


# Models that are read on data alone


@pytest.mark.parametrize(
    ("other", "named"), [("data", "'observed'"), ("w", "site 'z' is .* in it, and missing")]
)
def test_a_model_that_asks_for_values_is_compared_at_the_first_call(tmp_path, other, named):
    case = CASES["values"]
    guide = case.make(case.model)
    params = initial(guide, *case.data).params
    Posterior(guide, params, batch_axes=None).save(tmp_path / "saved")
    assert read_folder(tmp_path / "saved")[0]["model"]["arguments"] is None
    loaded = Posterior.load(tmp_path / "saved", grouped, **case.again)
    assert loaded.encode(case.data)["z"].loc.shape == (4,)

    def another(x, group):
        with numpyro.plate("group", len(np.unique(group))):
            z = numpyro.sample("w" if other == "w" else "z", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Normal(z[group], 0.5), obs=x[:, 0])

    loaded = Posterior.load(tmp_path / "saved", another, **case.again)
    with pytest.raises(ValueError, match=f"does not fit: .*{named}"):
        loaded.encode(case.data)


# What cannot be saved


def test_a_guide_that_has_not_read_its_model(tmp_path):
    guide = AutoAmortizedNormal(make_model())
    with pytest.raises(ValueError, match=r"has not read its model yet.*posterior.encode\(data\)"):
        Posterior(guide, {}).save(tmp_path / "saved")


def test_a_guide_of_a_class_of_ones_own(tmp_path):
    class Own(AutoAmortizedNormal):
        pass

    with pytest.raises(TypeError, match=r"class test_differences.*Own, which is not one of .*'Am"):
        initial(Own(make_model()), X).save(tmp_path / "saved")


def test_a_parameter_of_another_kind(tmp_path):
    posterior = initial(AutoAmortizedNormal(make_model()), X)
    posterior.params["net$params"] = nnx.State({"a": jnp.ones(3)})
    with pytest.raises(TypeError, match=r"net\$params is an object of type .*State.*dicts, lists"):
        posterior.save(tmp_path / "saved")


def test_bounds_of_global_sites_that_are_made_of_data(tmp_path):
    def model(x):
        loc = numpyro.sample("loc", dist.Uniform(x.min(), x.max()))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(loc, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"global sites, among \['loc'\], depend on the data"):
        initial(AutoAmortizedNormal(model), X[:, 0]).save(tmp_path / "saved")


def test_data_without_observations_may_come_first(tmp_path):
    """As the model is read when it is loaded, and not when it is called."""

    def model(x, t):
        with numpyro.plate("data", len(t)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z[:, None] + t, 1.0).to_event(1), obs=x)

    posterior = initial(AutoAmortizedNormal(model), X, X)
    posterior.save(tmp_path / "saved")
    loaded = Posterior.load(tmp_path / "saved", model)
    with pytest.raises(ValueError, match=r"shape \(3,\), that of one datum"):
        loaded.encode((X[0], X[0]))
    assert loaded.predict(jax.random.key(1), (None, X), 2)["x"].shape == (2, 24, 3)
    expected = posterior.sample(jax.random.key(1), (X, X), 2)["z"]
    np.testing.assert_array_equal(loaded.sample(jax.random.key(1), (X, X), 2)["z"], expected)
