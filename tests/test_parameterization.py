"""The meaning of a raw output: exact where it can be, finite and alive everywhere."""

import contextlib
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from numpyro_vae.scales.parameterization import (
    PARAMETERIZATIONS,
    AbstractParameterization,
    LogScale,
    LogVariance,
    Scale,
    Softplus,
    for_heads,
    get_parameterization,
    reparameterize,
    saturating_exp,
    saturation_limit,
)

DTYPES = ("bfloat16", "float32", "float64")
EXTREMES = np.array(
    [-1e4, -1e3, -300, -89, -36, -10, -1, -1e-3, 0, 1e-3, 1, 10, 36, 89, 300, 1e3, 1e4]
)
OPTIONS = {
    "plain": {},
    "small": {"init_scale": 0.01},
    "bounded": {"bounds": (1e-3, 10.0)},
    "narrow": {"init_scale": 0.7, "bounds": (0.5, 0.9)},
}
CASES = {
    f"{name}-{label}": cls(**options)
    for name, cls in PARAMETERIZATIONS.items()
    for label, options in OPTIONS.items()
}
every_case = pytest.mark.parametrize("p", CASES.values(), ids=CASES)
every_name = pytest.mark.parametrize("name", PARAMETERIZATIONS)


@pytest.fixture(params=DTYPES)
def dtype(request):
    x64 = jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext()
    with x64:
        yield jnp.dtype(request.param)


def meant(p, low, high, num):
    """Raw outputs between two numbers; of `Scale` those that are scales."""
    return jnp.linspace(1e-3 if isinstance(p, Scale) else low, high, num)


def exact_log_scale(name, raw):
    """In 80-bit arithmetic, whose exponent reaches e**-11355."""
    smallest = np.exp(-np.longdouble(saturation_limit(raw.dtype)))
    raw = np.asarray(raw, np.longdouble)
    if name == "scale":
        return np.log(np.maximum(raw, smallest))
    if name == "softplus":
        return np.log(np.maximum(raw, 0) + np.log1p(np.exp(-np.abs(raw))))
    return raw / 2 if name == "log_variance" else raw


@every_name
def test_log_scale_is_accurate_at_any_raw(name):
    with jax.enable_x64(True):
        raw = np.concatenate([EXTREMES, np.linspace(-50, 50, 997)])
        found = PARAMETERIZATIONS[name]().log_scale(jnp.asarray(raw))
    np.testing.assert_allclose(found, exact_log_scale(name, raw).astype(float), 1e-14, 1e-15)


@every_name
def test_scale_is_accurate_within_the_range(name):
    with jax.enable_x64(True):
        raw = np.linspace(-250, 250, 997)
        found = PARAMETERIZATIONS[name]().scale(jnp.asarray(raw))
        expected = np.exp(exact_log_scale(name, raw)).astype(float)
    np.testing.assert_allclose(found, expected, 1e-13)


@every_name
def test_float32_is_accurate_to_its_rounding(name):
    raw = np.linspace(-30, 30, 997).astype(np.float32)
    p = PARAMETERIZATIONS[name]()
    exact = exact_log_scale(name, raw)
    np.testing.assert_allclose(p.log_scale(raw), exact.astype(float), 5e-7, 2e-7)
    np.testing.assert_allclose(p.scale(raw), np.exp(exact).astype(float), 5e-7)


@every_case
@pytest.mark.parametrize("method", ["scale", "log_scale", "log_variance"])
def test_extreme_raw_is_finite_and_has_a_gradient(p, method, dtype):
    raw = jnp.asarray(EXTREMES, dtype)
    value, slope = jax.vmap(jax.value_and_grad(getattr(p, method)))(raw)
    assert value.dtype == slope.dtype == dtype
    assert jnp.isfinite(value).all()
    assert jnp.isfinite(slope).all()
    assert (slope > 0).all()
    assert (jnp.diff(value) >= 0).all()


@every_case
def test_the_square_of_a_scale_and_its_inverse_are_finite(p, dtype):
    scale = p.scale(jnp.asarray(EXTREMES, dtype))
    for quantity in (scale, scale**2, scale**-2):
        assert jnp.isfinite(quantity).all()
        assert (quantity >= jnp.finfo(dtype).tiny).all()
        assert jnp.isfinite(quantity.sum() * 1e6)


