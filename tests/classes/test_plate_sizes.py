"""How many rows a plate has is what the data say, whatever number the model wrote into it."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import Trace_ELBO

from numpyro_vae import Importance, Posterior, fit

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0, 1.1, (60, 2)).astype(np.float32)


def model_of(plate):
    def model(x):
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with plate(x) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            loc = (z + b)[:, None]
            numpyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x[rows])

    return model


PLATES = {
    "constant": lambda x: numpyro.plate("data", 64),
    "of all rows": lambda x: numpyro.plate("data", 60),
    "of all rows, some of which are given": lambda x: numpyro.plate(
        "data", 60, subsample_size=len(x)
    ),
    "that subsamples": lambda x: numpyro.plate("data", len(x), subsample_size=16),
    "that subsamples another number": lambda x: numpyro.plate("data", len(x), subsample_size=9),
}
BATCHES = {
    "array": (X, {"batch_size": 16}),
    "iterable": ([X[:16], X[16:32], X[32:48], X[48:]], {"num_data": 60}),
}


def run(plate, batches):
    data, options = BATCHES[batches]
    svi = make_svi(model_of(plate), loss=Trace_ELBO())
    result = fit(svi, KEY, data, num_epochs=2, validation=X[:20], progress_bar=False, **options)
    posterior = Posterior(svi.guide, result)
    return result, posterior.log_weights(KEY, X[:20], 3), posterior.predict(KEY, X[:20], 3)["x"]


@pytest.fixture(scope="module", params=BATCHES)
def plain(request):
    return request.param, run(lambda x: numpyro.plate("data", len(x)), request.param)


@pytest.mark.slow
@pytest.mark.parametrize("case", PLATES)
def test_a_plate_of_another_size_is_that_of_the_data(case, plain):
    batches, (result, weights, predictions) = plain
    if batches == "iterable" and "subsamples" in case:
        pytest.skip("such a model takes all the data")
    found, *arrays = run(PLATES[case], batches)
    np.testing.assert_allclose(found.losses, result.losses, rtol=1e-6)
    np.testing.assert_allclose(*(r.history["validation_loss"] for r in (found, result)), rtol=1e-6)
    np.testing.assert_allclose(arrays[0], weights, rtol=1e-5)
    assert arrays[1].shape == predictions.shape
    if case in ("constant", "of all rows"):  # a plate that subsamples uses a key of its own
        np.testing.assert_allclose(arrays[1], predictions, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:subsample_size")  # or it is as if the model could not be run
def test_a_plate_that_subsamples_more_rows_than_there_are_holds_them_in_order():
    """What the model says of each row, as its factor and its bound, is that row's."""

    def model_of(**options):
        def model(x, weight):
            with (
                numpyro.plate("data", len(x), **options) as rows,
                handlers.scale(scale=weight[rows]),
            ):
                z = numpyro.sample("z", dist.Uniform(0.0, weight[rows]))
                numpyro.sample("x", dist.Normal(z[:, None], 0.5).to_event(1), obs=x[rows])

        return model

    weight = np.linspace(0.2, 1.7, len(X), dtype=np.float32)
    data = X[:20:3], weight[:20:3]
    svi, other = (make_svi(model_of(**x), loss=Trace_ELBO()) for x in ({}, {"subsample_size": 50}))
    params = svi.get_params(svi.init(KEY, X, weight))
    other.init(KEY, X, weight)
    found = []
    for guide in (svi.guide, other.guide):
        posterior = Posterior(guide, params)
        found.append((posterior.sample(KEY, data, 3)["z"], posterior.log_weights(KEY, data, 3)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_what_reads_local_latents_outside_their_plate_is_refused_in_minibatches():
    """Its density on a batch is no estimate of that on all data; on all data it is served."""

    def factor(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z[:, None], 0.5).to_event(1), obs=x)
        numpyro.factor("balance", -(z.sum() ** 2))

    svi = make_svi(factor, loss=Trace_ELBO())
    with pytest.raises(ValueError, match=r"Site 'balance' lies outside plate 'data'.*\['z'\]"):
        fit(svi, KEY, X, batch_size=20, num_epochs=1, progress_bar=False)
    assert fit(svi, KEY, X, batch_size=60, num_epochs=1, progress_bar=False).losses.size == 1


def test_what_is_broadcast_outside_the_plate_is_refused_by_name():
    """NumPyro's density of it is that of all values, and its batch has fewer."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None], 0.5), obs=x)

    with pytest.raises(ValueError, match=r"Site 'x' lies outside plate 'data'.*\['z'\]"):
        fit(
            make_svi(model, loss=Trace_ELBO()),
            KEY,
            X,
            batch_size=20,
            num_epochs=1,
            progress_bar=False,
        )


# -- parameters by row ----------------------------------------------------------------------------


def with_scales(x):
    with numpyro.plate("data", len(x)):
        scale = numpyro.param("scale", jnp.ones(len(x)), constraint=constraints.positive)
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z[:, None], scale[:, None]).to_event(1), obs=x)


def selecting_scales(x):
    with numpyro.plate("data", len(x), subsample_size=20):
        given = {"constraint": constraints.positive, "event_dim": 0}
        scale = numpyro.param("scale", jnp.ones(len(x)), **given)
        z = numpyro.sample("z", dist.Normal(0.0, 0.1))
        x = numpyro.subsample(x, event_dim=1)
        numpyro.sample("x", dist.Normal(z[:, None], scale[:, None]).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "data", "options"),
    [
        (with_scales, X, {"batch_size": 20}),
        (with_scales, [X[:20], X[20:40], X[40:]], {"num_data": 60}),
        (selecting_scales, X, {"batch_size": 20}),
    ],
)
def test_parameters_by_row_are_not_those_of_each_batch_in_turn(model, data, options):
    svi = make_svi(model, loss=Trace_ELBO())
    with pytest.raises(ValueError, match=r"parameter 'scale' has shape \(20,\).*batch_axes=None"):
        fit(svi, KEY, data, num_epochs=1, progress_bar=False, **options)


def test_parameters_by_row_of_all_rows_or_of_those_that_the_plate_selects():
    spread = np.linspace(0.3, 3.0, 60)
    x = np.random.default_rng(0).normal(0.0, spread[:, None], (60, 40)).astype(np.float32)
    for model, batch_size in [(with_scales, 60), (selecting_scales, 15)]:
        svi = make_svi(model, loss=Trace_ELBO(), optimizer=3e-2)
        options = {"batch_size": batch_size, "num_epochs": 150, "progress_bar": False}
        result = fit(svi, KEY, x, **options)
        scale = result.params["scale"]
        assert scale.shape == (60,)
        assert np.corrcoef(scale, spread)[0, 1] > 0.9
        check = Posterior(svi.guide, result).check(KEY, x, Importance(200), progress_bar=False)
        assert not any("depend on each other" in finding.text for finding in check.findings)


@pytest.mark.parametrize("case", ["constant", "that subsamples"])
def test_rows_of_a_plate_that_is_told_them_are_not_said_to_depend_on_each_other(case):
    svi = make_svi(model_of(PLATES[case]), loss=Trace_ELBO())
    result = fit(svi, KEY, X, batch_size=16, num_epochs=1, progress_bar=False)
    check = Posterior(svi.guide, result).check(KEY, X, Importance(200), progress_bar=False)
    assert not any("depend on each other" in finding.text for finding in check.findings)


def test_a_weight_as_long_as_a_batch_is_none_of_its_rows():
    def model(x):
        loadings = numpyro.param("loadings", jnp.ones((20, 2)))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
            numpyro.sample("x", dist.Normal(z @ loadings, 0.5).to_event(1), obs=x)

    svi = make_svi(model, loss=Trace_ELBO())
    assert fit(svi, KEY, X, batch_size=20, num_epochs=1, progress_bar=False).losses.size == 3


@pytest.mark.slow
def test_a_plate_inside_a_subsampling_plate_subsamples_too():
    """Both plates weigh, in model and guide alike, and all rows of both count afterwards."""

    def model(x):
        n, k = x.shape
        with numpyro.plate("data", n, subsample_size=10, dim=-2) as rows:
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            with numpyro.plate("items", k, subsample_size=2, dim=-1) as items:
                w = numpyro.sample("w", dist.Normal(0.0, 1.0))
                observed = x[rows][:, items]
                numpyro.sample("x", dist.Normal(z + w, 0.5), obs=observed)

    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    svi = make_svi(model, loss=Trace_ELBO(), plate="data", inputs=lambda x: x)
    key = jax.random.key(3)
    trace = handlers.trace(handlers.seed(svi.guide, key)).get_trace(x)
    assert trace["z"]["scale"] == 3.0
    assert trace["w"]["scale"] == 6.0
    replayed = handlers.replay(handlers.seed(model, key), trace)
    of_model = handlers.trace(replayed).get_trace(x)
    assert of_model["w"]["scale"] == of_model["x"]["scale"] == 6.0


@pytest.mark.slow
def test_a_model_may_ask_for_the_values_of_what_is_not_cut_into_rows():
    """`np.unique` of labels says how many groups there are, in compiled code too."""

    def model(x, group):
        with numpyro.plate("groups", len(np.unique(group))):
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.deterministic("twice", 2 * z)
            numpyro.sample("x", dist.Normal((z + b.sum())[:, None], 0.5).to_event(1), obs=x)

    data = (X, np.array([3, 1, 1, 2]))
    svi = make_svi(model, loss=Trace_ELBO(), plate="data")
    options = {"batch_axes": (0, None), "batch_size": 20, "progress_bar": False}
    result = fit(svi, KEY, data, num_epochs=1, **options)
    assert result.params["b_auto_loc"].shape == (3,)
    posterior = Posterior(svi.guide, result)
    assert np.isfinite(posterior.log_weights(KEY, data, 3)).all()
    twice = posterior.predict(KEY, data, 3, var_names=["twice"])["twice"]
    np.testing.assert_allclose(twice, 2 * posterior.sample(KEY, data, 3)["z"], rtol=1e-6)


def test_a_model_with_several_plates_is_not_told_which_is_the_local_one():
    def model(x):
        with numpyro.plate("groups", 3):
            b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal((z + b.sum())[:, None], 0.5).to_event(1), obs=x)

    with pytest.raises(ValueError, match="Several plates hold latent sites"):
        fit(make_svi(model, loss=Trace_ELBO()), KEY, X, num_epochs=1, progress_bar=False)


@pytest.mark.slow
def test_a_global_site_after_the_local_ones_is_trained_by_any_svi():
    """What the guide asks of its handlers leaves no trace, which the model would be replayed on."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal((z + b)[:, None], 0.5).to_event(1), obs=x)

    svi = make_svi(model, loss=Trace_ELBO())
    state, loss = svi.update(svi.init(KEY, X), X)
    assert np.isfinite(loss)
    guide = handlers.seed(svi.guide, KEY)
    trace = handlers.trace(handlers.substitute(guide, svi.get_params(state)))
    assert trace.get_trace(X)["data"]["value"].shape == (60,)
