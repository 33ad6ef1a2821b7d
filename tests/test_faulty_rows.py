"""New rows with impossible data: they are told, by site, support and row, and cost no other row."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density

from numpyro_vae import AutoAmortizedNormal, Posterior
from numpyro_vae.checks import Importance, open_report
from numpyro_vae.inference import regions
from numpyro_vae.repair import methods
from tests.helpers import SMALL

KEY = jax.random.key(0)
SIZE, BAD = 12, 3
COUNTS = np.arange(SIZE).astype(np.float32) % 4
EXPOSURE = np.linspace(0.55, 3.05, SIZE, dtype=np.float32)
FEW = Importance(num_samples=200)
OUTSIDE = r"site 'x' has values outside the support of its Poisson in 1 of 12 rows of plate 'data' "
ROW = r"\(rows \[3\]; found 0.5\): expected whole numbers from 0 on"


def poisson(x, exposure):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Poisson(exposure * jnp.exp(z)), obs=x)


def posterior_of(model, *data, batch_axes=0, **options):
    """A posterior of the parameters that a guide starts with."""
    guide = AutoAmortizedNormal(model, SMALL, **options)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(*data)
    params = {name: site["value"] for name, site in trace.items() if site["type"] == "param"}
    return Posterior(guide, params, batch_axes=batch_axes)


def read(x, exposure):
    return jnp.stack([x, jnp.log(exposure)], -1)


def put(values, value):
    """Return data with another value in one row."""
    values = np.array(values)
    values[BAD] = value
    return values


@pytest.fixture(scope="module")
def posterior():
    return posterior_of(poisson, COUNTS, EXPOSURE, inputs=read)


METHODS = {
    "encode": lambda posterior, data: posterior.encode(data)["z"].loc,
    "sample": lambda posterior, data: posterior.sample(KEY, data, 5)["z"].T,
    "predict": lambda posterior, data: posterior.predict(KEY, data, 5)["x"].T,
    "log_weights": lambda posterior, data: posterior.log_weights(KEY, data, 5).T,
    "log_evidence": lambda posterior, data: posterior.log_evidence(KEY, data, 5).T,
    "to_datatree": lambda posterior, data: (
        posterior.to_datatree(KEY, data, 5)["posterior"]["z"].values[0].T
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_values_outside_their_support_are_told_once(posterior, name, pytestconfig):
    call = METHODS[name]
    good = call(posterior, (COUNTS, EXPOSURE))
    with pytest.warns(UserWarning, match=OUTSIDE + ROW) as told:
        found = call(posterior, (put(COUNTS, 0.5), EXPOSURE))
    assert len(told) == 1
    if not pytestconfig.getoption("--types"):  # whose frames lie between
        assert told[0].filename == __file__
    others = np.arange(SIZE) != BAD
    np.testing.assert_array_equal(found[others], good[others])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [np.nan, -1.0])
def test_draws_that_are_not_numbers_are_told(posterior, name, value):
    """The encoder takes the logarithm of a covariate, which is NaN where that is not positive."""
    call, data = METHODS[name], (COUNTS, put(EXPOSURE, value))
    message = r"not numbers in 1 of 12 rows of plate 'data' \(rows \[3\]\)"
    if np.isnan(value):
        message += r": data\[1\] has 1 values that are NaN or infinite, the first in row 3"
    good = call(posterior, (COUNTS, EXPOSURE))
    with pytest.warns(UserWarning, match=message) as told:
        found = call(posterior, data)
    assert len(told) == 1
    others = np.arange(SIZE) != BAD
    np.testing.assert_array_equal(found[others], good[others])


def test_a_check_names_site_support_and_rows(posterior, tmp_path, monkeypatch):
    data, options = (put(COUNTS, 0.5), EXPOSURE), {"progress_bar": False}
    report = posterior.check(KEY, data, FEW, **options)
    assert report.verdict[BAD] == 3
    assert report.dataset["outside_x"].values.nonzero()[0].tolist() == [BAD]
    (told,) = [finding for finding in report.findings if "support" in finding.text]
    assert not told.ok
    assert "12 rows of plate 'data' (rows [3]; found 0.5): expected whole numbers" in told.text
    assert told.advice.startswith("round counts")
    assert "not finite" not in str(report)
    good = posterior.check(KEY, (COUNTS, EXPOSURE), FEW, **options)
    assert not [name for name in good.dataset.data_vars if "outside" in str(name)]
    others = np.arange(SIZE) != BAD
    np.testing.assert_array_equal(good.dataset["khat"][others], report.dataset["khat"][others])
    monkeypatch.setattr(regions, "PART_ROWS", 4)
    posterior.check(KEY, data, FEW, store=tmp_path / "report", **options)
    assert told in open_report(tmp_path / "report").findings


def test_a_check_names_the_covariates_that_are_not_finite(posterior):
    data = (COUNTS, put(EXPOSURE, np.nan))
    report = posterior.check(KEY, data, FEW, progress_bar=False)
    assert report.verdict[BAD] == 3
    assert "1 rows have log weights that are not finite, the first is row 3" in str(report)
    assert "data[1] has 1 values that are NaN" in str(report)


def test_swapped_arguments_are_told(posterior):
    swapped = (EXPOSURE, 1 + COUNTS)
    message = r"in 12 of 12 rows .*\(rows \[0, 1, 2, 3, 4\] and others; found 0.55\).*the order of"
    with pytest.warns(UserWarning, match=message):
        posterior.sample(KEY, swapped, 5)
    with pytest.raises(ValueError, match=f"zero importance weight everywhere.*{message}"):
        posterior.check(KEY, swapped, FEW, progress_bar=False)


def test_a_repair_mends_the_others_and_names_such_rows(posterior, monkeypatch):
    monkeypatch.setattr(methods, "ROUNDS", (1,))
    data = (put(COUNTS, -2.0), EXPOSURE)
    found = posterior.repair(KEY, data, [BAD - 1, BAD], method="importance", num_samples=100)
    assert found.remaining.tolist() == [BAD]


def test_a_tree_written_in_parts_tells_of_all_of_them_once(posterior, tmp_path, monkeypatch):
    monkeypatch.setattr(regions, "PART_ROWS", 4)
    monkeypatch.setattr("numpyro_vae.inference.runner.ROWS", 2)
    counts = put(COUNTS, 0.5)
    counts[[0, 11]] = -1
    with pytest.warns(UserWarning, match=r"3 of 12 rows .*rows \[0, 3, 11\]; found -1\)") as told:
        posterior.to_datatree(KEY, (counts, EXPOSURE), 5, store=tmp_path / "tree")
    assert len(told) == 1


# -- of other models ------------------------------------------------------------------------------


def observing(make):
    """A model of one latent whose likelihood is ``make(z, x)``."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", make(z, x), obs=x)

    return model


