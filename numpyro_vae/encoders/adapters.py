"""Networks of other frameworks as flax ``nnx`` modules, without importing those frameworks."""

from __future__ import annotations

import inspect
import reprlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, linen, nnx
from flax.core import meta, unfreeze

from numpyro_vae.encoders.base import refuse_segments

__all__ = ["as_module"]

KINDS = """
  * a flax nnx.Module, or a builder called as encoder(example_inputs, rngs=rngs) that returns any
    kind of this list, such as the class MLP or functools.partial(MLP, hidden_sizes=(400,));
  * a flax linen Module, an instance and not its class;
  * an Equinox module, an instance, written for one datum;
  * a pair of functions (init, apply): init(rng_key, example_inputs) -> params and
    apply(params, inputs) -> output, as made by haiku.without_apply_rng(haiku.transform(...)),
    or one for numpyro.module, as of stax: init(rng_key, input_shape) -> (output_shape, params)."""

# The arguments by which linen modules are told whether they train, and what each says if so.
SWITCHES = {"train": True, "training": True, "deterministic": False, "use_running_average": False}


def as_module(encoder: Any, example_inputs: Any, rngs: nnx.Rngs) -> nnx.Module:
    """Return an encoder of any framework as an ``nnx.Module`` from inputs to outputs.

    Args:
        encoder: an ``nnx.Module``, used as it is; a builder; a flax linen module; an Equinox
            module, used with the arrays it has; or a pair of functions ``(init, apply)``.
        example_inputs: the first batch, data along the leading axis.
        rngs: where initial weights come from, and the randomness of dropout.

    Returns:
        A module that computes what the encoder does. Its floating-point arrays are ``nnx.Param``;
        its other collections (batch statistics) are state, updated in training and frozen by
        ``module.eval()``, which turns dropout off too.

    Raises:
        TypeError: if the encoder is none of these.
        ValueError: if it has state or dropout that cannot be told training from evaluation.

    Example:
        >>> from flax import linen
        >>> module = as_module(linen.Dense(4), jnp.ones((8, 3)), nnx.Rngs(0))
        >>> module(jnp.ones((2, 3))).shape
        (2, 4)
    """
    module = _adapt(encoder, example_inputs, rngs)
    if module is None and callable(encoder) and not _is_foreign_class(encoder):
        built = encoder(example_inputs, rngs=rngs)
        module = _adapt(built, example_inputs, rngs)
        if module is None:
            raise TypeError(
                f"The encoder, called as encoder(example_inputs, rngs=rngs), returned "
                f"{_describe(built)}. Return one of:{KINDS}"
            )
    if module is None:
        raise TypeError(f"An encoder is one of:{KINDS}\nFound {_describe(encoder)}.")
    return module


def _adapt(encoder: Any, example_inputs: Any, rngs: nnx.Rngs) -> nnx.Module | None:
    if isinstance(encoder, nnx.Module):
        return encoder
    if isinstance(encoder, linen.Module):
        return LinenEncoder(encoder, example_inputs, rngs=rngs)
    if isinstance(encoder, _equinox_classes()) and callable(encoder):
        return EquinoxEncoder(encoder, rngs=rngs)
    if isinstance(encoder, tuple) and len(encoder) == 2 and all(map(callable, encoder)):
        return FunctionsEncoder(*encoder, example_inputs, rngs=rngs)
    return None


def _equinox_classes() -> tuple[type, ...]:
    """The base class of Equinox modules; there can be none if nobody has imported Equinox."""
    equinox = sys.modules.get("equinox")
    return () if equinox is None else (equinox.Module,)


def _is_foreign_class(encoder: Any) -> bool:
    return isinstance(encoder, type) and issubclass(encoder, (linen.Module, *_equinox_classes()))


def _describe(found: Any) -> str:
    if isinstance(found, type):
        return f"the class {found.__name__}, not an instance of it"
    return f"{reprlib.repr(found)} of type {type(found).__name__}"


