"""What users get wrong ends in an error that says what was found, what was expected, what to do."""

import re
from functools import partial

import jax
import jaxtyping
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.contrib.funsor import config_enumerate
from numpyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO

from numpyro_vae import AutoAmortizedNormal, Posterior, amortize, data_sets, fit

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)


def model(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        y = numpyro.sample("y", dist.Normal(z, 1.0))
        numpyro.sample("x", dist.Normal(y[:, None], 0.5).expand([len(x), 2]).to_event(1), obs=x)


def counted(x):
    with numpyro.plate("data", len(x)):
        k = numpyro.sample("k", dist.Poisson(3.0), infer={"enumerate": "parallel"})
        z = numpyro.sample("z", dist.Normal(k, 1.0))
        numpyro.sample("x", dist.Normal(z[..., None], 1.0).to_event(1), obs=x)


def train(fn, data=X, guide=None, loss=None, **options):
    guide = guide or AutoAmortizedNormal(fn)
    svi = SVI(fn, guide, optax.adam(1e-2), loss or Trace_ELBO())
    options = {"num_epochs": 1, "progress_bar": False} | options
    return Posterior(guide, fit(svi, KEY, data, **options))


@pytest.fixture
def as_for_users(monkeypatch):
    """Leave it to the library to look at types."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def posterior():
    return train(model)


def test_a_number_of_draws_that_is_no_int_leaves_no_trace(as_for_users, posterior):
    with pytest.raises(ValueError, match=r"num_samples is 7\.0, expected at least 1, and an int"):
        posterior.sample(KEY, X, 7.0)
    assert posterior.sample(KEY, X, np.int64(7))["z"].shape == (7, 30)
    with pytest.raises(ValueError, match=r"num_samples is '7', expected at least 1, and an int"):
        posterior.repair(KEY, X, [0], num_samples="7")


@pytest.mark.parametrize("number", [0, 5.0])
def test_a_number_of_particles_that_is_no_int_leaves_no_trace(as_for_users, posterior, number):
    text = f"num_particles is {number}, expected at least 1"
    with pytest.raises(ValueError, match=re.escape(text)):
        posterior.log_evidence(KEY, X, 2, num_particles=number)
    with pytest.raises(ValueError, match=re.escape(text)):
        posterior.to_datatree(KEY, X, 2, num_particles=number)
    assert posterior.log_evidence(KEY, X, 2, num_particles=5).shape == (2, 30)


def test_numbers_in_a_list_are_no_data(posterior):
    for data in ([0.5, 1.0], X.tolist()):
        with pytest.raises(ValueError, match=r"is .* of type float, where an array.*np\.asarray"):
            posterior.sample(KEY, data, 3)


@pytest.mark.parametrize("batch_axes", [(0, 0), {"x": 0}, "0"])
def test_batch_axes_of_another_form_than_the_data(as_for_users, batch_axes):
    with pytest.raises(ValueError, match=r"batch_axes is .* not fit data .*'data\[0\]'"):
        train(model, (X,), batch_axes=batch_axes)


def test_names_of_rows_are_no_numbers(posterior):
    for rows in (["a", "b"], None):
        with pytest.raises(ValueError, match=r"rows has values of type .*get_indexer"):
            posterior.repair(KEY, X, rows)


def test_parameters_without_those_of_the_global_sites(posterior):
    local = {"auto$params": posterior.params["auto$params"]}
    untrained = Posterior(AutoAmortizedNormal(model), local)
    with pytest.raises(ValueError, match=r"global sites \['mu'\] have no 'mu_auto_loc'.*auto\$p"):
        untrained.sample(KEY, X, 3)


def test_a_site_of_infinitely_many_values_cannot_be_enumerated():
    with pytest.raises(
        ValueError, match=r"'k' in the plates \['data'\].*its distribution has no finite"
    ):
        train(counted, loss=TraceEnum_ELBO())


def test_what_is_no_function_is_refused_where_it_is_given(as_for_users):
    with pytest.raises(TypeError, match=r"inputs is of type ndarray, expected a function"):
        AutoAmortizedNormal(model, inputs=X)
    for wrong in (X, AutoAmortizedNormal(model)):
        with pytest.raises(TypeError, match=r"The model is of type .*expected a function"):
            AutoAmortizedNormal(wrong)


def test_one_name_may_be_given_alone(as_for_users):
    guide = AutoAmortizedNormal(model, condition_on="mu", dependencies={"y": "z"})
    assert (guide.condition_on, guide.dependencies) == (("mu",), {"y": ("z",)})


def wider(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 2.0))
        numpyro.sample("x", dist.Normal(z[:, None], 0.5).expand([len(x), 2]).to_event(1), obs=x)


def narrower(x, scale=1.0):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, scale))
        numpyro.sample("x", dist.Normal(z[:, None], 0.5).expand([len(x), 2]).to_event(1), obs=x)


def test_a_guide_of_another_model_is_said():
    with pytest.warns(UserWarning, match="another one than the guide was made for"):
        train(wider, guide=AutoAmortizedNormal(narrower))


def test_a_model_made_twice_is_no_other_one(recwarn):
    makes = [partial(narrower, scale=2.0) for _ in range(2)]
    train(makes[0], guide=AutoAmortizedNormal(makes[1]))
    train(config_enumerate(narrower), guide=AutoAmortizedNormal(narrower))
    assert not [found for found in recwarn if "guide was made for" in str(found.message)]


WHOLE = np.arange(30) % 3


def categories(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        logits = z[:, None] * np.arange(3.0, dtype=np.float32)
        numpyro.sample("x", dist.Categorical(logits=logits), obs=x)


def indexed(x, group):
    level = numpyro.sample("level", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(level[group], 1.0))
        numpyro.sample("x", dist.Poisson(jax.numpy.exp(z)), obs=x)


class LooksUp(nnx.Module):
    def __init__(self, datum_shape, *, rngs):
        self.table = nnx.Embed(3, 4, rngs=rngs)
        self.num_features = 4

    def __call__(self, x):
        return self.table(x)


def counts(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Binomial(2, logits=z), obs=x)


WHERE = {
    "'x'": (categories, {}, ["x"]),
    "'group'": (indexed, {}, ["x", "group"]),
    "0": (counts, {"guide": AutoAmortizedNormal(counts, LooksUp)}, None),
}


@pytest.mark.parametrize("argument", WHERE)
def test_floats_that_look_something_up_are_named(argument):
    fn, options, names = WHERE[argument]
    whole = WHOLE if names is None else dict.fromkeys(names, WHOLE)
    floats = jax.tree.map(lambda x: x.astype(np.float32), whole)
    text = rf"needs whole numbers.* where argument {argument} has values of type float32: pass int"
    with pytest.raises(TypeError, match=text):
        train(fn, floats, **options)
    trained = train(fn, whole, **options)
    with pytest.raises(TypeError, match=text):
        trained.log_weights(KEY, floats, 2)


def test_counts_as_floats_are_served():
    assert train(counts, WHOLE.astype(np.float32)).log_weights(KEY, WHOLE, 2).shape == (2, 30)


def test_values_under_a_mask_are_no_numbers(posterior):
    masked = np.ma.masked_array(X, mask=np.arange(30)[:, None] == [3, 4])
    for call in (partial(posterior.sample, KEY, masked, 3), partial(train, model, masked)):
        with pytest.raises(ValueError, match=r"masked array, and the 2 values.*filled\(np\.nan\)"):
            call()
    np.testing.assert_array_equal(
        posterior.sample(KEY, np.ma.masked_array(X), 3)["z"], posterior.sample(KEY, X, 3)["z"]
    )


TRACED = {
    "jit": lambda call: jax.jit(lambda x: call(KEY, x, 3))(X),
    "grad": lambda call: jax.grad(lambda x: call(KEY, x, 3).sum())(X),
    "vmap": lambda call: jax.vmap(lambda key: call(key, X, 3))(jax.random.split(KEY, 2)),
}


@pytest.mark.parametrize("transform", TRACED)
def test_methods_inside_of_what_jax_transforms(as_for_users, posterior, transform):
    for call in (posterior.sample, posterior.log_weights):
        with pytest.raises(TypeError, match=r"(data|rng_key) is traced by .*outside of such"):
            TRACED[transform](call)


def test_one_site_may_be_named_alone(posterior):
    assert set(posterior.sample(KEY, X, 2, var_names="mu")) == {"mu"}
    assert set(posterior.predict(KEY, X, 2, var_names="x")) == {"x"}
    assert set(posterior.to_datatree(KEY, X, 2, var_names="mu")["posterior"].data_vars) == {"mu"}
    with pytest.raises(ValueError, match=r"no sites \['nu'\] here"):
        posterior.sample(KEY, X, 2, var_names="nu")


def test_a_learning_rate_is_no_optimizer():
    with pytest.raises(TypeError, match=r"optimizer is 0\.001.*Pass optax\.adam"):
        amortize(model, KEY, X, optimizer=1e-3)


def test_a_number_is_no_key():
    with pytest.raises(TypeError, match=r"rng_key is the int 0, .*Pass jax\.random\.key\(0\)"):
        amortize(model, 0, X)


def test_the_folder_of_a_posterior_stands_before_its_model():
    with pytest.raises(TypeError, match=r"path is 'model'.*Posterior\.load\(path, model\)"):
        Posterior.load(model, "folder")


def test_an_encoder_reads_no_complex_values():
    def spectrum(c):
        with numpyro.plate("data", len(c)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=abs(c))

    data = np.exp(1j * X[:, 0]).astype(np.complex64)
    guide = AutoAmortizedNormal(spectrum, inputs=lambda c: c)
    with pytest.raises(TypeError, match=r"complex values.*x\.real, x\.imag"):
        train(spectrum, data, guide)
    train(spectrum, data)  # which the model may have


def test_one_data_set_is_no_array_of_many():
    def of_one(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(TypeError, match="unsized") as raised:
        data_sets(of_one)(X[:, 0])
    assert any("Data of one data set are x[None]" in x for x in raised.value.__notes__)
