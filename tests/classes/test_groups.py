"""Groups of unequal size: the posterior of each from its own observations, however many."""

from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import train
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceMeanField_ELBO
from scipy import stats

from numpyro_vae import AutoAmortizedNormal, Posterior, Segments, SetEncoder, fit

NUM_GROUPS, LARGEST, NOISE = 40, 30, 0.7
RNG = np.random.default_rng(0)
SIZES = RNG.permutation(np.linspace(1, LARGEST, NUM_GROUPS).astype(int))
GROUP = np.repeat(np.arange(NUM_GROUPS), SIZES)
THETA = RNG.normal(size=NUM_GROUPS)
FLOOR = RNG.integers(0, 2, len(GROUP)).astype(np.float32)
Y = (THETA[GROUP] + NOISE * RNG.normal(size=len(GROUP))).astype(np.float32)
SUMS = np.bincount(GROUP, Y)
SD = (1 + SIZES / NOISE**2) ** -0.5
MEAN = SUMS / NOISE**2 * SD**2
SMALL = partial(SetEncoder, element_sizes=(16,), hidden_sizes=(64,), standardize=True)


def conjugate(group, y):
    with numpyro.plate("groups", NUM_GROUPS):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
    with numpyro.plate("houses", len(y)):
        numpyro.sample("y", dist.Normal(theta[group], NOISE), obs=y)


def padded(y, mask):
    with numpyro.plate("groups", len(y), dim=-2):
        theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        with numpyro.plate("houses", LARGEST, dim=-1), handlers.mask(mask=mask):
            numpyro.sample("y", dist.Normal(theta, NOISE), obs=y)


def varying_intercepts(group, floor, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    with numpyro.plate("groups", NUM_GROUPS):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
    with numpyro.plate("houses", len(y)):
        numpyro.sample("y", dist.Normal(theta[group] + slope * floor, sigma), obs=y)


def log_evidence():
    """Of each group: the data are Normal with what they share as their covariance."""
    return np.array(
        [
            stats.multivariate_normal(np.zeros(size), NOISE**2 * np.eye(size) + 1).logpdf(
                Y[number == GROUP]
            )
            for number, size in enumerate(SIZES)
        ]
    )


def grouped(model=conjugate, segments=None, **options):
    segments = {"houses": lambda group, *_: group} if segments is None else segments
    return AutoAmortizedNormal(model, SMALL, plate="groups", segments=segments, **options)


@pytest.fixture(scope="module")
def ragged():
    options = {"steps": 3000, "particles": 8, "rate": 1e-2, "batch_axes": None}
    return train(grouped(), GROUP, Y, **options), (GROUP, Y), None


@pytest.fixture(scope="module")
def rectangular():
    mask = np.arange(LARGEST) < SIZES[:, None]
    y = np.full(mask.shape, 99.0, np.float32)
    y[mask] = Y  # whose groups are in order
    guide = AutoAmortizedNormal(padded, SMALL, plate="groups")
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 3000))
    svi = SVI(padded, guide, optimizer, TraceMeanField_ELBO(num_particles=8))
    options = {"batch_size": 20, "num_epochs": 1500, "progress_bar": False}
    return Posterior(guide, fit(svi, jax.random.key(0), (y, mask), **options)), (y, mask), 0


@pytest.fixture(params=["ragged", "rectangular"])
def trained(request):
    return request.getfixturevalue(request.param)


@pytest.mark.slow
def test_each_group_has_the_posterior_of_its_own_data(trained):
    posterior, data, batch_axes = trained
    loc, scale = (np.ravel(x) for x in posterior.encode(data)["theta"])
    error = (loc - MEAN) / SD
    assert np.sqrt((error**2).mean()) <= 0.05
    assert np.abs(error).max() <= (0.05 if batch_axes is None else 0.1)  # in minibatches
    assert np.abs(scale / SD - 1).max() <= 0.05


def test_the_evidence_of_each_group_is_exact(trained):
    posterior, data, _ = trained
    found = posterior.check(
        jax.random.key(1),
        data,
        checks=("importance", "collapse"),
    )
    assert np.abs(found.dataset["log_evidence"].values - log_evidence()).max() <= 0.02
    assert (found.dataset["ess"] >= 900).all()


def test_one_group_does_not_depend_on_another(ragged):
    posterior, _, _ = ragged
    changed = np.where(GROUP == 3, Y + 10, Y)
    before = posterior.encode((GROUP, Y))["theta"].loc
    after = posterior.encode((GROUP, changed))["theta"].loc
    assert np.flatnonzero(np.abs(after - before) > 1e-6).tolist() == [3]


