"""Encoders of other frameworks: the same function, parameters, state, modes and errors."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.example_libraries import stax

from numpyro_vae import Segments
from numpyro_vae.encoders import as_module

INPUTS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


class Noisy(linen.Module):
    """A linen module with state and dropout; how it is told to train is a class of its own each."""

    def forward(self, inputs, train):
        hidden = linen.Dense(8)(inputs)
        hidden = linen.BatchNorm(use_running_average=not train)(hidden)
        return linen.Dropout(0.5, deterministic=not train)(hidden)


class Train(Noisy):
    @linen.compact
    def __call__(self, inputs, train):
        return self.forward(inputs, train)


class Training(Noisy):
    @linen.compact
    def __call__(self, inputs, *, training=False):
        return self.forward(inputs, training)


class Deterministic(Noisy):
    @linen.compact
    def __call__(self, inputs, *, deterministic):
        return self.forward(inputs, not deterministic)


class Both(Noisy):
    @linen.compact
    def __call__(self, inputs, *, deterministic, use_running_average):
        assert deterministic == use_running_average
        return self.forward(inputs, not deterministic)


class NoSwitch(Noisy):
    @linen.compact
    def __call__(self, inputs):
        return self.forward(inputs, train=True)


class Doubled(linen.Module):
    def __call__(self, inputs):
        return {"z": 2 * inputs}


class Dropped(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    order: jax.Array

    def __init__(self, key):
        self.linear = eqx.nn.Linear(3, 4, key=key)
        self.dropout = eqx.nn.Dropout(0.5)
        self.order = jnp.arange(3)[::-1]

    def __call__(self, inputs, *, key):
        return self.dropout(self.linear(inputs[self.order]), key=key)


class NoKey(eqx.Module):
    dropout: eqx.nn.Dropout

    def __call__(self, inputs):
        return self.dropout(inputs)


class Transformed(NamedTuple):
    """What Haiku returns."""

    init: object
    apply: object


def init(rng_key, inputs):
    return {"mlp/~/linear": [jax.random.normal(rng_key, (inputs.shape[-1], 2)), jnp.ones(2)]}


def apply(params, inputs):
    kernel, bias = params["mlp/~/linear"]
    return inputs @ kernel + bias


def eqx_mlp(key):
    return eqx.nn.MLP(3, 4, 8, 2, key=key)


def round_trip(module):
    """The module after all that a guide does with it."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(nnx.to_pure_dict(params)))
    hash(graphdef)
    params, rest = (nnx.State(nnx.to_pure_dict(part)) for part in (params, rest))
    return nnx.merge(graphdef, params, rest, copy=True)


# The kinds without state are in tests/cases.py.
BUILDERS = {
    "linen": lambda example, rngs: Train(),
    "Equinox": lambda example, rngs: Dropped(rngs.params()),
}


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_what_a_guide_does_with_state_and_dropout(build):
    module = as_module(build, INPUTS, nnx.Rngs(0))
    module.eval()
    graphdef, params, rest = nnx.split(round_trip(module), nnx.Param, ...)

    @jax.jit
    def loss(params, inputs):
        return (nnx.merge(graphdef, params, rest, copy=True)(inputs) ** 2).sum()

    np.testing.assert_allclose(loss(params, INPUTS), (module(INPUTS) ** 2).sum(), rtol=1e-5)
    grads = jax.tree.leaves(jax.grad(loss)(params, INPUTS))
    assert len(grads) >= 2
    assert any((grad != 0).any() for grad in grads)
    other = as_module(build, INPUTS, nnx.Rngs(1))
    other.eval()
    assert not np.allclose(other(INPUTS), module(INPUTS))
    abstract = jax.eval_shape(
        lambda key: nnx.to_pure_dict(nnx.state(as_module(build, INPUTS, nnx.Rngs(key)), nnx.Param)),
        jax.random.key(0),
    )
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, nnx.to_pure_dict(params))


def test_building_twice_compiles_once():
    key = jax.random.key(0)
    for encoder in (linen.Dense(4), eqx_mlp(key), Transformed(init, apply)):
        first, second = (nnx.split(as_module(encoder, INPUTS, nnx.Rngs(key)))[0] for _ in range(2))
        assert first == second
        assert hash(first) == hash(second)


def test_an_nnx_module_is_itself():
    module = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    assert as_module(module, INPUTS, nnx.Rngs(1)) is module


def values(variables):
    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda variable: variable[...], variables, is_leaf=is_variable)


@pytest.mark.parametrize("encoder", [Train(), Training(), Deterministic(), Both()])
def test_linen_state_is_updated_in_training_and_used_in_evaluation(encoder):
    module = round_trip(as_module(encoder, INPUTS, nnx.Rngs(0)))
    params, before = values(module.params), values(module.state)
    train = {name: name in ("train", "training") for name in module.switches}
    _, after = encoder.apply(
        {"params": params, **before},
        INPUTS,
        **train,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
    )
    dropped = [module(INPUTS) == 0 for _ in range(2)]
    assert not np.array_equal(*dropped)
    assert 0.2 < np.mean(dropped) < 0.8
    module = round_trip(as_module(encoder, INPUTS, nnx.Rngs(0)))
    module(INPUTS)
    jax.tree.map(np.testing.assert_allclose, values(module.state), after)

    module.eval()
    evaluate = {name: not value for name, value in train.items()}
    expected = encoder.apply({"params": params, **after}, INPUTS, **evaluate)
    for _ in range(2):
        np.testing.assert_allclose(module(INPUTS), expected, rtol=1e-6)


