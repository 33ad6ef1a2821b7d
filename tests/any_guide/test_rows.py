"""Guides of NumPyro's, and written by hand, of which the rows have posteriors of their own."""

from functools import partial

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoGuideList, AutoNormal
from scipy import stats

from numpyro_vae import AutoAmortizedNormal, Gap, Importance, Novelty, Posterior, fit
from tests.helpers import make_svi
from tests.models import NOISE, normal_model, normal_normal

KEY = jax.random.key(0)
EXACT = normal_normal()
X = EXACT.data[:40]
COUNTS = np.random.default_rng(0).poisson(3.0, size=(30, 2)).astype(np.float32)
QUIET = {"progress_bar": False}


def run(model, guide, *args, steps=800, rate=1e-2, particles=4):
    svi = SVI(
        model, guide, optax.adam(optax.cosine_decay_schedule(rate, steps)), Trace_ELBO(particles)
    )
    return svi.run(KEY, steps, *args, progress_bar=False)


@pytest.fixture(scope="module", params=[AutoNormal, AutoDiagonalNormal])
def automatic(request):
    guide = request.param(normal_model)
    return Posterior(guide, run(normal_model, guide, X, steps=2000, rate=5e-2))


class TestAutomatic:
    def test_the_posterior_is_the_exact_one(self, automatic):
        encoded = automatic.encode(X)["z"]
        np.testing.assert_allclose(encoded.loc, EXACT.loc["z"][:40], atol=0.08)
        np.testing.assert_allclose(encoded.scale, EXACT.scale["z"][:40], rtol=0.15)

    def test_checks_say_so(self, automatic):
        report = automatic.check(KEY, X, (Importance(), Gap(max_rows=8)), **QUIET)
        found = report.dataset
        assert (found["khat"] < 0.67).all()
        np.testing.assert_allclose(found["log_evidence"], EXACT.log_evidence[:40], atol=0.02)
        assert found["gap_approximation"].max() < 0.02

    def test_a_tree_is_like_numpyros_own_draws(self, automatic):
        tree = automatic.to_datatree(KEY, X, 400)
        draws = automatic.guide.guide.sample_posterior(KEY, automatic.params, sample_shape=(4000,))
        found = az.summary(tree, var_names=["z"])
        np.testing.assert_allclose(found["mean"], draws["z"].mean(0), atol=0.12)
        np.testing.assert_allclose(found["sd"], draws["z"].std(0), rtol=0.2)

    def test_other_rows_are_refused(self, automatic):
        for other in (EXACT.data[:30], EXACT.data[:50]):
            with pytest.raises(ValueError, match=rf"have {len(other)} in plate 'data'"):
                automatic.sample(KEY, other, 2)

    def test_checks_of_other_data_do_not_apply(self, automatic):
        report = automatic.check(KEY, X, "all", **QUIET)
        assert {"calibration", "novelty"} <= report.skipped.keys()
        with pytest.raises(ValueError, match="parameters for each row"):
            automatic.check(KEY, X, Novelty(EXACT.data), **QUIET)


class TestByHand:
    """A network in a guide written by hand is the network that `AutoAmortizedNormal` has."""

    @pytest.fixture(scope="class")
    @classmethod
    def pair(cls):
        svi = make_svi(normal_model)
        result = fit(svi, KEY, X, num_epochs=30, progress_bar=False)

        def guide(x):
            encoding = svi.guide.encode(result.params, x)
            loc, scale = (
                encoding.marginal(fn)[:, 0] for fn in (lambda q: q.mean, lambda q: q.scale)
            )
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Normal(loc, scale))

        return Posterior(svi.guide, result), Posterior(guide, {}, model=normal_model)

    @pytest.mark.slow
    def test_draws_and_every_check_are_the_same(self, pair):
        ours, theirs = (posterior.sample(KEY, X, 50)["z"] for posterior in pair)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        checks = ("importance", Gap(max_rows=4), "calibration", "collapse", "predictive")
        ours, theirs = (posterior.check(KEY, X, checks, **QUIET).dataset for posterior in pair)
        for name in set(ours.data_vars) - {"refined_converged"}:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, atol=2e-3)

    def test_repairs_find_the_same(self, pair):
        options = {"method": "importance", "num_samples": 50}
        ours, theirs = (posterior.repair(KEY, X, [1, 5], **options).dataset for posterior in pair)
        for name in ("log_evidence", "ess"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-3, atol=2e-3)

    def test_any_rows_will_do(self, pair):
        assert pair[1].sample(KEY, EXACT.data[:7], 3)["z"].shape == (3, 7)


