"""The common battery for families: what every distribution over a datum's latents must do."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FAMILIES
from flax import nnx
from scipy import stats

from numpyro_vae import DiagonalNormal, Flow, FullRankNormal, LowRankNormal, PointEstimate

NORMALS = [name for name in FAMILIES if "diagonal" in name or "rank" in name]
NUM_FEATURES, SIZE = 4, 3
NUM_DRAWS = 20_000
# How many standard errors off a Monte Carlo estimate may be: one in a million is further by chance.
SIGMAS = 5.0


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@functools.cache
def fresh(family, size=SIZE):
    return family.head(NUM_FEATURES, size, rngs=nnx.Rngs(0))


@functools.cache
def trained(family, size=SIZE):
    """A head with weights as far from the start as training may bring them."""
    graphdef, state = nnx.split(fresh(family, size))
    rng = np.random.default_rng(3)
    state = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype), state)
    return nnx.merge(graphdef, state)


def features(*batch):
    return jnp.asarray(np.random.default_rng(1).normal(size=(*batch, NUM_FEATURES)))


def draw(head, raw, sample_shape=()):
    return head.distribution(raw).sample(jax.random.key(2), sample_shape)


def log_prob(head, raw, value):
    return head.distribution(raw).log_prob(value)


def own_log_prob(head, raw):
    """The density of its own draw, as NumPyro's ELBOs take it."""
    joint = head.distribution(raw)
    value, intermediates = joint.sample_with_intermediates(jax.random.key(2))
    return joint.log_prob(value, intermediates) if intermediates else joint.log_prob(value)


def jit(function, head, *args):
    """`function(head, *args)` as one compiled function, for compiling is what takes the time."""
    graphdef, state = nnx.split(head)
    compiled = jax.jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))
    return jax.device_get(compiled(state, *args))


def draws_of(head, *batch):
    """The raw outputs for some data, and many draws."""
    raw = head(features(*batch))
    draws = jit(lambda head, raw: draw(head, raw, (NUM_DRAWS,)), head, raw)
    return raw, draws.astype(np.float64)


def is_point(family):
    return isinstance(family, PointEstimate)


# -- shapes and transformations -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, SIZE])
@pytest.mark.parametrize("batch", [(), (5,), (2, 5)])
def test_shapes(family, batch, size):
    family = LowRankNormal(1) if size == 1 and isinstance(family, LowRankNormal) else family
    head = fresh(family, size)

    def everything(x):
        raw = head(x)
        joint, marginals = head.distribution(raw), head.marginals(raw)
        assert (joint.batch_shape, joint.event_shape) == (batch, (size,))
        draws = draw(head, raw, (7,))
        each = ()
        if marginals is not None:
            assert (marginals.batch_shape, marginals.event_shape) == ((*batch, size), ())
            each = (marginals.mean, marginals.variance, marginals.icdf(0.3))
        return raw, draws, joint.log_prob(draws), own_log_prob(head, raw), each

    raw, draws, density, own, each = jax.eval_shape(everything, features(*batch))
    assert all(leaf.shape[: len(batch)] == batch for leaf in jax.tree.leaves(raw))
    assert (draws.shape, density.shape, own.shape) == ((7, *batch, size), (7, *batch), batch)
    assert all(leaf.shape == (*batch, size) for leaf in each)


def test_the_maths_of_one_datum_is_that_of_a_batch_in_float64(family):
    def both(head, x):
        raw = head(x)
        draws, own = draw(head, raw, (11,)), draw(head, raw)
        one = jax.vmap(functools.partial(log_prob, head), (0, 1), 1)(raw, draws)
        alone = log_prob(head, head(x[2]), draws[:, 2])
        shared = log_prob(head, raw, draws[0, 2])  # one value for all data
        batched = log_prob(head, raw, draws)
        return draws, batched, one, alone, shared, log_prob(head, raw, own), own_log_prob(head, raw)

    with jax.enable_x64(True):
        draws, batched, one, alone, shared, own, by_noise = jit(both, trained(family), features(5))
    assert draws.dtype == batched.dtype == by_noise.dtype == np.float64
    assert np.isfinite(batched).all()
    np.testing.assert_allclose(one, batched, 1e-9)
    np.testing.assert_allclose(alone, batched[:, 2], 1e-9)
    np.testing.assert_allclose(shared[2], batched[0, 2], 1e-9)
    np.testing.assert_allclose(by_noise, own, 1e-9)


