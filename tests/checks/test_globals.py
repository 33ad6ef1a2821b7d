"""The weights of global latents: NumPyro's own density where locals integrate out, and verdicts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import make_svi, train
from numpyro import handlers
from numpyro.infer.autoguide import (
    AutoBNAFNormal,
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from numpyro.infer.util import log_density as numpyro_density
from scipy import stats

from numpyro_vae import (
    MLP,
    AutoAmortizedFlow,
    AutoAmortizedLowRankMultivariateNormal,
    AutoAmortizedMultivariateNormal,
    AutoAmortizedNormal,
    Globals,
    LogScale,
    Posterior,
    fit,
)
from numpyro_vae.checks import NotApplicableError
from numpyro_vae.inference.global_weights import GlobalWeights
from numpyro_vae.inference.marginal import LogDensity, log_density

LINEAR = partial(MLP, hidden_sizes=(8,), activation=lambda hidden: hidden, standardize=False)
KEY = jax.random.key(1)
NUM_DATA, NUM_DRAWS = 40, 20
X = np.random.default_rng(0).normal(0.7, 1.5, NUM_DATA).astype(np.float32)
GROUP = np.arange(NUM_DATA, dtype=np.int32) % 3


def untrained(model, *args, auto=AutoAmortizedNormal, batch_axes=0, **options):
    """The posterior of a guide as it starts, which is wrong and wide, so that particles matter."""
    if auto is not AutoAmortizedFlow:
        options["scale"] = LogScale(init_scale=3.0)
    guide = auto(model, LINEAR, **options)
    trace = handlers.trace(handlers.seed(guide, 0)).get_trace(*args)
    kinds = ("param", "mutable")
    params = {name: site["value"] for name, site in trace.items() if site["type"] in kinds}
    return Posterior(guide, params, batch_axes=batch_axes)


def found_and_draws(posterior, data, particles=256):
    """The densities of draws of the globals, their error, and the draws."""
    runner = posterior._runner
    rows = runner.read(data)
    draws, _ = runner.weigh_globals(KEY, rows, NUM_DRAWS)
    return log_density(runner, rows, jax.random.key(2), draws, particles), draws


def without_locals(marginal, draws, *args):
    """NumPyro's log density of a model in which the locals are integrated out by hand."""

    def one(values):
        return numpyro_density(handlers.seed(marginal, 0), args, {}, values)[0]

    return np.asarray(jax.vmap(one)(draws), float)


# -- densities, by NumPyro's own of the model without its locals -----------------------------------