def gamma_poisson(counts):
    with numpyro.plate("data", len(counts)):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("counts", dist.Poisson(rate[:, None]).to_event(1), obs=counts)


def gamma_guide(counts, factor=1.0):
    with numpyro.plate("data", len(counts)):
        numpyro.sample("rate", dist.Gamma(factor * (2.0 + counts.sum(-1)), factor * 3.0))


def gamma_evidence(counts):
    a, total = 2.0, counts.sum(-1)
    marginal = stats.nbinom(a, 1 / 3).logpmf(total)  # of the sum, which is Poisson with 2 rate
    return marginal + stats.binom(total, 0.5).logpmf(counts[:, 0])


class TestOtherDistributions:
    """Guides that are no Normals: known by their draws and densities."""

    def test_the_exact_guide_has_the_evidence_as_its_weights(self):
        posterior = Posterior(gamma_guide, {}, model=gamma_poisson)
        weights = posterior.log_weights(KEY, COUNTS, 50)
        np.testing.assert_allclose(weights, np.tile(gamma_evidence(COUNTS), (50, 1)), atol=2e-4)
        draws = posterior.sample(KEY, COUNTS, 4000)["rate"]
        exact = stats.gamma(2 + COUNTS.sum(-1), scale=1 / 3)
        np.testing.assert_allclose(draws.mean(0), exact.mean(), atol=5 * exact.std().max() / 63)

    @pytest.mark.slow
    def test_a_wrong_one_is_flagged_and_repaired(self):
        wide = partial(gamma_guide, factor=12.0)  # a posterior that is far too narrow
        posterior = Posterior(wide, {}, model=gamma_poisson)
        report = posterior.check(KEY, COUNTS, **QUIET)
        assert len(report.flagged) == len(COUNTS)
        repair = posterior.repair(KEY, COUNTS, report, num_samples=2000)
        assert not repair.remaining.size
        exact = stats.gamma(2 + COUNTS.sum(-1), scale=1 / 3)
        np.testing.assert_allclose(
            repair.groups["posterior"]["rate"].mean(0), exact.mean(), rtol=0.06
        )

    @pytest.mark.slow
    def test_what_needs_features_does_not_apply(self):
        posterior = Posterior(gamma_guide, {}, model=gamma_poisson)
        report = posterior.check(KEY, COUNTS, ("importance", "calibration"), **QUIET)
        assert all(finding.ok for finding in report.findings)  # the exact posterior, by any data
        for check in ("gap", Novelty(COUNTS)):
            with pytest.raises(ValueError, match="are no Normals"):
                posterior.check(KEY, COUNTS, check, **QUIET)
        with pytest.raises(ValueError, match="'auto', 'importance' or 'nuts'"):
            posterior.repair(KEY, COUNTS, [0], method="refine")
        with pytest.raises(ValueError, match="are no Normals"):
            posterior.encode(COUNTS)

    def test_it_is_run_on_batches_of_rows(self):
        posterior = Posterior(gamma_guide, {}, model=gamma_poisson)
        assert not posterior._runner.read(COUNTS).data.is_whole

    def test_draws_do_not_depend_on_batches(self):
        posterior = Posterior(gamma_guide, {}, model=gamma_poisson)
        many = np.tile(COUNTS, (20, 1))
        draws = posterior.sample(KEY, many, 3)["rate"]
        np.testing.assert_allclose(draws[:, :30], posterior.sample(KEY, COUNTS, 3)["rate"], 1e-5)