@every_case
def test_scale_increases_with_raw(p):
    with jax.enable_x64(True):
        raw = meant(p, -20, 20, 401)
        assert (jnp.diff(p.scale(raw)) > 0).all()
        assert (jnp.diff(p.log_scale(raw)) > 0).all()
        np.testing.assert_allclose(jnp.log(p.scale(raw)), p.log_scale(raw), 1e-12, 1e-12)


@every_case
def test_inverse_undoes_scale(p):
    with jax.enable_x64(True):
        low, high = p.bounds or (1e-10, 1e10)
        scale = jnp.geomspace(low * 1.01, high * 0.99, 101)
        np.testing.assert_allclose(p.scale(p.inverse(scale)), scale, 1e-9)
        raw = meant(p, -5, 5, 101)
        np.testing.assert_allclose(p.inverse(p.scale(raw)), raw, 1e-9, 1e-9)


@every_case
def test_a_fresh_head_starts_at_init_scale(p):
    assert isinstance(p.init_raw, float)
    np.testing.assert_allclose(p.scale(p.init_raw), p.init_scale, 1e-6)
    np.testing.assert_allclose(p.init_raw, p.inverse(p.init_scale), 1e-6)
    np.testing.assert_allclose(jax.jit(lambda: p.init_raw + jnp.zeros(()))(), p.init_raw, 1e-6)


@every_case
def test_gradients_agree_with_the_naive_formula(p):
    naive = {
        LogScale: jnp.exp,
        LogVariance: lambda raw: jnp.sqrt(jnp.exp(raw)),
        Softplus: lambda raw: jnp.log(1 + jnp.exp(raw)),
        Scale: lambda raw: raw,
    }[type(p)]

    def bounded(raw):
        log_scale = jnp.log(naive(raw))
        if p.bounds is None:
            return jnp.exp(log_scale)
        low, high = np.log(p.bounds)
        m = min(1.0, (high - low) / 4)
        c = jnp.clip(log_scale, low + m, high - m)
        return jnp.exp(c + (log_scale - c) / jnp.sqrt(1 + ((log_scale - c) / m) ** 2))

    with jax.enable_x64(True):
        raw = meant(p, -8, 8, 160)
        for method, reference in (
            (p.scale, bounded),
            (p.log_scale, lambda r: jnp.log(bounded(r))),
            (p.log_variance, lambda r: jnp.log(bounded(r) ** 2)),
        ):
            np.testing.assert_allclose(method(raw), reference(raw), 1e-9, 1e-9)
            slope = jax.vmap(jax.grad(method))(raw)
            np.testing.assert_allclose(slope, jax.vmap(jax.grad(reference))(raw), 1e-8, 1e-9)


@pytest.mark.parametrize("bounds", [None, (1e-3, 10.0)])
def test_log_variance_is_log_scale_of_half_bit_for_bit(bounds, dtype):
    def everything(p, raw):
        return {
            name: jax.vmap(jax.value_and_grad(getattr(p, name)))(raw)
            for name in ("scale", "log_scale")
        }

    half, whole = LogScale(bounds=bounds), LogVariance(bounds=bounds)
    raw = jnp.concatenate([jnp.asarray(EXTREMES, dtype), jnp.linspace(-9, 9, 999, dtype=dtype)])
    compiled = jax.jit(everything, static_argnums=0)
    for evaluate in (everything, compiled) if dtype == jnp.float32 else (compiled,):
        one, two = evaluate(half, raw), evaluate(whole, 2 * raw)
        for name in one:
            assert np.asarray(one[name][0]).tobytes() == np.asarray(two[name][0]).tobytes()
            # The founding factor of two: it is all in the gradient.
            assert np.asarray(one[name][1]).tobytes() == np.asarray(2 * two[name][1]).tobytes()


@every_case
def test_log_variance_is_twice_log_scale_bit_for_bit(p, dtype):
    raw = jnp.asarray(EXTREMES, dtype)
    twice, log_variance = 2 * np.asarray(p.log_scale(raw)), np.asarray(p.log_variance(raw))
    assert twice.tobytes() == log_variance.tobytes()


