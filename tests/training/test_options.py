"""What does not fit ends in one sentence that says what to do; what NumPyro serves is served."""

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import SMALL, make_svi
from models import hierarchical_model, normal_model
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

from numpyro_vae import MLP, AutoAmortizedNormal, Posterior, fit

X = np.random.default_rng(0).normal(size=40).astype(np.float32)
KEY = jax.random.key(0)
quick: Any = partial(fit, num_epochs=1, progress_bar=False)


@pytest.fixture
def as_for_users(monkeypatch):
    """Without the types of arguments being checked at run time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def vector_model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mean = z @ jnp.ones((2, 3))
        numpyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


# -- the SVI, the key, where to start --------------------------------------------------------------


@pytest.mark.parametrize(
    ("svi", "message"),
    [
        (AutoAmortizedNormal(normal_model), r"of type AutoAmortizedNormal.*Pass SVI\(model"),
        ((AutoAmortizedNormal, Trace_ELBO()), r"guide of the SVI is the class AutoAmortizedNormal"),
        ((AutoNormal, Trace_ELBO()), r"the class AutoNormal.*Give the SVI AutoNormal\(model\)"),
        ((AutoNormal(normal_model), Trace_ELBO), r"objective of the SVI is.*Trace_ELBO\(\)"),
    ],
)
@pytest.mark.usefixtures("as_for_users")
def test_a_class_for_an_object_is_refused(svi, message):
    if isinstance(svi, tuple):
        guide, loss = svi
        svi = SVI(normal_model, guide, optax.adam(1e-2), loss)
    with pytest.raises(TypeError, match=message):
        quick(svi, KEY, X)


@pytest.mark.parametrize(
    ("key", "data", "message"),
    [
        (X, KEY, r"rng_key is an array of shape \(40,\) and type float32.*before the data"),
        (0, X, r"rng_key is the int 0.*jax.random.key\(0\)"),
        (jax.random.split(KEY), X, r"rng_key is an array of shape \(2,\) and type key"),
    ],
)
@pytest.mark.usefixtures("as_for_users")
def test_what_is_no_key_is_refused(key, data, message):
    with pytest.raises(TypeError, match=message):
        quick(make_svi(normal_model), key, data)


def test_old_keys_are_keys():
    assert np.isfinite(quick(make_svi(normal_model), jax.random.PRNGKey(0), X).losses).all()


@pytest.mark.slow
@pytest.mark.usefixtures("as_for_users")
def test_init_state_is_a_state_of_this_svi():
    svi, other = make_svi(normal_model), make_svi(hierarchical_model)
    result, of_other = quick(svi, KEY, X), quick(other, KEY, X)
    with pytest.raises(TypeError, match=r"of type FitResult.*Pass result\.state"):
        quick(svi, KEY, X, init_state=result)
    with pytest.raises(TypeError, match=r"of type dict.*init_params="):
        quick(svi, KEY, X, init_state=result.params)
    with pytest.raises(ValueError, match=r"\['mu_auto_loc'\] is \(\) in it, and missing in model"):
        quick(svi, KEY, X, init_state=of_other.state)
    wide = make_svi(normal_model, partial(MLP, hidden_sizes=(7,)))
    with pytest.raises(ValueError, match=r"'kernel'\] is \(8, 1\) in it, and \(7, 1\) in model"):
        quick(wide, KEY, X, init_state=result.state)
    sgd = make_svi(normal_model, optimizer=optax.sgd(1e-2))
    with pytest.raises(ValueError, match="belongs to another optimizer"):
        quick(sgd, KEY, X, init_state=result.state)


def test_a_state_goes_on_under_another_kind_of_key_and_in_a_fresh_svi():
    state = quick(make_svi(normal_model), jax.random.PRNGKey(0), X).state
    again = quick(make_svi(normal_model), KEY, X, init_state=jax.tree.map(np.asarray, state))
    assert np.isfinite(again.losses).all()


def test_initial_values_of_unknown_parameters_are_refused():
    svi = make_svi(hierarchical_model)
    with pytest.raises(ValueError, match=r"init_params= names \['nu'\].*'auto\$params', 'mu_auto_"):
        quick(svi, KEY, X, init_params={"nu": 1.0, "mu_auto_loc": 3.0})
    result = quick(svi, KEY, X, init_params={"mu_auto_loc": 3.0})
    assert result.params["mu_auto_loc"] == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5, .*a whole number"),
        ({"num_epochs": 2.5}, "num_epochs is 2.5"),
        ({"data": [X], "num_data": 0}, "num_data is 0, expected at least 1"),
        ({"data": X.tolist()}, "Data themselves are an array, not a list"),
    ],
)
@pytest.mark.usefixtures("as_for_users")
def test_numbers_that_count_nothing_are_refused(options, message):
    data = options.pop("data", X) if "data" in options else X
    with pytest.raises(ValueError, match=message):
        quick(make_svi(normal_model), KEY, data, **options)


# -- iterables ------------------------------------------------------------------------------------


def test_a_generator_is_passed_over_once_and_completely():
    halves = [X[:20], X[20:]]
    svi = make_svi(normal_model)
    expected = quick(svi, KEY, halves, num_data=40)
    for once in ((half for half in halves), iter(halves), map(jnp.asarray, halves)):
        found = quick(svi, KEY, once, num_data=40)
        np.testing.assert_array_equal(found.losses, expected.losses)
    with pytest.raises(ValueError, match=r"data is a generator.*only once, and num_epochs is 2"):
        quick(svi, KEY, (half for half in halves), num_data=40, num_epochs=2)


@pytest.mark.slow
def test_the_rows_of_an_epoch_are_compared_with_their_number():
    svi, halves = make_svi(normal_model), [X[:20], X[20:]]
    with pytest.raises(ValueError, match="yielded 40 rows in an epoch, and num_data is 30"):
        quick(svi, KEY, halves, num_data=30)
    with pytest.warns(UserWarning, match=r"40 rows.*num_data is 400.*each row counts for 10"):
        quick(svi, KEY, halves, num_data=400, num_epochs=2)
    quick(svi, KEY, halves, num_data=45)  # the last batch may be dropped


# -- what the data are ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [X.astype(object), np.array(["a"] * 40), np.arange(40).astype("datetime64[D]")]
)
def test_what_are_no_numbers_is_refused(data):
    with pytest.raises(TypeError, match=rf"data has values of type {data.dtype.str[1]}?.*Convert"):
        quick(make_svi(normal_model), KEY, data)


@pytest.mark.slow
def test_whole_numbers_that_the_device_cannot_hold_are_refused():
    x = np.arange(40)
    assert np.isfinite(quick(make_svi(normal_model), KEY, x).losses).all()
    x[7] = 2**40
    with pytest.raises(
        ValueError, match=r"int64 and has 1 values beyond.*int32, the first in row 7"
    ):
        quick(make_svi(normal_model), KEY, x)


@pytest.mark.usefixtures("as_for_users")
def test_posteriors_say_what_they_are_given():
    svi = make_svi(vector_model)
    x = np.stack([X, X, X], axis=1)
    result = quick(svi, KEY, x)
    posterior = Posterior(svi.guide, result)
    with pytest.raises(ValueError, match=r"shape \(3,\), that of one datum.*x\[None\]"):
        posterior.encode(x[0])
    assert posterior.encode(x[0][None])["z"].loc.shape == (1, 2)
    with pytest.raises(ValueError, match=r"data is a random key. Pass the key first"):
        posterior.sample(x, KEY, 2)
    with pytest.raises(TypeError, match=r"rng_key is an array of shape \(40, 3\)"):
        posterior.sample(x, x, 2)
    with pytest.raises(TypeError, match="the class AutoAmortizedNormal, expected"):
        Posterior(AutoAmortizedNormal, result)
    with pytest.raises(TypeError, match=r"is FitResult, expected.*before its parameters"):
        Posterior(result, svi.guide)
    with pytest.raises(TypeError, match=r"parameters are of type SVIState.*Pass result"):
        Posterior(svi.guide, result.state)


@pytest.mark.slow
def test_data_whose_squares_overflow_are_blamed_for_it():
    svi = make_svi(normal_model, loss=Trace_ELBO(), inputs=lambda x: x / 1e20)
    with pytest.raises(FloatingPointError, match=r"as large as .e\+20.*standardize the data"):
        quick(svi, KEY, X * 1e20)


# -- supports -------------------------------------------------------------------------------------

COUNTS = np.arange(40.0) % 3


def observing(make):
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", make(z), obs=x)

    return model


OUTSIDE = {
    "gray pixels": (
        lambda z: dist.Bernoulli(logits=z[:, None].repeat(2, 1)).to_event(1),
        np.full((40, 2), 0.5, np.float32),
        r"'x'.*BernoulliLogits in 40 rows of plate 'data', the first of them row 0: expected 0 or 1"
        r".*Binarize",
    ),
    "fractions": (
        lambda z: dist.Poisson(jnp.exp(z)),
        np.where(np.arange(40) > 36, 0.5, COUNTS),
        r"support of its Poisson in 3 rows.*row 37: expected whole numbers from 0",
    ),
    "negative": (lambda z: dist.Exponential(jnp.exp(z)), X, "Exponential.*numbers above 0"),
    "beyond a total": (
        lambda z: dist.Binomial(2, logits=z),
        np.where(np.arange(40) == 5, 3, COUNTS),
        "BinomialLogits in 1 rows.*row 5.*within bounds",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OUTSIDE)
@pytest.mark.parametrize("form", ["rows", "subsampled", "iterable"])
def test_values_of_no_density_are_named_before_training(case, form):
    make, x, message = OUTSIDE[case]
    model, data, options = observing(make), x, {"batch_size": 16}
    if form == "subsampled":

        def model(x):
            with numpyro.plate("data", len(x), subsample_size=16) as rows:
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
                numpyro.sample("x", make(z), obs=x[rows])

    if form == "iterable":
        data, options = [x], {"num_data": 40}
    with pytest.raises(ValueError, match=message):
        quick(make_svi(model), KEY, data, **options)
    values = {"z": np.zeros(16 if form == "subsampled" else 40)}
    trained = handlers.seed(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPyro's own, of the same values
        everywhere = log_density(trained, (x,), {}, values)[0]
    assert form == "subsampled" or everywhere == -np.inf


SERVED = {
    "counts as floats": (lambda z: dist.Poisson(jnp.exp(z)), COUNTS),
    "booleans": (lambda z: dist.Bernoulli(logits=z), X > 0),
    "gray, with a density of its own": (
        lambda z: dist.Bernoulli(logits=z, validate_args=False),
        np.full(40, 0.5),
    ),
    "fillers under a mask": (
        lambda z: dist.Bernoulli(logits=jnp.stack([z, z], 1)).mask(MASK[: len(z)]).to_event(1),
        np.where(np.arange(80).reshape(40, 2) % 2, -1.0, 1.0),
    ),
}
MASK = np.arange(80).reshape(40, 2) % 2 == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", SERVED)
def test_what_numpyro_gives_a_density_is_served(case):
    make, x = SERVED[case]
    assert np.isfinite(quick(make_svi(observing(make)), KEY, x).losses).all()


@pytest.mark.slow
def test_totals_that_are_data_are_bounds_and_those_that_are_latent_are_not():
    def by_total(x, total):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Binomial(total, logits=z), obs=x)

    x, total = COUNTS, np.where(np.arange(40) == 8, 1, 3)
    with pytest.raises(ValueError, match=r"BinomialLogits in 1 rows.*row 8"):
        quick(make_svi(by_total), KEY, (x, total))
    quick(make_svi(by_total), KEY, (x, total + 1))

    def latent_bound(x):
        top = numpyro.sample("top", dist.LogNormal(5.0, 0.1))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Uniform(0.0, top + 0 * z), obs=x)

    svi = make_svi(latent_bound)
    quick(svi, KEY, np.where(X > 0, 20.0, 150.0), init_params={"top_auto_loc": 6.0})


# -- guides ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_for_users")
def test_a_guide_of_global_sites_is_made_and_not_given():
    for given in (AutoNormal(hierarchical_model), "AutoNormal"):
        with pytest.raises(
            TypeError, match=r"global_guide= is an object of type.*AutoNormal itself"
        ):
            AutoAmortizedNormal(hierarchical_model, global_guide=given)


def test_two_networks_with_the_same_names_are_refused():
    def model(x):
        with numpyro.plate("first", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        with numpyro.plate("second", len(x)):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(w, 0.5), obs=x)

    second = partial(AutoAmortizedNormal, encoder=SMALL, plate="second")
    run = partial(quick, rng_key=KEY, data=X, batch_axes=None)
    with pytest.raises(ValueError, match=r"plate 'first'.*prefix 'auto'.*prefix='second'"):
        run(make_svi(model, plate="first", global_guide=second))
    other = partial(second, prefix="second")
    result = run(make_svi(model, plate="first", global_guide=other))
    assert {"auto$params", "second$params"} <= set(result.params)
