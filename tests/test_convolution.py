"""The layers against flax's own: results, gradients, parameters, transformations, lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_vae.layers.convolution import Conv, ConvTranspose

FLAX = {Conv: nnx.Conv, ConvTranspose: nnx.ConvTranspose}

# layer, shape of the inputs, in and out features, kernel size, further arguments.
IN_SCOPE = {
    "plain": (Conv, (2, 7, 6, 3), 3, 4, (3, 3), {}),
    "strided-same": (Conv, (2, 7, 6, 3), 3, 4, (3, 3), {"strides": 2}),
    "strided-valid": (Conv, (2, 8, 9, 3), 3, 4, (3, 2), {"strides": (2, 3), "padding": "VALID"}),
    "fewer-out": (Conv, (2, 7, 6, 5), 5, 2, (3, 3), {"padding": "VALID"}),
    "fewer-out-strided": (Conv, (2, 7, 6, 5), 5, 2, (4, 3), {"strides": 2}),
    "pointwise": (Conv, (2, 5, 5, 3), 3, 4, (1, 1), {}),
    "stride-over-kernel": (Conv, (2, 9, 9, 3), 3, 4, (2, 1), {"strides": 3}),
    "explicit": (Conv, (2, 7, 6, 3), 3, 4, (3, 3), {"strides": 2, "padding": ((0, 3), (2, 1))}),
    "negative": (Conv, (2, 7, 9, 3), 3, 2, (3, 3), {"padding": ((-1, 0), (1, -2))}),
    "circular": (Conv, (2, 6, 6, 3), 3, 4, (3, 3), {"strides": 2, "padding": "CIRCULAR"}),
    "reflect": (Conv, (2, 6, 6, 3), 3, 4, (3, 3), {"padding": "REFLECT"}),
    "causal": (Conv, (2, 6, 3), 3, 4, 3, {"padding": "CAUSAL", "kernel_dilation": 2}),
    "dilated": (Conv, (2, 9, 9, 3), 3, 4, (3, 2), {"kernel_dilation": (2, 3), "strides": 2}),
    "masked": (Conv, (2, 5, 3), 3, 4, 3, {"mask": np.tri(3)[..., None] * np.ones(4)}),
    "input-dilated": (Conv, (2, 5, 3), 3, 4, 3, {"input_dilation": 2, "padding": 1}),
    "1d": (Conv, (2, 9, 3), 3, 4, 4, {"strides": 2, "use_bias": False}),
    "3d": (Conv, (2, 5, 4, 6, 2), 2, 3, (3, 2, 3), {"strides": (2, 1, 2)}),
    "no-batch": (Conv, (7, 6, 3), 3, 4, (3, 3), {}),
    "batch-axes": (Conv, (2, 3, 7, 6, 3), 3, 4, (3, 3), {"strides": 2}),
    "t-plain": (ConvTranspose, (2, 5, 6, 3), 3, 4, (3, 3), {}),
    "t-fewer-out": (ConvTranspose, (2, 5, 6, 4), 4, 1, (3, 3), {}),
    "t-strided": (ConvTranspose, (2, 5, 6, 4), 4, 3, (3, 3), {"strides": 2}),
    "t-valid": (ConvTranspose, (2, 5, 4, 3), 3, 4, (3, 4), {"strides": (2, 3), "padding": "VALID"}),
    "t-stride-over-kernel": (ConvTranspose, (2, 4, 4, 3), 3, 4, (2, 1), {"strides": 3}),
    "t-stride-over-valid": (
        ConvTranspose, (2, 4, 4, 3), 3, 4, (2, 1), {"strides": 3, "padding": "VALID"}),
    "t-explicit": (
        ConvTranspose, (2, 5, 5, 3), 3, 4, (3, 3), {"strides": 2, "padding": ((0, 3), (2, -1))}),
    "t-dilated": (ConvTranspose, (2, 5, 5, 3), 3, 2, (3, 2), {"strides": 2, "kernel_dilation": 2}),
    "t-mixed-strides": (ConvTranspose, (2, 5, 5, 3), 3, 2, (3, 2), {"strides": (1, 2)}),
    "t-transposed-kernel": (
        ConvTranspose, (2, 5, 5, 3), 3, 2, (3, 4), {"strides": 2, "transpose_kernel": True}),
    "t-1d": (ConvTranspose, (2, 5, 3), 3, 2, 5, {"strides": 3, "use_bias": False}),
    "t-3d": (ConvTranspose, (2, 3, 4, 2, 3), 3, 2, (3, 2, 3), {"strides": (2, 1, 2)}),
    "t-no-batch": (ConvTranspose, (5, 6, 3), 3, 4, (3, 3), {"strides": 2}),
    "t-batch-axes": (ConvTranspose, (2, 3, 5, 4, 3), 3, 4, (3, 3), {"strides": 2}),
}  # fmt: skip
LEFT_TO_XLA = {
    "groups": (Conv, (2, 7, 6, 4), 4, 6, (3, 3), {"feature_group_count": 2}),
    "both-dilated": (
        Conv, (2, 5, 5, 3), 3, 4, (3, 3), {"input_dilation": 2, "strides": 2, "padding": 1}),
    "large": (Conv, (2, 12, 12, 1), 1, 2, (12, 12), {}),
    "no-rows": (Conv, (0, 5, 3), 3, 4, 3, {}),
    "t-circular": (
        ConvTranspose, (2, 5, 5, 3), 3, 4, (3, 3), {"strides": 2, "padding": "CIRCULAR"}),
    "t-masked": (ConvTranspose, (2, 5, 3), 3, 4, 3, {"mask": np.tri(3)[..., None] * np.ones(4)}),
}  # fmt: skip
CASES = IN_SCOPE | LEFT_TO_XLA
FEW = ["strided-same", "fewer-out", "t-fewer-out", "t-strided"]


def pair(case, **more):
    """Our layer, flax's with the same parameters, and inputs."""
    kind, shape, before, after, kernel_size, options = case
    options = {**options, "bias_init": nnx.initializers.normal(), **more}
    ours = kind(before, after, kernel_size, **options, rngs=nnx.Rngs(0))
    theirs = FLAX[kind](before, after, kernel_size, **options, rngs=nnx.Rngs(1))
    nnx.update(theirs, nnx.state(ours))
    return ours, theirs, jax.random.normal(jax.random.key(2), shape)