@every_name
def test_bounds_leave_the_middle_alone_and_hold_the_rest(name):
    free, p = PARAMETERIZATIONS[name](), PARAMETERIZATIONS[name](bounds=(1e-3, 10.0))
    inside = free.inverse(jnp.geomspace(1e-3 * np.e * 1.01, 10 / np.e * 0.99, 301))
    assert (p.log_scale(inside) == free.log_scale(inside)).all()
    beyond = p.scale(jnp.asarray(EXTREMES, jnp.float32))
    assert (beyond >= 1e-3 * (1 - 1e-6)).all()
    assert (beyond <= 10 * (1 + 1e-6)).all()
    # A log-scale bends towards the bounds like its square, and of these two it grows slowly.
    np.testing.assert_allclose(beyond[0], 1e-3, 1e-3 if name == "scale" else 1e-5)
    np.testing.assert_allclose(beyond[-1], 10, 2e-2 if name in ("scale", "softplus") else 1e-5)


def test_bounds_are_twice_differentiable_at_the_joints():
    p = LogScale(bounds=(1e-3, 10.0))
    with jax.enable_x64(True):
        joints = np.array([np.log(1e-3) + 1, np.log(10.0) - 1])
        for order in (jax.grad, lambda f: jax.grad(jax.grad(f))):
            derivative = jax.vmap(order(p.log_scale))
            left, right = derivative(jnp.array(joints - 1e-7)), derivative(jnp.array(joints + 1e-7))
            np.testing.assert_allclose(left, right, atol=1e-5)


def test_saturating_exp_is_exp_until_the_limit(dtype):
    limit = saturation_limit(dtype)
    x = jnp.linspace(-0.99 * limit, 0.99 * limit, 101, dtype=dtype)
    assert (saturating_exp(x) == jnp.exp(x)).all()
    far = jnp.asarray([-1e4, 1e4], dtype)
    value, slope = jax.vmap(jax.value_and_grad(saturating_exp))(far)
    np.testing.assert_allclose(
        np.log(value.astype(float)), [-limit, limit], 4 * jnp.finfo(dtype).eps
    )
    assert (value == slope).all()
    assert jnp.isnan(saturating_exp(jnp.asarray(jnp.nan, dtype)))


def test_a_scale_is_left_as_it_is(dtype):
    raw = jnp.asarray([1e-6, 0.25, 1.0, 3e4], dtype)
    assert (Scale().scale(raw) == raw).all()
    assert (Scale().log_scale(raw) == jnp.log(raw)).all()


def test_what_is_no_scale_is_pulled_back_no_harder_than_from_its_mirror_image(dtype):
    raw = jnp.asarray([-2.0, -0.05, 0.0, 0.05, 2.0], dtype)
    slope = jax.vmap(jax.grad(Scale().log_scale))(raw)
    assert (slope[:2] == slope[:-3:-1]).all()
    assert slope[2] == slope.max()
    assert jnp.isnan(Scale().scale(jnp.asarray(jnp.nan, dtype)))


def test_linear_heads_of_scales_use_softplus():
    p = Scale(init_scale=0.1, bounds=(1e-3, 1.0))
    assert for_heads(p) == Softplus(init_scale=0.1, bounds=(1e-3, 1.0))
    assert for_heads(LogScale()) == LogScale()


@every_case
def test_transformations_pickle_hash_and_equality(p):
    raw = jnp.linspace(-3, 3, 12).reshape(3, 4)
    expected = p.scale(raw)
    np.testing.assert_allclose(jax.jit(p.scale)(raw), expected, 1e-6)
    np.testing.assert_allclose(jax.vmap(jax.vmap(p.scale))(raw), expected, 1e-6)
    static = jax.jit(lambda q, r: q.scale(r), static_argnums=0)
    np.testing.assert_allclose(static(p, raw), expected, 1e-6)
    twin = pickle.loads(pickle.dumps(p))
    assert twin == p
    assert hash(twin) == hash(p)
    assert len({p, twin}) == 1
    assert sum(p == q for q in CASES.values()) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.init_scale = 2.0