def chain(x):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        a = numpyro.sample("a", dist.Normal(mu, 1.0))
        b = numpyro.sample("b", dist.Normal(a, 1.0))
        numpyro.sample("x", dist.Normal(b, 1.0), obs=x)


def chain_guide(x):
    """The exact posterior given ``mu``: ``b`` given it, and ``a`` given ``b``."""
    mu = numpyro.sample("mu", dist.Normal(0.5, 0.3))
    with numpyro.plate("data", len(x)):
        b = numpyro.sample("b", dist.Normal((mu / 2 + x) / 1.5, 1.5**-0.5))
        numpyro.sample("a", dist.Normal((mu + b) / 2, 2**-0.5))


def test_sites_may_read_one_another_and_global_ones():
    posterior = Posterior(chain_guide, {}, model=chain)
    weights = posterior.log_weights(KEY, X, 30)
    mu = posterior.sample(KEY, X, 30)["mu"]
    exact = stats.norm(mu[:, None], np.sqrt(3)).logpdf(X)
    np.testing.assert_allclose(weights, exact, atol=2e-4)
    report = posterior.check(KEY, X, Importance(), **QUIET)
    assert report.dataset["khat"].max() < 0.5


def looked_up(x):
    loc = numpyro.param("loc", jnp.zeros(len(X)))
    with numpyro.plate("data", len(x)) as rows:
        numpyro.sample("z", dist.Normal(loc[rows], 0.4))


def at_once(x):
    loc = numpyro.param("loc", jnp.zeros(len(X)))
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.Normal(loc, 0.4))


@pytest.mark.slow
@pytest.mark.parametrize("guide", [looked_up, at_once])
def test_parameters_by_row(guide):
    loc = jnp.linspace(-1, 1, 40)
    posterior = Posterior(guide, {"loc": loc}, model=normal_model)
    np.testing.assert_allclose(posterior.encode(X)["z"].loc, loc, rtol=1e-6)
    draws = posterior.repair(KEY, X, [3], method="nuts", num_samples=400).groups["posterior"]["z"]
    np.testing.assert_allclose(draws.mean(), EXACT.loc["z"][3], atol=0.1)
    with pytest.raises(ValueError, match="rows"):
        posterior.encode(EXACT.data[:50])
    with pytest.raises(ValueError, match="rows"):
        posterior.encode(X[:9])


def selecting_model(x, size=None):
    with numpyro.plate("data", len(x), subsample_size=size) as rows:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x[rows])


def selecting_guide(x, size=None):
    slope = numpyro.param("slope", 0.8)
    with numpyro.plate("data", len(x), subsample_size=size) as rows:
        numpyro.sample("z", dist.Normal(slope * x[rows], 5**-0.5))


def test_a_guide_that_selects_rows_is_amortized():
    posterior = Posterior(selecting_guide, {"slope": 0.8}, model=selecting_model)
    for data in (X, EXACT.data):
        np.testing.assert_allclose(posterior.encode(data)["z"].loc, 0.8 * data, rtol=1e-5)


def test_networks_with_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(1, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.norm(self.first(x[:, None]))))[:, 0]

    def guide(x):
        net = nnx_module("net", Net(nnx.Rngs(0)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(net(x), 0.5))

    result = run(normal_model, guide, X, steps=50, particles=1)
    posterior = Posterior(guide, result, model=normal_model)
    assert np.isfinite(posterior.log_weights(KEY, X, 4)).all()
    with pytest.raises(ValueError, match=r"asks for .*net"):
        Posterior(guide, {}, model=normal_model).sample(KEY, X, 2)


@pytest.mark.slow
def test_lists_of_guides():
    def model(x):
        mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(mu, 1.0))
            numpyro.sample("x", dist.Normal(z, NOISE), obs=x)

    guide = AutoGuideList(model)
    guide.append(AutoDiagonalNormal(numpyro.handlers.block(model, hide=["z", "x"])))
    guide.append(AutoNormal(numpyro.handlers.block(model, hide=["mu"])))
    posterior = Posterior(guide, run(model, guide, X))
    report = posterior.check(KEY, X, Importance(), **QUIET)
    assert report.dataset["khat"].notnull().all()
    assert posterior.sample(KEY, X, 5)["mu"].shape == (5,)