def test_the_distribution_passes_through_jit(family):
    def make(head, x):
        return head.distribution(head(x))

    joint = jit(make, trained(family), features(5))
    value = jax.jit(lambda d: d.sample(jax.random.key(2)))(joint)
    np.testing.assert_allclose(value, draw(trained(family), trained(family)(features(5))), 1e-5)
    again = jax.jit(lambda d: jax.tree.map(lambda x: x, d))(joint)
    density = jax.jit(lambda d, x: d.log_prob(x))
    np.testing.assert_array_equal(density(again, value), density(joint, value))


def test_pickling(family):
    same = pickle.loads(pickle.dumps(family))
    assert same == family
    assert hash(same) == hash(family)
    head = trained(family)
    state = pickle.loads(pickle.dumps(nnx.to_pure_dict(nnx.state(head))))
    other = same.head(NUM_FEATURES, SIZE, rngs=nnx.Rngs(1))
    nnx.update(other, nnx.State(state))
    jax.tree.map(np.testing.assert_array_equal, other(features(5)), head(features(5)))
    np.testing.assert_array_equal(draw(other, other(features(5))), draw(head, head(features(5))))


def test_a_head_has_nothing_but_parameters_in_float32(family):
    for x64 in (False, True):
        with jax.enable_x64(x64):
            head = family.head(NUM_FEATURES, SIZE, rngs=nnx.Rngs(0))
            assert not jax.tree.leaves(nnx.state(head, nnx.Not(nnx.Param)))
            assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(head))} == {np.dtype("f4")}


# -- gradients ------------------------------------------------------------------------------------


def test_gradient_reaches_every_weight_and_the_features(family):
    graphdef, state = nnx.split(fresh(family))
    value = draw(trained(family), trained(family)(features(5)))

    def through_draws(state, x):
        head = nnx.merge(graphdef, state)
        return (head.distribution(head(x)).rsample(jax.random.key(2)) ** 2).sum()

    def through_density(state, x):
        head = nnx.merge(graphdef, state)
        return log_prob(head, head(x), value).sum()

    losses = (through_draws, through_density)
    gradients = jax.jit(lambda state, x: [jax.grad(loss, (0, 1))(state, x) for loss in losses])
    for state in (nnx.state(fresh(family)), nnx.state(trained(family))):
        found = jax.device_get(gradients(state, features(5)))
        for loss, (grads, d_features) in zip(losses, found, strict=True):
            # The density of a point is constant wherever it is not infinite.
            expected = not (is_point(family) and loss is through_density)
            assert (d_features != 0).any(-1).all() == expected
            for path, grad in jax.tree.leaves_with_path(nnx.to_pure_dict(grads)):
                assert bool((grad != 0).any()) == expected, (loss, path)


def test_value_and_gradients_are_finite_at_extremes(family):
    head = trained(family)
    leaves, treedef = jax.tree.flatten(head(features(2)))

    def losses(leaves):
        raw = jax.tree.unflatten(treedef, leaves)
        spread, value = head.marginals(raw), draw(head, raw)
        ends = 0.0 if spread is None else (spread.icdf(0.1) + spread.variance).sum()
        densities = log_prob(head, raw, value).sum(), own_log_prob(head, raw).sum()
        terms = jnp.stack([*densities, value.sum(), ends])
        return terms.sum(), terms

    @jax.jit
    @jax.vmap
    def check(leaves):
        return jax.value_and_grad(losses, has_aux=True)(leaves)

    # Each output by itself, and all of them, at both ends.
    is_far = np.concatenate([np.eye(len(leaves)), np.ones((1, len(leaves)))]) > 0
    is_far, extreme = np.concatenate([is_far, is_far]), np.repeat([-1e4, 1e4], len(is_far))
    cases = [
        np.where(far[:, None, None], np.float32(extreme)[:, None, None], x)
        for far, x in zip(is_far.T, leaves, strict=True)
    ]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(check(cases))))


# -- densities ------------------------------------------------------------------------------------


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


# -- draws ----------------------------------------------------------------------------------------