class LinenEncoder(nnx.Module):
    """A flax linen module and its variables.

    `flax.nnx.bridge.ToNNX` neither knows of evaluation mode nor updates state unless it is told at
    each call, and it draws a random key whether one is used or not.
    """

    def __init__(self, module: linen.Module, example_inputs: Any, *, rngs: nnx.Rngs):
        self.module = module
        self.deterministic = True
        known = inspect.signature(type(module).__call__).parameters
        # Flax's own layers take what they were not already told when they were constructed.
        self.switches = tuple(
            name for name in SWITCHES if name in known and getattr(module, name, None) is None
        )
        init = module.init(rngs.params(), example_inputs, **self._mode())
        variables = unfreeze(meta.unbox(init))
        self.params = nnx.data(jax.tree.map(nnx.Param, variables.pop("params", {})))
        self.state = nnx.data(jax.tree.map(nnx.BatchStat, variables))
        self.deterministic = False
        is_random = self._draws_random_numbers(example_inputs)
        if (is_random or variables) and not self.switches:
            found = [f"the state {sorted(variables)}"] * bool(variables) + ["dropout"] * is_random
            raise ValueError(
                f"The linen module {type(module).__name__} has {' and '.join(found)}, but its "
                "__call__ has no argument that tells training from evaluation. Write __call__(self,"
                f" inputs, *, train) and hand it on; any of {sorted(SWITCHES)} is understood."
            )
        self.rngs = rngs.dropout.fork() if is_random else None

    def __call__(self, inputs: Any) -> Any:
        """Return the module's output; in training mode, update its state."""
        variables = {"params": _values(self.params), **_values(self.state)}
        draw = self.rngs is not None and not self.deterministic
        # Linen takes any stream that is not named, dropout's too, from this one.
        rngs = {"params": self.rngs()} if draw else None
        if self.deterministic or not self.state:
            return self.module.apply(variables, inputs, rngs=rngs, **self._mode())
        collections = list(self.state)
        output, updated = self.module.apply(
            variables, inputs, rngs=rngs, mutable=collections, **self._mode()
        )
        new = {**_values(self.state), **unfreeze(meta.unbox(updated))}
        jax.tree.map(_assign, self.state, new, is_leaf=_is_variable)
        return output

    def _mode(self) -> dict[str, Any]:
        return {name: SWITCHES[name] != self.deterministic for name in self.switches}

    def _draws_random_numbers(self, example_inputs: Any) -> bool:
        def train(variables: dict, inputs: Any) -> Any:
            return self.module.apply(variables, inputs, mutable=list(self.state), **self._mode())

        variables = {"params": _values(self.params), **_values(self.state)}
        try:
            jax.eval_shape(train, variables, example_inputs)
        except errors.InvalidRngError:
            return True
        return False


class EquinoxEncoder(nnx.Module):
    """An Equinox module, written for one datum, over a batch."""

    def __init__(self, module: Any, *, rngs: nnx.Rngs):
        self.deterministic = False
        self.takes_key = "key" in inspect.signature(type(module).__call__).parameters
        _refuse_equinox_state(module)
        leaves = jax.tree.leaves_with_path(module)
        # The field that equinox.nn.inference_mode sets, wherever it is.
        has_dropout = any(
            _name(path[-1:]) == "inference" and leaf is False for path, leaf in leaves
        )
        if has_dropout and not self.takes_key:
            raise ValueError(
                f"The Equinox module {type(module).__name__} has dropout, but its __call__ takes "
                "no key. Write __call__(self, inputs, *, key=None) and hand the key on."
            )
        self.skeleton, variables = _take_apart(module)
        self.params = nnx.data(variables["params"])
        self.constants = nnx.data(variables["constants"])
        self.rngs = rngs.dropout.fork() if has_dropout else None

    def __call__(self, inputs: Any) -> Any:
        """Return the module's output for each datum, each with a random key of its own."""
        refuse_segments(inputs, "An Equinox module")
        module = self.skeleton.restore({"params": self.params, "constants": self.constants})
        if self.deterministic:
            module = sys.modules["equinox"].nn.inference_mode(module)
        keys = None
        if self.rngs is not None and not self.deterministic:
            keys = jax.random.split(self.rngs(), jax.tree.leaves(inputs)[0].shape[0])

        def one_datum(datum: Any, key: Any) -> Any:
            return module(datum, key=key) if self.takes_key else module(datum)

        return jax.vmap(one_datum)(inputs, keys)