def normal(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 0.3))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, tau))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_alone(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = numpyro.sample("tau", dist.LogNormal(0.0, 0.3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(mu, jnp.sqrt(1 + tau**2)), obs=x)


def scaled(x, factor=0.25):
    """Everything by a factor: the posterior that the ELBO leads to is the same."""
    with handlers.scale(scale=factor):
        normal(x)


def likelihood_scaled(x):
    """N(x | z, 1)^(1/4) is N(x | z, 2) times a constant."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        with handlers.scale(scale=0.25):
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def likelihood_scaled_alone(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(mu, jnp.sqrt(5.0)), obs=x)
        numpyro.factor("constant", jnp.log(2 * (2 * jnp.pi) ** 0.375) + jnp.zeros(len(x)))


def outside(x):
    """What lies outside the plate: a plate of its own, a factor, an observation, a subsample."""
    with numpyro.plate("group", 3, subsample_size=2):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.factor("sum", -((mu.sum() - 1.0) ** 2))
    numpyro.sample("seen", dist.Normal(mu.sum(), 0.5), obs=0.3)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu.sum(), 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def outside_alone(x):
    with numpyro.plate("group", 3):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.factor("sum", -((mu.sum() - 1.0) ** 2))
    numpyro.sample("seen", dist.Normal(mu.sum(), 0.5), obs=0.3)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(mu.sum(), jnp.sqrt(2.0)), obs=x)


def masked(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)), handlers.mask(mask=x > 0):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def masked_alone(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)), handlers.mask(mask=x > 0):
        numpyro.sample("x", dist.Normal(mu, jnp.sqrt(2.0)), obs=x)


def mixture(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    weight = numpyro.sample("weight", dist.Beta(2.0, 2.0))
    with numpyro.plate("data", len(x)):
        kind = numpyro.sample("kind", dist.Bernoulli(weight), infer={"enumerate": "parallel"})
        z = numpyro.sample("z", dist.Normal(mu + 2.0 * kind, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def mixture_alone(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    weight = numpyro.sample("weight", dist.Beta(2.0, 2.0))
    parts = dist.Normal(jnp.stack([mu, mu + 2.0]), jnp.sqrt(2.0))
    mixing = dist.Categorical(jnp.stack([1 - weight, weight]))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.MixtureSameFamily(mixing, parts), obs=x)


def grouped(x, group):
    """The rows' observations lie in another plate."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("group", 3):
        z = jnp.asarray(numpyro.sample("z", dist.Normal(mu, 1.0)))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(z[group], 1.0), obs=x)


def grouped_alone(x, group):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    covariance = jnp.eye(NUM_DATA) + (GROUP[:, None] == GROUP)
    loc = mu * jnp.ones(NUM_DATA)
    numpyro.sample("x", dist.MultivariateNormal(loc, covariance), obs=x)


CASES = {
    "normal": (normal, normal_alone, {}),
    "conditioned": (normal, normal_alone, {"condition_on": ("mu", "tau")}),
    "scaled": (scaled, normal_alone, {}),
    "likelihood scaled": (likelihood_scaled, likelihood_scaled_alone, {}),
    "outside": (outside, outside_alone, {"plate": "data"}),
    "masked": (masked, masked_alone, {}),
    "full rank": (normal, normal_alone, {"auto": AutoAmortizedMultivariateNormal}),
    "low rank": (normal, normal_alone, {"auto": AutoAmortizedLowRankMultivariateNormal}),
    "flow": (normal, normal_alone, {"auto": AutoAmortizedFlow}),
    "discrete": (mixture, mixture_alone, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_density_of_the_globals_is_that_of_the_model_without_its_locals(case):
    model, marginal, options = CASES[case]
    found, draws = found_and_draws(untrained(model, X, **options), X)
    error = found.values - without_locals(marginal, draws, X)
    # A level that all draws share does not change their weights.
    assert abs(error.mean()) <= 0.1 + 4 * found.errors.std()
    assert error.std() <= 0.01 + 2 * found.noise
    assert found.noise <= 0.6


def test_the_density_of_globals_of_groups():
    posterior = untrained(
        grouped,
        X,
        GROUP,
        batch_axes=None,
        plate="group",
        inputs=lambda x, group: jnp.zeros((3, 1)),
        segments={"data": lambda x, group: group},
    )
    found, draws = found_and_draws(posterior, (X, GROUP), particles=1024)
    error = found.values - without_locals(grouped_alone, draws, X, GROUP)
    assert error.std() <= 0.01 + 3 * found.noise
    assert found.noise <= 0.3


def test_the_noise_is_that_of_other_random_numbers():
    posterior = untrained(normal, X)
    runner, rows = posterior._runner, posterior._runner.read(X)
    draws, _ = runner.weigh_globals(KEY, rows, NUM_DRAWS)
    exact = without_locals(normal_alone, draws, X)
    found = [log_density(runner, rows, jax.random.key(seed), draws, 16) for seed in range(40)]
    errors = np.array([one.values - exact for one in found])
    noise = np.sqrt(errors.var(1).mean())
    told = np.sqrt(np.mean([one.noise**2 for one in found]))
    np.testing.assert_allclose(told, noise, rtol=0.35)
    assert abs(errors.mean()) <= 4 * errors.std() / np.sqrt(40)  # and there is no bias


def test_the_density_is_the_same_in_parts(monkeypatch):
    posterior = untrained(normal, X)
    whole, _ = found_and_draws(posterior, X, 16)
    monkeypatch.setattr("numpyro_vae.inference.marginal.CHUNK", 16)
    parts, _ = found_and_draws(posterior, X, 16)
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-5)


def test_globals_of_unlike_scales_have_no_density():
    def unlike(x):
        with handlers.scale(scale=2.0):
            numpyro.sample("a", dist.Normal(0.0, 1.0))
        normal(x)

    with pytest.raises(ValueError, match=r"unlike factors, \[1\.0, 2\.0\].*one handlers\.scale"):
        found_and_draws(untrained(unlike, X), X)


# -- the guides of the global sites ---------------------------------------------------------------

AUTOS = {
    "normal": AutoNormal,
    "diagonal": AutoDiagonalNormal,
    "full rank": AutoMultivariateNormal,
    "low rank": partial(AutoLowRankMultivariateNormal, rank=1),
    "iaf": partial(AutoIAFNormal, num_flows=1, hidden_dims=[4]),
    "bnaf": partial(AutoBNAFNormal, num_flows=1, hidden_factors=[4]),
}


def half_as_wide(family, values, normal):
    return family(jnp.median(normal), normal.std() / 2).log_prob(values)


@pytest.mark.parametrize("auto", AUTOS)
def test_draws_come_with_their_log_density(auto):
    """Weighed by a known density, they have its evidence: the mean of p / q is one."""
    posterior = untrained(normal, X, global_guide=AUTOS[auto])
    runner = posterior._runner
    draws, log_q = runner.weigh_globals(KEY, runner.read(X), 4000)
    log_p = half_as_wide(dist.Normal, draws["mu"], draws["mu"])
    log_p += half_as_wide(dist.LogNormal, draws["tau"], jnp.log(draws["tau"]))
    weights = np.exp(np.asarray(log_p - log_q, float))
    assert weights.mean() == pytest.approx(1.0, abs=4 * weights.std() / np.sqrt(4000))
    assert weights.std() < 5


def test_the_density_of_a_normal_guide_is_the_normals():
    posterior = untrained(normal, X)
    draws, log_q = posterior._runner.weigh_globals(KEY, posterior._runner.read(X), 5)
    at = {name: float(posterior.params[f"{name}_auto_loc"]) for name in ("mu", "tau")}
    expected = stats.norm(at["mu"], 0.1).logpdf(draws["mu"])
    expected += stats.lognorm(0.1, scale=np.exp(at["tau"])).logpdf(draws["tau"])
    np.testing.assert_allclose(log_q, expected, rtol=1e-4)


def half_a_point(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(handlers.block(model, hide=["tau"])))
    guide.append(AutoDelta(handlers.block(model, hide=["mu"]), prefix="point"))
    return guide


@pytest.mark.parametrize(
    ("make", "names"), [(AutoDelta, r"\['mu', 'tau'\]"), (half_a_point, r"\['tau'\]")]
)
def test_a_point_has_no_density(make, names):
    posterior = untrained(normal, X, global_guide=make)
    with pytest.raises(NotApplicableError, match=rf"global sites {names} is .*, a point without"):
        posterior.check(KEY, X, "globals", progress_bar=False)
    report = posterior.check(KEY, X, "all", progress_bar=False)
    assert "a point without a density" in report.skipped["globals"]


# -- weights --------------------------------------------------------------------------------------


def test_moments_of_weighted_draws_and_their_errors():
    """Draws of N(0, 1) for N(0.3, 1.2^2): repeated, the errors are those that are told."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(200):
        z = rng.normal(size=(1000, 1))
        target = stats.norm(0.3, 1.2).logpdf(z[:, 0])
        slope = rng.normal(size=(33, 1)) * 0.05  # an error of the density that tilts it
        density = LogDensity(target + slope[0] * z[:, 0], slope[1:] * z[:, 0], 16)
        weights = GlobalWeights.of({"z": z}, density, stats.norm.logpdf(z[:, 0]), KEY)
        found.append(np.ravel(weights.changes()["z"]))
    shift, shift_mcse, ratio, ratio_mcse = np.transpose(found)
    assert shift.mean() == pytest.approx(0.3, abs=0.02)
    assert ratio.mean() == pytest.approx(1.2, abs=0.03)  # a little less, as tails are cut
    np.testing.assert_allclose(np.median(shift_mcse), shift.std(), rtol=0.2)
    np.testing.assert_allclose(np.median(ratio_mcse), ratio.std(), rtol=0.3)


def test_no_draw_with_a_density_is_an_error():
    density = LogDensity(np.full(1000, -np.inf), np.zeros((32, 1000)), 16)
    with pytest.raises(ValueError, match="No draw of the global sites has a finite"):
        GlobalWeights.of({"z": np.zeros((1000, 1))}, density, np.zeros(1000), KEY)


# -- verdicts -------------------------------------------------------------------------------------


def hierarchical(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(mu, 1.0))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)


def judged(**options):
    guide = AutoAmortizedNormal(hierarchical, LINEAR, **options)
    posterior = train(guide, X, steps=1500, particles=8, rate=1e-2)
    return posterior, posterior.check(KEY, X, "globals", progress_bar=False)


def test_a_mean_field_guide_is_flagged():
    _, report = judged()
    told = [finding for finding in report.findings if "'mu'" in finding.text]
    assert [finding.ok for finding in told] == [False]
    assert "posterior.repair_globals(rng_key, data)" in str(report)
    exact = np.sqrt((1 + NUM_DATA) / (1 + NUM_DATA / 2))  # 1.41, of which tails are cut
    assert 1.15 < float(report.dataset["globals_ratio_mu"]) < exact + 0.05


@pytest.mark.parametrize("global_guide", [AutoNormal, AutoMultivariateNormal])
def test_an_exact_guide_is_not(global_guide, tmp_path):
    posterior, report = judged(condition_on=("mu",), global_guide=global_guide)
    assert all(finding.ok for finding in report.findings)
    assert report.dataset["globals_khat"] < 0.5
    assert report.dataset["globals_ess"] > 950
    assert report.dataset["globals_particles"] == 16
    np.testing.assert_allclose(report.dataset["globals_ratio_mu"], 1.0, atol=0.1)
    report.save(tmp_path / "report.png")
    tree = report.add_to(posterior.to_datatree(KEY, X, 10))
    assert "globals_khat" in tree["checks"]


def test_a_site_of_several_values_has_their_dimensions():
    def wide(x):
        with numpyro.plate("side", 2):
            numpyro.sample("a", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        hierarchical(x)

    report = untrained(wide, X, plate="data").check(KEY, X, Globals(200), progress_bar=False)
    assert report.dataset["globals_shift_a"].dims == ("side", "a_dim_0")
    assert "at most, of 6 values" in str(report)


def test_it_is_about_the_rows_of_the_fit():
    svi = make_svi(hierarchical)
    posterior = Posterior(svi.guide, fit(svi, KEY, X, num_epochs=2, progress_bar=False))
    message = "was trained on 40 rows, and these are 30; pass the rows that it was trained on"
    with pytest.raises(NotApplicableError, match=message):
        posterior.check(KEY, X[:30], "globals", progress_bar=False)
    posterior.check(KEY, X, Globals(200), progress_bar=False)


def test_a_model_without_globals_has_none_to_judge():
    def alone(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    posterior = untrained(alone, X)
    with pytest.raises(NotApplicableError, match="no latent sites outside plate 'data'"):
        posterior.check(KEY, X, "globals", progress_bar=False)
    assert not posterior.check(KEY, X, progress_bar=False).skipped


def test_the_quick_checks_say_that_globals_are_not_judged():
    report = untrained(hierarchical, X).check(KEY, X, progress_bar=False)
    assert "pass checks='globals'" in report.skipped["globals"]


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="at least 100 draws"):
        Globals(num_samples=50)


def test_discrete_globals_are_not_judged():
    def discrete(x):
        kind = numpyro.sample("kind", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        mu = numpyro.sample("mu", dist.Normal(3.0 * kind, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(NotApplicableError, match=r"discrete sites \['kind'\] outside plate 'data'"):
        untrained(discrete, X).check(KEY, X, "globals", progress_bar=False)