def test_segments_may_come_from_the_inputs_instead(ragged):
    """Which is for covariates: the likelihood still needs to know whose data they are."""
    posterior, _, _ = ragged
    guide = grouped(inputs=lambda group, y: Segments({"y": y}, group, NUM_GROUPS))
    again = Posterior(guide, posterior.params, batch_axes=None)
    expected = posterior.encode((GROUP, Y))["theta"]
    found = again.encode((GROUP, Y))["theta"]
    np.testing.assert_array_equal(found.loc, expected.loc)


@pytest.fixture(scope="module")
def nuts():
    data = (GROUP, FLOOR, Y + 1.0 + 0.5 * FLOOR)
    mcmc = MCMC(NUTS(varying_intercepts), num_warmup=500, num_samples=1000, progress_bar=False)
    mcmc.run(jax.random.key(0), *data)
    return data, mcmc.get_samples()


@pytest.mark.slow
@pytest.mark.parametrize("condition_on", [(), ("mu", "tau")])
def test_varying_intercepts_are_those_of_nuts(nuts, condition_on):
    """Means within a tenth of a standard deviation; these within a tenth, on average."""
    data, expected = nuts
    guide = grouped(
        varying_intercepts,
        inputs=lambda group, floor, y: Segments({"floor": floor, "y": y}, group, NUM_GROUPS),
        condition_on=condition_on,
    )
    posterior = train(guide, *data, steps=1500, batch_axes=None)
    found = posterior.sample(jax.random.key(2), data, 2000)
    loc, scale = expected["theta"].mean(0), expected["theta"].std(0)
    shift = np.abs(found["theta"].mean(0) - loc) / scale
    ratio = found["theta"].std(0) / scale
    print(
        f"{condition_on}: shift {shift.mean():.3f}, {shift.max():.3f} at most; sd ratio "
        f"{ratio.mean():.3f}, from {ratio.min():.3f} to {ratio.max():.3f}"
    )
    assert shift.mean() <= 0.1
    assert abs(ratio.mean() - 1) <= 0.1


def test_fit_takes_groups_whole():
    guide = grouped()
    svi = SVI(conjugate, guide, optax.adam(1e-2), Trace_ELBO())
    data = (GROUP, Y)
    options = {"num_epochs": 50, "batch_axes": None, "progress_bar": False}
    result = fit(svi, jax.random.key(0), data, validation=data, **options)
    assert result.losses.shape == result.history["validation_loss"].shape == (50,)
    assert result.losses[-10:].mean() < result.losses[0]
    expected = -log_evidence().mean()  # the loss is one of a group
    assert expected < result.losses[-10:].mean() < 2 * expected


def test_ids_out_of_range():
    wrong = np.where(GROUP == 5, NUM_GROUPS, GROUP)
    with pytest.raises(ValueError, match=r"has the id 40, but there are 40 groups"):
        handlers.seed(grouped(), 0)(wrong, Y)


@pytest.mark.parametrize("ids", [GROUP[1:], GROUP[:, None]])
def test_ids_of_the_wrong_length(ids):
    guide = grouped(segments={"houses": lambda group, y: ids})
    message = rf"plate 'houses' ids of shape .*, expected \({len(Y)},\).*row of plate 'groups'"
    with pytest.raises(ValueError, match=message):
        handlers.seed(guide, 0)(GROUP, Y)


def test_a_plate_that_subsamples_cannot_have_ragged_groups():
    def model(group, y):
        with numpyro.plate("groups", NUM_GROUPS, subsample_size=8):
            theta = numpyro.sample("theta", dist.Normal(0.0, 1.0))
        with numpyro.plate("houses", len(y)):
            numpyro.sample("y", dist.Normal(theta[group % 8], NOISE), obs=y)

    with pytest.raises(ValueError, match=r"'groups' subsamples 8 of 40 rows.*segments= needs all"):
        handlers.seed(grouped(model), 0)(GROUP, Y)


def test_an_unknown_plate():
    guide = grouped(segments={"flats": lambda group, y: group})
    with pytest.raises(ValueError, match=r"no site in plate 'flats'.*\['groups', 'houses'\]"):
        handlers.seed(guide, 0)(GROUP, Y)


def test_observations_in_another_plate_need_segments():
    guide = AutoAmortizedNormal(conjugate, SMALL, plate="groups")
    with pytest.raises(ValueError, match=r"Nothing is observed in plate 'groups'.*segments="):
        handlers.seed(guide, 0)(GROUP, Y)
    guide = AutoAmortizedNormal(
        conjugate, SMALL, plate="groups", inputs=lambda group, y: Segments(y, group, NUM_GROUPS)
    )
    posterior = train(guide, GROUP, Y, steps=2, batch_axes=None)
    message = r"observed site 'y' lies in the plates \['houses'\] and depends on.*\['theta'\]"
    with pytest.raises(ValueError, match=message):
        posterior.sample(jax.random.key(0), (GROUP, Y), 2)