class FunctionsEncoder(nnx.Module):
    """A pair of functions ``init(rng_key, inputs) -> params`` and ``apply(params, inputs)``.

    Or one as `numpyro.module` takes it, ``init(rng_key, input_shape) -> (output_shape, params)``.
    """

    def __init__(
        self,
        init: Callable[[Any, Any], Any],
        apply: Callable[[Any, Any], Any],
        example_inputs: Any,
        *,
        rngs: nnx.Rngs,
    ):
        self.apply = apply
        self.skeleton, variables = _take_apart(_initialize(init, rngs.params(), example_inputs))
        self.params = nnx.data(variables["params"])
        self.constants = nnx.data(variables["constants"])

    def __call__(self, inputs: Any) -> Any:
        """Return ``apply(params, inputs)``, and the list that stax makes of a pair as a tuple."""
        params = self.skeleton.restore({"params": self.params, "constants": self.constants})
        output = self.apply(params, inputs)
        return tuple(output) if isinstance(output, list) else output


def _initialize(init: Callable[[Any, Any], Any], rng_key: Any, example_inputs: Any) -> Any:
    """Return the first parameters of a pair, whose ``init`` may want the shape of its inputs."""
    try:
        return init(rng_key, example_inputs)
    except Exception as error:  # of any kind, as the functions are the user's
        if not isinstance(example_inputs, jax.Array | np.ndarray):
            raise
        try:
            output_shape, params = init(rng_key, example_inputs.shape)
        except Exception:
            raise error from None
        if not isinstance(output_shape, tuple):
            raise
        return params


@dataclass(frozen=True)
class Skeleton:
    """A pytree without its arrays: hashable, so that it can be a static part of a module.

    Attributes:
        treedef: the structure.
        slots: for each leaf where its variable is found, or None and the leaf itself.
    """

    treedef: Any
    slots: tuple[tuple[tuple[str, ...] | None, Any], ...]

    def restore(self, variables: dict[str, Any]) -> Any:
        """Return the pytree with the values of the variables as its arrays."""
        leaves = []
        for names, leaf in self.slots:
            for name in names or ():
                leaf = variables[name] if leaf is None else leaf[name]
            leaves.append(leaf if names is None else leaf[...])
        return jax.tree.unflatten(self.treedef, leaves)


def _take_apart(tree: Any) -> tuple[Skeleton, dict[str, dict]]:
    """Split a pytree into its skeleton and nested dicts of variables, named as its attributes are.

    Floating-point arrays are parameters; other arrays are constants, which may be tracers and
    hence are no part of the skeleton either.
    """
    variables, slots = {"params": {}, "constants": {}}, []
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, jax.Array | np.ndarray):
            slots.append((None, leaf))
            continue
        is_param = jnp.issubdtype(leaf.dtype, jnp.inexact)
        kind, variable = ("params", nnx.Param) if is_param else ("constants", nnx.Variable)
        names = (kind, *(_name((entry,)) for entry in path)) if path else (kind, "value")
        node: dict[str, Any] = variables
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = variable(jnp.asarray(leaf))
        slots.append((names, None))
    return Skeleton(jax.tree.structure(tree), tuple(slots)), variables


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True)


def _refuse_equinox_state(module: Any) -> None:
    index = sys.modules["equinox"].nn.StateIndex
    leaves = jax.tree.leaves_with_path(module, is_leaf=lambda leaf: isinstance(leaf, index))
    for path, leaf in leaves:
        if isinstance(leaf, index):
            raise ValueError(
                f"The Equinox module {type(module).__name__} has state, at "
                f"{jax.tree_util.keystr(path)}, which is not supported. Use a layer without state, "
                "such as equinox.nn.GroupNorm or LayerNorm for BatchNorm, or a flax module."
            )


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _values(variables: Any) -> Any:
    return jax.tree.map(lambda variable: variable[...], variables, is_leaf=_is_variable)


def _assign(variable: nnx.Variable, value: Any) -> None:
    variable[...] = value
