"""The densities of families against independent ones, and what is special to one family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAMILIES
from flax import nnx
from heads import (
    NUM_DRAWS,
    SIGMAS,
    SIZE,
    draw,
    draws_of,
    features,
    fresh,
    jit,
    log_prob,
    own_log_prob,
    trained,
)
from scipy import stats

from numpyro_vae.families import DiagonalNormal, Flow, FullRankNormal, LowRankNormal

NORMALS = [name for name in FAMILIES if "diagonal" in name or "rank" in name]


def covariance(family, head, raw):
    """What the documentation says, in NumPy."""
    loc, raw_scale, *shape = (np.asarray(x, np.float64) for x in raw)
    scale = np.asarray(head.parameterization.scale(raw_scale), np.float64)
    correlation = np.eye(len(loc))
    if isinstance(family, FullRankNormal):
        correlation[np.tril_indices(len(loc), -1)] = shape[0]
        correlation = correlation @ correlation.T
    elif isinstance(family, LowRankNormal):
        factor = shape[0].reshape(len(loc), -1)
        factor = factor / np.sqrt(1 + (factor**2).sum() / 1e6)
        correlation = correlation + factor @ factor.T
    return scale[:, None] * correlation * scale


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full rank", "flow", "flow, deep"])
def test_density_by_change_of_variables(name):
    """The Jacobian of the map from noise to draw by forward differentiation."""

    def compare(head, x):
        joint = head.distribution(head(x))
        value, intermediates = joint.sample_with_intermediates(jax.random.key(2))
        noise = intermediates[0][0]
        push = functools.partial(functools.reduce, lambda x, f: f(x), joint.transforms)
        _, log_det = jnp.linalg.slogdet(jax.jacfwd(push)(noise))
        expected = joint.base_dist.log_prob(noise) - log_det
        found = joint.log_prob(value), joint.log_prob(value, intermediates)
        return push(noise) - value, log_det, expected, found

    with jax.enable_x64(True):
        difference, log_det, expected, found = jit(compare, trained(FAMILIES[name]), features())
        np.testing.assert_allclose(difference, 0, atol=1e-12)
        np.testing.assert_allclose(found, expected, 1e-9)
        assert abs(log_det) > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_products_of_matrices_are_not_shortened_on_a_gpu(name):
    """An inverse would magnify the difference, and a draw have the density of another."""
    head = trained(FAMILIES[name])
    raw = head(features())

    def used(raw):
        value = draw(head, raw)
        return value, own_log_prob(head, raw), log_prob(head, raw, value)

    text = str(jax.make_jaxpr(used)(raw))
    assert text.count("dot_general[") == text.count("precision=(Precision.HIGHEST")
    if "rank" in name or "flow" in name:
        assert "dot_general[" in text


@pytest.mark.parametrize("name", NORMALS)
def test_normals_agree_with_scipy(name):
    with jax.enable_x64(True):
        head = trained(FAMILIES[name])
        raw = head(features())
        reference = stats.multivariate_normal(raw[0], covariance(FAMILIES[name], head, raw))
        values = raw[0] + np.random.default_rng(0).normal(size=(9, SIZE))
        np.testing.assert_allclose(jit(log_prob, head, raw, values), reference.logpdf(values), 1e-9)
        marginals = head.marginals(raw)
        np.testing.assert_allclose(marginals.mean, reference.mean, 1e-12)
        np.testing.assert_allclose(marginals.variance, np.diag(reference.cov), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full rank", "rank 1", "flow", "flow, deep"])
def test_a_density_integrates_to_one(name):
    head = trained(FAMILIES[name], 2)
    raw, draws = draws_of(head)
    low, high, margin = draws.min(0), draws.max(0), draws.std(0)
    axes = np.linspace(low - margin, high + margin, 400).T
    grid = np.stack(np.meshgrid(*axes), -1)
    cell = np.prod(axes[:, 1] - axes[:, 0])
    total = np.exp(jit(log_prob, head, raw, grid)).sum() * cell
    np.testing.assert_allclose(total, 1.0, atol=2e-3)


@pytest.mark.parametrize("name", NORMALS)
def test_draws_have_the_covariance(name):
    head = trained(FAMILIES[name])
    raw, draws = draws_of(head)
    expected = covariance(FAMILIES[name], head, raw)
    # The variance of a Normal's sample covariance is (c_ii c_jj + c_ij**2) / n.
    variances = np.outer(np.diag(expected), np.diag(expected))
    error = np.sqrt((variances + expected**2) / NUM_DRAWS)
    assert (abs(np.cov(draws.T) - expected) <= SIGMAS * error).all()
    off_diagonal = abs(expected / np.sqrt(variances) - np.eye(SIZE)).max()
    assert (off_diagonal > 0.1) == ("diagonal" not in name)


# -- what is special to one family -----------------------------------------------------------------


def test_the_full_rank_family_starts_diagonal():
    lower = fresh(FullRankNormal())(features(5))[2]
    assert lower.shape == (5, 3)
    assert (lower == 0).all()


def test_a_step_moves_correlations_no_further_in_a_wide_network():
    """A factor that is thrown far has an inverse that is lost in rounding."""

    def moved(num_features, size):
        head = FullRankNormal().head(num_features, size, rngs=nnx.Rngs(0))
        head.lower.kernel[...] += 1e-3  # as Adam does, with slopes of one sign
        raw = head(jnp.full(num_features, 7 / num_features**0.5))
        return np.linalg.norm(raw[2][-size + 1 :])  # of the last row

    assert moved(64, 8) < moved(128, 16) == pytest.approx(0.31, abs=0.01)
    assert moved(1024, 40) < moved(512, 40) < moved(128, 16)


def test_a_large_factor_of_low_rank_is_bounded_and_a_small_one_is_not():
    head = fresh(LowRankNormal(2))
    for norm, expected in ((1.0, 1.0), (1e4, 1e3)):
        raw = (jnp.zeros(3), jnp.zeros(3), jnp.zeros(6).at[2].set(norm))
        scale = np.sqrt(head.marginals(raw).variance)
        np.testing.assert_allclose(scale, [1, np.hypot(1, expected), 1], 6e-3)


def layers_of(head, x):
    """The layers, without the tails before them and what correlates, scales and shifts."""
    return head.distribution(head(x)).transforms[1:-2]


def jacobian_of_layers(head, x):
    push = functools.partial(functools.reduce, lambda x, f: f(x), layers_of(head, x))
    return jax.jacfwd(push)(jnp.linspace(-1, 1, head.normal.size))


@pytest.mark.parametrize("size", [2, 5])
def test_a_layer_of_a_flow_bends_half_of_the_values_by_the_others_and_four_bend_all(size):
    jacobian = jit(jacobian_of_layers, trained(Flow(1, (16, 16)), size), features())
    half, off_diagonal = np.arange(size) % 2 == 0, ~np.eye(size, dtype=bool)
    assert (jacobian[~half] == np.eye(size)[~half]).all()
    assert (jacobian[np.ix_(half, half)][off_diagonal[np.ix_(half, half)]] == 0).all()
    assert (abs(jacobian[np.ix_(half, ~half)]) > 1e-5).all()
    jacobian = jit(jacobian_of_layers, trained(Flow(4), size), features())
    assert (abs(jacobian) > 1e-6).all()


@pytest.mark.parametrize("size", [2, 3])
def test_a_layer_of_a_flow_is_undone_also_beyond_the_splines(size):
    values = np.random.default_rng(0).normal(size=(200, size)) * 3

    def there_and_back(head, x, values):
        layer = layers_of(head, x)[0]
        y = layer(values)
        return y, layer.inv(y), layer(layer.inv(values))

    with jax.enable_x64(True):
        found = jit(there_and_back, trained(Flow(1), size), features(), jnp.asarray(values))
    assert abs(values).max() > 4
    assert abs(found[0] - values).max() > 0.1
    np.testing.assert_allclose(found[1], values, atol=1e-9)
    np.testing.assert_allclose(found[2], values, atol=1e-9)


@pytest.mark.slow
def test_a_flow_starts_near_a_normal_and_does_not_stay_there():
    def distance(normal, head, x):
        raw = head(x)
        values = draw(head, raw, (50,))
        return log_prob(head, raw, values) - log_prob(normal, raw[:2], values)

    def mean_distance(head, size):
        normal = fresh(DiagonalNormal(), size)  # not within jit, as it is kept
        return abs(jit(functools.partial(distance, normal), head, features(5))).mean()

    assert mean_distance(fresh(Flow()), SIZE) < 0.1
    for size in (1, SIZE):  # the datum bends a single value too
        assert mean_distance(trained(Flow(), size), size) > 0.5


@pytest.mark.parametrize("size", [1, 3])
def test_weights_of_a_flow_are_bounded_where_the_posterior_is_normal(size):
    """Its tails are the heavier ones, for a small part of a nat."""
    head = fresh(Flow(), size)
    loc, raw_scale, *others = head(features())
    raw = (jnp.zeros(size), raw_scale + 0.02 / size**0.5, *others)
    normal = fresh(DiagonalNormal(), size)
    far = 8.0 * jnp.eye(size) * jnp.exp(raw_scale)
    assert (jit(log_prob, head, raw, far) > jit(log_prob, normal, (loc * 0, raw_scale), far)).all()


def test_a_flow_of_one_value_is_bent():
    head = trained(Flow(), 1)
    bend, *rest = head.distribution(head(features(5))).transforms
    assert len(rest) == 2  # a single value has none beside it, and so there are no layers
    x = jnp.linspace(-6, 6, 13)[:, None, None] * jnp.ones((5, 1))
    np.testing.assert_allclose(bend.inv(bend(x)), x, atol=1e-5)
    np.testing.assert_allclose(bend(0 * x), 0, atol=1e-6)


@pytest.mark.parametrize("name", ["full rank", "rank 1", "flow"])
def test_density_of_a_draw_is_exact_where_scale_is_below_rounding(name):
    head = trained(FAMILIES[name])
    loc, raw_scale, *shape = head(features())
    raw_scale = jnp.full_like(raw_scale, -12.0)  # the spacing of floats near 1e3 is 10 scales
    far, near = (jit(own_log_prob, head, (x, raw_scale, *shape)) for x in (loc + 1e3, loc))
    np.testing.assert_allclose(far, near, 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankNormal(0), r"rank=0, expected at least 1.*DiagonalNormal"),
        (lambda: fresh(LowRankNormal(4)), r"rank=4 for 3 .* at most 3.*FullRankNormal"),
        (lambda: Flow(0), r"num_layers=0.*at least one layer.*FullRankNormal"),
        (lambda: Flow(2, ()), r"hidden_sizes=\(\)"),
        (lambda: Flow(2, (8, 0)), r"hidden_sizes=\(8, 0\)"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", [name for name in NORMALS if "rank" in name])
def test_density_of_some_values_is_their_marginal(name):
    family, masks = FAMILIES[name], ~np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 1]], bool)

    def compare(head, x):
        raw = head(x)
        value = head.distribution(raw).sample(jax.random.key(2))
        lost = jnp.where(jnp.asarray(masks), value, 1e3)  # what does not count may be anything
        density = jax.vmap(lambda mask, value: head.part(raw, mask).log_prob(value))
        slope = jax.jacobian(lambda raw: head.part(raw, jnp.asarray(masks[1])).log_prob(value))(raw)
        return raw, value, density(jnp.asarray(masks), lost), slope

    with jax.enable_x64(True):
        raw, value, found, slopes = jit(compare, trained(family), features())
    head, loc, value = trained(family), np.asarray(raw[0]), np.asarray(value)
    cov = covariance(family, head, raw)
    for mask, density in zip(masks, found, strict=True):
        part = stats.multivariate_normal(loc[mask], cov[np.ix_(mask, mask)])
        assert density == pytest.approx(part.logpdf(value[mask]), abs=1e-6)
    assert all(np.isfinite(slope).all() for slope in slopes)