def test_a_head_starts_at_the_initial_scale(family):
    _, draws = draws_of(fresh(family), 5)
    expected = 0.0 if is_point(family) else family.parameterization.init_scale
    np.testing.assert_allclose(draws.std(0), expected, rtol=0.04, atol=1e-6)


def test_draws_have_the_marginals(family):
    head = trained(family)
    raw, draws = draws_of(head, 5)
    marginals = head.marginals(raw)
    if marginals is None:
        assert isinstance(family, Flow)
        return
    mean, variance = np.asarray(marginals.mean), np.asarray(marginals.variance)
    error = draws.std(0) / np.sqrt(NUM_DRAWS)
    assert (abs(draws.mean(0) - mean) <= SIGMAS * error + 1e-6).all()
    # The variance of a Normal's sample variance is 2 variance**2 / n.
    error = variance * np.sqrt(2 / NUM_DRAWS)
    assert (abs(draws.var(0) - variance) <= SIGMAS * error + 1e-6).all()
    for q in (0.05, 0.5, 0.9):
        if is_point(family):
            np.testing.assert_array_equal(marginals.icdf(q), draws[0])
            continue
        error = np.sqrt(q * (1 - q) / NUM_DRAWS)
        assert (abs((draws < np.asarray(marginals.icdf(q))).mean(0) - q) <= SIGMAS * error).all()


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


# -- what is special to one family ----------------------------------------------------------------


def test_the_full_rank_family_starts_diagonal():
    lower = fresh(FullRankNormal())(features(5))[2]
    assert lower.shape == (5, 3)
    assert (lower == 0).all()


def test_a_large_factor_of_low_rank_is_bounded_and_a_small_one_is_not():
    head = fresh(LowRankNormal(2))
    for norm, expected in ((1.0, 1.0), (1e4, 1e3)):
        raw = (jnp.zeros(3), jnp.zeros(3), jnp.zeros(6).at[2].set(norm))
        scale = np.sqrt(head.marginals(raw).variance)
        np.testing.assert_allclose(scale, [1, np.hypot(1, expected), 1], 6e-3)


def jacobian_of_layers(head, x):
    """Of what the layers make of the noise, before it is scaled and shifted."""
    *layers, _ = head.distribution(head(x)).transforms
    push = functools.partial(functools.reduce, lambda x, f: f(x), layers)
    return jax.jacfwd(push)(jnp.linspace(-1, 1, head.loc.out_features))


@pytest.mark.parametrize("size", [2, 5])
def test_a_layer_of_a_flow_sees_the_values_before_and_two_see_all(size):
    jacobian = jit(jacobian_of_layers, trained(Flow(1, (16, 16)), size), features())[::-1]
    assert (np.triu(jacobian, 1) == 0).all()
    assert (abs(jacobian[np.tril_indices(size)]) > 1e-4).all()
    jacobian = jit(jacobian_of_layers, trained(Flow(2), size), features())
    assert (abs(jacobian) > 1e-5).all()


def test_a_flow_starts_near_a_normal_and_does_not_stay_there():
    def distance(head, x):
        raw = head(x)
        values = draw(head, raw, (50,))
        return log_prob(head, raw, values) - log_prob(fresh(DiagonalNormal()), raw[:2], values)

    assert abs(jit(distance, fresh(Flow()), features(5))).max() < 0.1
    assert abs(jit(distance, trained(Flow()), features(5))).max() > 1.0
    # A single value has none before it.
    head = trained(Flow(), 1)
    assert len(head.distribution(head(features(5))).transforms) == 1


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
        (lambda: Flow(0), r"num_layers=0.*at least one layer.*DiagonalNormal"),
        (lambda: Flow(2, ()), r"hidden_sizes=\(\)"),
        (lambda: Flow(2, (8, 0)), r"hidden_sizes=\(8, 0\)"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_only_a_family_made_of_pairs_takes_a_pair(family):
    if isinstance(family, DiagonalNormal):
        raw = (jnp.zeros((5, 3)), jnp.ones((5, 3)))
        assert family.pair()(raw) is raw
        assert family.pair().marginals(raw).batch_shape == (5, 3)
    else:
        with pytest.raises(TypeError, match=f"{type(family).__name__} needs features"):
            family.pair()
