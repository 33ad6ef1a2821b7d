"""Steps of rows are taken once for all that a call computes of them, and are those of each row."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import SMALL
from numpyro.infer import SVI, Trace_ELBO

from numpyro_vae import AutoAmortizedFlow, AutoAmortizedNormal, Importance, Posterior
from numpyro_vae.inference import runner
from numpyro_vae.inference.memory import Kept
from numpyro_vae.inference.natural import take_steps

KEY, NOISE = jax.random.key, 0.5
X = np.linspace(-2.0, 2.0, 9).astype(np.float32)
EXACT = X / (1 + NOISE**2)


def model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(z, NOISE), obs=x)


@pytest.fixture
def taken(monkeypatch):
    """The number of rows of each time that steps are taken outside of a quantity."""
    found, per_batch = [], runner.Runner.per_batch

    def counted(self, quantity, rows, *args, **kwargs):
        found.extend([rows.num_chosen] if quantity is take_steps else [])
        return per_batch(self, quantity, rows, *args, **kwargs)

    monkeypatch.setattr(runner.Runner, "per_batch", counted)
    return found


def posterior(batch_axes=0, natural_steps=8, family=AutoAmortizedNormal):
    guide = family(model, SMALL)
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    params = svi.get_params(svi.init(KEY(0), X))
    return Posterior(guide, params, natural_steps=natural_steps, batch_axes=batch_axes)


def test_all_checks_share_them(taken):
    checks = (Importance(num_samples=200), "collapse", "predictive")
    report = posterior().check(KEY(1), X, checks, progress_bar=False)
    assert taken == [len(X)]
    assert (report.verdict == 0).all()


@pytest.mark.parametrize("batch_axes", [0, None])
def test_repaired_rows_have_their_own(taken, batch_axes):
    """Where the model takes the data whole, those of all rows are taken together."""
    repair = posterior(batch_axes).repair(KEY(1), X, [2, 7], method="nuts", num_samples=400)
    assert taken == [2 if batch_axes == 0 else len(X)]
    assert repair.dataset["passed"].all()
    draws, sd = repair.groups["posterior"]["z"], NOISE / np.hypot(1, NOISE)
    error = 5 * sd / repair.dataset["ess"].values ** 0.5
    assert (np.abs(draws.mean(0) - EXACT[[2, 7]]) < error).all()


def test_the_normal_of_a_row_of_a_flow_does_not_depend_on_its_number():
    """A row that is served alone has the posterior that it had among those that were checked."""
    whole = posterior(family=AutoAmortizedFlow)
    runner = Posterior(whole.guide, whole.params, natural_steps=1)._runner
    of_all, of_some = (runner.steps(runner.read(rows)) for rows in (X, X[3:5]))
    for all_rows, some in zip(jax.tree.leaves(of_all), jax.tree.leaves(of_some), strict=True):
        np.testing.assert_allclose(some, all_rows[3:5], atol=1e-5)


def test_what_is_too_much_to_keep_is_found_by_each_quantity(taken, monkeypatch):
    kept = posterior().log_weights(KEY(1), X, 20)
    monkeypatch.setattr(runner, "KEPT", 0)
    again = posterior().log_weights(KEY(1), X, 20)
    assert taken == [len(X)]
    np.testing.assert_allclose(kept, again, atol=1e-4)


def test_rows_are_found_among_those_that_are_kept():
    kept, owner, other = Kept(), object(), object()
    numbers = np.array([7, 2, 5])
    for asked in (numbers, numbers[::-1], np.array([5, 5])):
        found = kept.get((owner,), asked, lambda: {"square": numbers**2})
        np.testing.assert_array_equal(found["square"], asked**2)
    for of, asked in ((other, numbers), (other, np.array([2, 3])), (owner, np.array([9]))):
        assert kept.get((of,), asked, lambda: "made") == "made"


def test_no_number_of_steps_is_too_large():
    """Rows stop by themselves."""
    many, most = (posterior(natural_steps=number).encode(X)["z"] for number in (100, 2**40))
    np.testing.assert_array_equal(many.loc, most.loc)


def test_rows_that_are_chosen_in_any_order_have_their_own_places():
    rows = posterior()._runner.read(X).choose([7, 2, 5])
    np.testing.assert_array_equal(rows.places(np.array([2, 5, 7])), [1, 2, 0])


def test_deterministic_sites_of_rows_are_predicted():
    """Which of them are of their row alone is found out on a few rows, each with its own steps."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.deterministic("above", z + 1)
            numpyro.sample("x", dist.Normal(z, NOISE), obs=x)

    guide = AutoAmortizedNormal(model, SMALL)
    svi = SVI(model, guide, optax.adam(1e-3), Trace_ELBO())
    params = svi.get_params(svi.init(KEY(0), X))
    found = Posterior(guide, params, natural_steps=8)
    np.testing.assert_allclose(
        found.predict(KEY(1), X, 50)["above"], 1 + found.sample(KEY(1), X, 50)["z"], atol=1e-6
    )