PIXELS = np.eye(SIZE, 3, dtype=np.float32)
TOLD = {
    "gray pixels": (
        lambda z, x: dist.Bernoulli(logits=z[:, None]).expand([len(z), 3]).to_event(1),
        put(PIXELS, [0.0, 1.0, 0.25]),
        r"of its BernoulliLogits in 1 of 12 .*found 0.25\): expected 0 or 1",
    ),
    "times": (
        lambda z, x: dist.Gamma(2.0, jnp.exp(z)),
        put(EXPOSURE, -1.5),
        r"of its Gamma in .*found -1.5\): expected numbers above 0",
    ),
    "counts above their total": (
        lambda z, x: dist.Binomial(2 + 0 * x.astype(int), logits=z),
        put(COUNTS % 2, 7),
        r"of its BinomialLogits in .*found 7\): expected whole numbers within bounds",
    ),
    "totals of classes": (
        lambda z, x: dist.Multinomial(1, jax.nn.softmax(z[:, None] * jnp.arange(3.0))),
        put(np.eye(3, dtype=np.float32)[np.arange(SIZE) % 3], [1.0, 1.0, 0.0]),
        r"of its MultinomialProbs in 1 of 12 rows of plate 'data' \(rows \[3\]\)",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_values_of_any_support_are_told(case):
    make, x, message = TOLD[case]
    with pytest.warns(UserWarning, match=message):
        posterior_of(observing(make), x).sample(KEY, x, 2)


def normal(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.mark.parametrize("reads", [True, False])
def test_a_missing_datum_costs_no_other_row(reads):
    """Whether or not the encoder reads it, and so has draws that are not numbers."""
    inputs = {} if reads else {"inputs": lambda x: jnp.zeros((len(x), 1))}
    posterior, holed = posterior_of(normal, EXPOSURE, **inputs), put(EXPOSURE, np.nan)
    others = np.arange(SIZE) != BAD
    message = r"its Normal in 1 of 12 .*rows \[3\]; found nan\): expected numbers that are finite"
    for call in (METHODS["sample"], METHODS["log_weights"]):
        good = call(posterior, EXPOSURE)
        with pytest.warns(UserWarning, match=f"{message}.*leave them out with handlers.mask"):
            found = call(posterior, holed)
        np.testing.assert_array_equal(found[others], good[others])
    report = posterior.check(KEY, holed, FEW, progress_bar=False)
    assert report.verdict[BAD] == 3
    assert "found nan): expected numbers that are finite" in str(report)
    known = posterior.check(KEY, EXPOSURE, FEW, progress_bar=False).dataset["khat"]
    np.testing.assert_array_equal(report.dataset["khat"][others], known[others])
    found = posterior.repair(KEY, holed, [0, BAD], method="importance", num_samples=100)
    assert found.remaining.tolist() == [BAD]


def test_a_missing_datum_under_a_mask_has_the_density_that_numpyro_gives_it():
    def model(x):
        with numpyro.plate("data", len(x)), handlers.mask(mask=~jnp.isnan(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).mask(True))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    holed = put(EXPOSURE, np.nan)
    posterior = posterior_of(model, EXPOSURE, inputs=jnp.nan_to_num)
    draws = posterior.sample(KEY, holed, 3)["z"]
    found = posterior.log_weights(KEY, holed, 3)
    assert np.isfinite(found).all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPyro's own, of the value that the mask leaves out
        joint = [log_density(model, (holed,), {}, {"z": z})[0] for z in draws]
    loc, scale = posterior.encode(holed)["z"]
    log_q = np.array(dist.Normal(loc, scale).log_prob(draws))
    log_q[:, BAD] = 0.0  # as the model masks the latent, too
    np.testing.assert_allclose(found.sum(1), joint - log_q.sum(1), rtol=1e-5)


def test_what_is_observed_of_no_row_must_be_finite():
    def model(x, total):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        numpyro.sample("total", dist.Normal(mu, 1.0), obs=total)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    posterior = posterior_of(model, EXPOSURE, np.float32(1.0), batch_axes=(0, None))
    posterior.sample(KEY, (EXPOSURE, np.float32(1.0)), 2)
    with pytest.raises(ValueError, match=r"the model observes them at \['total'\]"):
        posterior.sample(KEY, (put(EXPOSURE, np.nan), np.float32(np.nan)), 2)


SERVED = {
    "gray, with a density of its own": (
        lambda z, x: dist.Bernoulli(logits=z, validate_args=False),
        np.full(SIZE, 0.5, np.float32),
    ),
    "booleans": (lambda z, x: dist.Bernoulli(logits=z), COUNTS > 1),
    "fillers under a mask": (
        lambda z, x: dist.Poisson(jnp.exp(z)).mask(x >= 0),
        np.where(COUNTS > 1, -9, COUNTS),
    ),
}


@pytest.mark.parametrize("case", SERVED)
def test_of_what_numpyro_gives_a_density_nothing_is_said(case):
    make, x = SERVED[case]
    posterior = posterior_of(observing(make), x)
    posterior.sample(KEY, x, 2)
    assert np.isfinite(posterior.log_weights(KEY, x, 2)).all()


def test_of_masked_observations_nothing_is_said():
    def model(x, seen):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Exponential(jnp.exp(z)), obs=x, obs_mask=seen)

    seen = COUNTS < 3
    data = (np.where(seen, 1 + COUNTS, -9).astype(np.float32), seen)
    posterior = posterior_of(model, *data, inputs=lambda x, seen: jnp.where(seen, x, 0.0))
    assert np.isfinite(posterior.sample(KEY, data, 2)["z"]).all()


def test_of_bounds_that_are_latent_nothing_is_said_unless_no_draw_has_a_density():
    """A draw of which the model gives no density is an answer; that no draw has any is a fault."""

    def model(x):
        with numpyro.plate("data", len(x)):
            top = numpyro.sample("top", dist.LogNormal(0.0, 1.0))
            numpyro.sample("x", dist.Uniform(0.0, top), obs=x)

    posterior = posterior_of(model, EXPOSURE)
    posterior.sample(KEY, EXPOSURE + 100, 4)
    found = posterior.log_weights(KEY, EXPOSURE, 200)
    assert (found == -np.inf).any()
    with pytest.warns(UserWarning, match=r"no draw any density in 1 of 12 rows .*rows \[3\]\)"):
        posterior.log_weights(KEY, put(EXPOSURE, -1.0), 200)


def test_values_of_segments_are_told_by_the_row_that_they_belong_to():
    group, x = np.arange(24) % SIZE, np.arange(24).astype(np.float32)

    def model(group, x):
        with numpyro.plate("groups", SIZE):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("observations", len(x)):
            numpyro.sample("x", dist.Poisson(jnp.exp(z[group])), obs=x)

    x[SIZE + BAD] = -1
    options = {"segments": {"observations": lambda group, x: group}, "plate": "groups"}
    posterior = posterior_of(
        model, group, x, batch_axes=None, inputs=lambda group, x: jnp.zeros((SIZE, 1)), **options
    )
    message = r"'x' has values .* in 1 of 12 rows of plate 'groups' \(rows \[3\]\)"
    with pytest.warns(UserWarning, match=message):
        posterior.sample(KEY, (group, x), 2)
    with pytest.warns(UserWarning, match=message):
        posterior.log_weights(KEY, (group, x), 2)


def test_probabilities_of_an_impossible_row_are_told():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            kind = numpyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            numpyro.sample("x", dist.Poisson(jnp.exp(z + kind)), obs=x)

    posterior = posterior_of(model, COUNTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior.probabilities(KEY, COUNTS, 2)
    with pytest.warns(UserWarning, match=OUTSIDE + ROW):
        posterior.probabilities(KEY, put(COUNTS, 0.5), 2)
