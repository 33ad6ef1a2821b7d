"""Heads for the tests of families, and what is computed with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from numpyro_vae.families import PointEstimate

NUM_FEATURES, SIZE = 4, 3
NUM_DRAWS = 20_000
# How many standard errors off a Monte Carlo estimate may be: one in a million is further by chance.
SIGMAS = 5.0


# Nearly all of the time of these tests is compilation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


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
    """`function(head, *args)` as NumPy arrays."""
    graphdef, state = nnx.split(head)
    compiled = quick_jit(lambda state, *args: function(nnx.merge(graphdef, state), *args))
    return jax.device_get(compiled(state, *args))


def draws_of(head, *batch):
    """The raw outputs for some data, and many draws."""
    raw = head(features(*batch))
    draws = jit(lambda head, raw: draw(head, raw, (NUM_DRAWS,)), head, raw)
    return raw, draws.astype(np.float64)


def is_point(family):
    return isinstance(family, PointEstimate)