def test_observations_in_another_plate():
    group = jnp.array([0, 0, 1, 2, 2, 2])

    def model(group, x):
        with numpyro.plate("groups", 3):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(z[group], 1.0), obs=x)

    data = (group, jnp.array([0.5, 1.5, -1.0, 0.0, 1.0, 2.0]))
    exact = dist.Normal(jnp.array([2.0, -1.0, 3.0]) / jnp.array([3.0, 2.0, 4.0]), 0.5)

    def guide(group, x):
        with numpyro.plate("groups", 3):
            numpyro.sample("z", exact)

    posterior = partial(Posterior, guide, {}, model=model, plate="groups", batch_axes=None)
    with pytest.raises(ValueError, match="segments="):
        posterior().sample(KEY, data, 2)
    weigh = posterior(segments={"rows": lambda group, x: group}).log_weights
    draws = posterior(segments={"rows": lambda group, x: group}).sample(KEY, data, 20)["z"]
    by_row = dist.Normal(draws[:, group], 1.0).log_prob(data[1])
    likelihood = jax.vmap(lambda x: jax.ops.segment_sum(x, group, 3))(by_row)
    expected = likelihood + dist.Normal(0.0, 1.0).log_prob(draws) - exact.log_prob(draws)
    np.testing.assert_allclose(weigh(KEY, data, 20), expected, atol=1e-4)


def test_points_have_draws_and_no_density():
    guide = AutoDelta(normal_model)
    posterior = Posterior(guide, run(normal_model, guide, X, steps=1500, rate=5e-2))
    np.testing.assert_allclose(posterior.sample(KEY, X, 2)["z"][0], EXACT.loc["z"][:40], atol=0.05)
    assert "sample_stats" not in posterior.to_datatree(KEY, X, 10)
    for refused in (posterior.check, partial(posterior.log_weights, num_samples=2)):
        with pytest.raises(ValueError, match=r"a point at the local sites \['z'\]"):
            refused(KEY, X)


def test_bad_input():
    with pytest.raises(TypeError, match=r"'gamma_guide' does not know its model.*model=model"):
        Posterior(gamma_guide, {})
    with pytest.raises(TypeError, match="the class AutoNormal, expected a guide"):
        Posterior(AutoNormal, {})
    with pytest.raises(TypeError, match="leave them out"):
        Posterior(make_svi(normal_model).guide, {}, model=normal_model)

    def lacking(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"no sites \['z'\].*has \['w'\]"):
        Posterior(lacking, {}, model=normal_model).sample(KEY, X, 2)


def test_a_guide_that_is_not_ours_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"not of this library.*posterior\.params"):
        Posterior(gamma_guide, {}, model=gamma_poisson).save(tmp_path / "posterior")


def test_a_wrapped_guide_of_ours_is_in_evaluation_mode():
    class Noisy(nnx.Module):
        def __init__(self, example, rngs):
            self.linear = nnx.Linear(1, 8, rngs=rngs)
            self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.norm(self.linear(x[:, None])))

    ours = AutoAmortizedNormal(normal_model, lambda example, *, rngs: Noisy(example, rngs))
    svi = SVI(normal_model, ours, optax.adam(1e-2), Trace_ELBO())
    result = fit(svi, KEY, X, num_epochs=5, **QUIET)
    wrapped = Posterior(numpyro.handlers.block(ours, hide=[]), result, model=normal_model)
    expected = Posterior(ours, result).encode(X)["z"]
    np.testing.assert_allclose(wrapped.encode(X)["z"].loc, expected.loc, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(wrapped.encode(X[:7])["z"].loc, expected.loc[:7], rtol=1e-4)