@pytest.mark.parametrize("layer", [linen.Dropout(0.5), linen.BatchNorm(momentum=0.5)])
def test_layers_of_linen_are_told_the_mode_themselves(layer):
    module = as_module(layer, INPUTS, nnx.Rngs(0))
    assert not np.allclose(module(INPUTS), INPUTS, atol=1e-3)
    module = as_module(layer, INPUTS, nnx.Rngs(0))
    module.eval()
    np.testing.assert_allclose(module(INPUTS), INPUTS, rtol=1e-4)


def test_a_linen_module_without_parameters():
    module = round_trip(as_module(Doubled(), INPUTS, nnx.Rngs(0)))
    np.testing.assert_array_equal(module(INPUTS)["z"], 2 * INPUTS)
    assert not jax.tree.leaves(nnx.state(module))


def test_linen_parameters_keep_their_names():
    module = as_module(linen.Sequential([linen.Dense(4), linen.relu]), INPUTS, nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(module))["params"]
    assert params.keys() == {"layers_0"}
    expected = module.module.apply({"params": params}, INPUTS)
    np.testing.assert_array_equal(module(INPUTS), expected)


def test_an_equinox_module_sees_one_datum_at_a_time():
    original = eqx_mlp(jax.random.key(0))
    module = round_trip(as_module(original, INPUTS, nnx.Rngs(1)))
    np.testing.assert_allclose(module(INPUTS), jax.vmap(original)(INPUTS), rtol=1e-6)
    params = nnx.to_pure_dict(nnx.state(module))["params"]
    np.testing.assert_array_equal(params["layers"]["1"]["weight"], original.layers[1].weight)


def test_equinox_dropout_is_on_in_training_with_a_key_for_each_datum():
    original = Dropped(jax.random.key(0))
    module = round_trip(as_module(original, INPUTS, nnx.Rngs(0)))
    same = np.broadcast_to(INPUTS[:1], (100, 3))
    dropped = module(same) == 0
    assert 0.3 < dropped.mean() < 0.7
    assert len(np.unique(dropped, axis=0)) > 10
    assert not np.array_equal(module(same) == 0, dropped)
    module.eval()
    expected = jax.vmap(lambda x: eqx.nn.inference_mode(original)(x, key=None))(INPUTS)
    np.testing.assert_allclose(module(INPUTS), expected, rtol=1e-6)
    # Only floating-point arrays are parameters.
    params, rest = nnx.split(module, nnx.Param, ...)[1:]
    assert set(nnx.to_pure_dict(params)["params"]) == {"linear"}
    assert set(nnx.to_pure_dict(rest)["constants"]) == {"order"}


def test_functions_are_called_as_they_are():
    module = round_trip(as_module((init, apply), INPUTS, nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(module))["params"]["mlp/~/linear"]
    expected = apply({"mlp/~/linear": [params["0"], params["1"]]}, INPUTS)
    np.testing.assert_array_equal(module(INPUTS), expected)


@pytest.mark.parametrize("is_pair", [False, True])
def test_functions_of_stax_get_the_shape_of_their_inputs(is_pair):
    """As `numpyro.module` calls them; stax makes a list of a pair."""
    heads = [stax.FanOut(2), stax.parallel(stax.Dense(2), stax.Dense(2))] if is_pair else []
    first, apply = stax.serial(stax.Dense(4), stax.Softplus, *heads)
    rngs = nnx.Rngs(0)
    found = as_module((first, apply), INPUTS, rngs)(INPUTS)
    expected = apply(first(nnx.Rngs(0).params(), INPUTS.shape)[1], INPUTS)
    assert isinstance(found, tuple) == is_pair
    jax.tree.map(np.testing.assert_array_equal, found, tuple(expected) if is_pair else expected)


def test_functions_that_fail_on_inputs_and_on_their_shape_fail_as_on_inputs():
    def broken(rng_key, inputs):
        raise KeyError("weights" if isinstance(inputs, np.ndarray) else "shape")

    with pytest.raises(KeyError, match="weights"):
        as_module((broken, apply), INPUTS, nnx.Rngs(0))


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (
            3,
            TypeError,
            "An encoder is one of.*nnx.*linen.*Equinox.*init, apply.*Found 3 of type int",
        ),
        (None, TypeError, "Found None of type NoneType"),
        ([init, apply], TypeError, "of type list"),
        ((init, 3), TypeError, "of type tuple"),
        (linen.Dense, TypeError, "the class Dense, not an instance"),
        (eqx.nn.MLP, TypeError, "the class MLP, not an instance"),
        (lambda x, rngs: "net", TypeError, "returned 'net' of type str"),
        (
            lambda x, rngs: linen.Dense,
            TypeError,
            "returned the class Dense, not an instance",
        ),
        (NoSwitch(), ValueError, r"NoSwitch has the state \['batch_stats'\] and dropout.*train"),
        (linen.Dropout(0.5, deterministic=False), ValueError, "Dropout has dropout, but"),
        (NoKey(eqx.nn.Dropout(0.5)), ValueError, "NoKey has dropout.*takes no key"),
    ],
)
def test_what_is_no_encoder_is_refused(encoder, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        as_module(encoder, INPUTS, nnx.Rngs(0))


def test_equinox_state_is_refused():
    norm = eqx.nn.BatchNorm(3, axis_name="batch", mode="batch")
    with pytest.raises(ValueError, match=r"(?s)Sequential has state, at \.layers\[0\].*GroupNorm"):
        as_module(eqx.nn.Sequential([norm]), INPUTS, nnx.Rngs(0))


def test_an_equinox_module_reads_no_groups():
    module = as_module(eqx_mlp(jax.random.key(0)), INPUTS, nnx.Rngs(0))
    with pytest.raises(ValueError, match="An Equinox module cannot read Segments"):
        module(Segments(INPUTS, np.zeros(6, int), 1))