def pure(layer):
    graph, params = nnx.split(layer)
    return lambda params, inputs: nnx.merge(graph, params)(inputs), params


def assert_close(ours, theirs, tolerance=2e-5):
    def check(one, other):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * 10)

    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(check, ours, theirs)


def outputs_and_gradients(*layers, inputs, transform=lambda apply: apply):
    """For each layer, the outputs and the gradients in parameters and inputs, compiled as one."""

    def run(apply, params, inputs):
        outputs, pullback = jax.vjp(transform(apply), params, inputs)
        cotangent = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
        return outputs, jax.tree.leaves(pullback(cotangent.astype(outputs.dtype)))

    applies, params = zip(*map(pure, layers), strict=True)
    everything = jax.jit(
        lambda params, inputs: [run(*each, inputs) for each in zip(applies, params, strict=True)]
    )
    return everything(params, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_flax(name):
    ours, theirs, inputs = pair(CASES[name])
    assert_close(*outputs_and_gradients(ours, theirs, inputs=inputs))


@pytest.mark.parametrize("name", ["strided-same", "t-strided"])
def test_results_without_jit(name):
    ours, theirs, inputs = pair(CASES[name])
    assert_close(ours(inputs), theirs(inputs))
    assert_close(*(jax.grad(lambda x, f=f: (f(x) ** 2).sum())(inputs) for f in (ours, theirs)))


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(
    "transform",
    [
        jax.jit,
        lambda apply: jax.vmap(apply, (None, 0)),
        lambda apply: lambda params, xs: jax.lax.map(lambda x: apply(params, x), xs),
    ],
    ids=["jit", "vmap", "scan"],
)
def test_transformations(name, transform):
    ours, theirs, inputs = pair(CASES[name])
    (found,) = outputs_and_gradients(ours, inputs=inputs, transform=transform)
    (expected,) = outputs_and_gradients(theirs, inputs=inputs)
    assert_close(found, expected)


@pytest.mark.parametrize("name", FEW)
def test_vmap_over_the_parameters(name):
    ours, theirs, inputs = pair(CASES[name])

    def gradients(layer):
        apply, params = pure(layer)
        many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
        return jax.jit(jax.vmap(jax.grad(lambda p: (apply(p, inputs) ** 2).sum())))(many)

    assert_close(jax.tree.leaves(gradients(ours)), jax.tree.leaves(gradients(theirs)), 1e-4)


@pytest.mark.parametrize("name", ["1d", "t-1d"])
@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_second_derivatives(name, jacobian):
    ours, theirs, inputs = pair(CASES[name])

    def hessian(layer):
        return jax.jit(jacobian(jax.grad(lambda x: (layer(x) ** 3).sum())))(inputs)

    assert_close(hessian(ours), hessian(theirs), 1e-4)


def test_forward_mode_where_xlas_convolution_is_asked_for():
    layer = Conv(1, 2, 3, conv_general_dilated=jax.lax.conv_general_dilated, rngs=nnx.Rngs(0))
    inputs = jnp.ones((1, 4, 1))
    _, tangent = jax.jvp(layer, (inputs,), (inputs,))
    assert_close(tangent, layer(inputs) - layer.bias[...])


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_no_more_than_flax(name, dtype):
    ours, theirs, inputs = pair(CASES[name], dtype=dtype)
    layers = (ours, theirs, pair(CASES[name])[1])
    leaves = map(jax.tree.leaves, outputs_and_gradients(*layers, inputs=inputs))
    for one, other, truth in zip(*leaves, strict=True):
        assert one.dtype == other.dtype
        error, flax_error = (float(jnp.abs(x - truth).max()) for x in (one, other))
        rounding = float(jnp.finfo(dtype).eps * jnp.abs(truth).max())
        assert error <= 1.5 * flax_error + rounding


@pytest.mark.slow
@pytest.mark.parametrize("name", ["strided-same", "t-strided"])
@pytest.mark.parametrize(
    "options",
    [
        {"param_dtype": jnp.bfloat16},
        {"precision": jax.lax.Precision.HIGHEST},
        {"precision": "high"},
        {"preferred_element_type": jnp.float32, "dtype": jnp.bfloat16},
    ],
    ids=str,
)
def test_dtypes_and_precision(name, options):
    ours, theirs, inputs = pair(CASES[name], **options)
    assert_close(ours(inputs), theirs(inputs), 1e-4)
    if "preferred_element_type" in options:
        return  # before JAX 0.10 a convolution of mixed types has no gradient
    assert all(jnp.isfinite(g).all() for g in outputs_and_gradients(ours, inputs=inputs)[0][1])


@pytest.mark.parametrize("name", ["strided-same", "t-strided", "t-transposed-kernel", "1d"])
def test_parameters_are_those_of_flax(name):
    kind, _, before, after, kernel_size, options = CASES[name]
    ours = kind(before, after, kernel_size, **options, rngs=nnx.Rngs(3))
    theirs = FLAX[kind](before, after, kernel_size, **options, rngs=nnx.Rngs(3))
    state, expected = nnx.state(ours), nnx.state(theirs)
    assert nnx.to_pure_dict(state).keys() == nnx.to_pure_dict(expected).keys()
    assert_close(state, expected, 0)


def lowered(layer, inputs, platform):
    apply, params = pure(layer)

    def gradients(params, inputs):
        return jax.grad(lambda *args: (apply(*args) ** 2).sum(), (0, 1))(params, inputs)

    return jax.jit(gradients).trace(params, inputs).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", [*FEW, "causal", "dilated", "input-dilated", "3d", "t-dilated"])
def test_no_convolution_on_cpu_and_one_elsewhere(name):
    ours, _, inputs = pair(IN_SCOPE[name])
    on_cpu = lowered(ours, inputs, "cpu")
    assert "convolution" not in on_cpu
    assert "convolution" in lowered(ours, inputs, "cuda")


def test_a_scan_compiles_to_products_only():
    ours, _, inputs = pair(CASES["strided-same"])
    apply, params = pure(ours)

    def loss(params, batches):
        return jax.lax.map(lambda x: (apply(params, x) ** 2).sum(), batches).sum()

    batches = jnp.stack([inputs, inputs])
    text = jax.jit(jax.grad(loss)).lower(params, batches).compile().as_text()
    assert "convolution(" not in text
    assert "conditional(" not in text
    assert "dot(" in text


@pytest.mark.parametrize("layer", [Conv, ConvTranspose])
def test_wrong_channels_are_refused_as_by_flax(layer):
    inputs = jnp.ones((1, 5, 5, 3))
    with pytest.raises((TypeError, ValueError)) as theirs:
        FLAX[layer](4, 2, (3, 3), rngs=nnx.Rngs(0))(inputs)
    with pytest.raises(theirs.type):
        layer(4, 2, (3, 3), rngs=nnx.Rngs(0))(inputs)