@every_name
@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"init_scale": 0.0}, "init_scale=0.0"),
        ({"init_scale": -1.0}, "init_scale=-1.0"),
        ({"init_scale": float("inf")}, "init_scale=inf"),
        ({"init_scale": float("nan")}, "init_scale=nan"),
        ({"init_scale": "one"}, "init_scale='one'"),
        ({"init_scale": None}, "init_scale=None"),
        ({"init_scale": 1e-30}, "init_scale=1e-30"),
        ({"bounds": (2.0, 3.0)}, "init_scale=1.0"),
        ({"bounds": (0.1, 1.0)}, "init_scale=1.0"),
        ({"bounds": (3.0, 0.1)}, r"bounds=\(3.0, 0.1\)"),
        ({"bounds": (0.0, 3.0)}, r"bounds=\(0.0, 3.0\)"),
        ({"bounds": (-1.0, 3.0)}, r"bounds=\(-1.0, 3.0\)"),
        ({"bounds": (0.1, float("inf"))}, r"bounds=\(0.1, inf\)"),
        ({"bounds": (0.1, 1.0, 3.0)}, r"bounds=\(0.1, 1.0, 3.0\)"),
        ({"bounds": ()}, r"bounds=\(\)"),
        ({"bounds": 3.0}, "bounds=3.0"),
    ],
)
def test_unusable_options_are_refused(monkeypatch, name, options, found):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    cls = PARAMETERIZATIONS[name]
    with pytest.raises(ValueError, match=f"{cls.__name__}: .*{found}.*expected .*Change"):
        cls(**options)


def test_options_of_other_numeric_types_become_floats(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as it is for users
    p = LogScale(init_scale=np.float32(0.5), bounds=[np.float64(0.25), 2])
    assert p == LogScale(init_scale=0.5, bounds=(0.25, 2.0))
    assert hash(p) == hash(LogScale(init_scale=0.5, bounds=(0.25, 2.0)))


@every_name
def test_lookup_by_name_and_object(name):
    p = PARAMETERIZATIONS[name]()
    assert get_parameterization(name) == p
    assert get_parameterization(p) is p


@pytest.mark.parametrize("wrong", ["logvar", "LOG_SCALE", "", None, 2, LogScale, ["log_scale"]])
def test_lookup_of_anything_else_is_refused(wrong):
    with pytest.raises(ValueError, match=r"found .*expected one of .*log_scale.*Pass") as error:
        get_parameterization(wrong)
    assert repr(wrong) in str(error.value)
    assert all(name in str(error.value) for name in PARAMETERIZATIONS)


def test_reparameterize_is_loc_plus_scale_times_noise(dtype):
    rng_key, loc = jax.random.key(1), jnp.ones((5, 1), dtype)
    raw = jnp.concatenate([jnp.asarray(EXTREMES, dtype), jnp.linspace(-2, 2, 3, dtype=dtype)])
    eps = jax.random.normal(rng_key, (5, len(raw)), dtype)
    for name, cls in PARAMETERIZATIONS.items():
        p = cls()
        draw = reparameterize(rng_key, loc, raw, name)
        assert draw.dtype == dtype
        assert jnp.isfinite(draw).all()
        assert (draw == loc + p.scale(raw) * eps).all()
        total = lambda a, b, p=p: reparameterize(rng_key, a, b, p).sum(0)  # noqa: E731
        (d_loc, d_raw) = jax.vjp(total, loc, raw)[1](jnp.ones(len(raw), dtype))
        assert (d_loc == len(raw)).all()
        expected = jax.vmap(jax.grad(p.scale))(raw) * eps.sum(0)
        assert jnp.isfinite(d_raw).all()
        tolerance = 16 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            d_raw.astype(float), expected.astype(float), tolerance, tolerance
        )


def test_the_contract_is_abstract_and_three_methods_complete_it():
    with pytest.raises(TypeError, match="abstract"):
        AbstractParameterization()

    class Squareplus(AbstractParameterization):
        def unbounded_scale(self, raw):
            return (raw + jnp.sqrt(raw**2 + 4)) / 2

        def unbounded_log_scale(self, raw):
            return jnp.arcsinh(raw / 2)

        def unbounded_inverse(self, scale):
            return scale - 1 / scale

    p = Squareplus(init_scale=0.3, bounds=(0.1, 5.0))
    np.testing.assert_allclose(p.scale(p.init_raw), 0.3, 1e-5)
    np.testing.assert_allclose(p.scale(jnp.array(1e8)), 5.0, 1e-2)
    assert get_parameterization(p) is p
