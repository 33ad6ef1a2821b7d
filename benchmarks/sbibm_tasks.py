"""The models of `sbibm.py`: eight tasks of a benchmark that is published, each of one data set."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

NOISE = math.sqrt(0.1)  # of the linear tasks, in which it is a variance that is 0.1

# -- the models of one data set --------------------------------------------------------------------


def gaussian_linear(x: jax.Array) -> None:
    theta = numpyro.sample("theta", dist.Normal(0.0, NOISE).expand([10]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, NOISE).to_event(1), obs=x)


def gaussian_linear_uniform(x: jax.Array) -> None:
    theta = numpyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([10]).to_event(1))
    numpyro.sample("x", dist.Normal(theta, NOISE).to_event(1), obs=x)


def gaussian_mixture(x: jax.Array) -> None:
    theta = numpyro.sample("theta", dist.Uniform(-10.0, 10.0).expand([2]).to_event(1))
    parts = [dist.Normal(theta, scale).to_event(1) for scale in (1.0, 0.1)]
    either = dist.Categorical(probs=jnp.array([0.5, 0.5]))
    numpyro.sample("x", dist.MixtureGeneral(either, parts), obs=x)


def slcp(x: jax.Array) -> None:
    theta = jnp.asarray(numpyro.sample("theta", dist.Uniform(-3.0, 3.0).expand([5]).to_event(1)))
    scale, corr = theta[2:4] ** 2, jnp.tanh(theta[4])
    correlation = jnp.eye(2) + corr * (1.0 - jnp.eye(2))
    covariance = jnp.outer(scale, scale) * correlation + 1e-6 * jnp.eye(2)
    with numpyro.plate("point", 4):
        numpyro.sample("x", dist.MultivariateNormal(theta[:2], covariance), obs=x)


class Crescent(dist.Distribution):
    """Points on half a ring around ``loc``, which is about 0.1 wide and 0.01 thick."""

    support = constraints.real_vector
    pytree_data_fields = ("loc",)

    def __init__(self, loc: Any):
        self.loc = loc
        super().__init__(jnp.shape(loc)[:-1], (2,))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        keys, shape = jax.random.split(key), sample_shape + self.batch_shape
        angle = jax.random.uniform(keys[0], shape, minval=-math.pi / 2, maxval=math.pi / 2)
        radius = 0.1 + 0.01 * jax.random.normal(keys[1], shape)
        return self.loc + radius[..., None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        del intermediates
        offset = value - self.loc
        radius = jnp.linalg.norm(offset, axis=-1)
        log_prob = dist.Normal(0.1, 0.01).log_prob(radius) - jnp.log(math.pi * radius)
        return jnp.where(offset[..., 0] > 0, log_prob, -jnp.inf)


def two_moons(x: jax.Array) -> None:
    theta = jnp.asarray(numpyro.sample("theta", dist.Uniform(-1.0, 1.0).expand([2]).to_event(1)))
    total, difference = theta.sum() / math.sqrt(2.0), (theta[1] - theta[0]) / math.sqrt(2.0)
    loc = jnp.array([0.25, 0.0]) + jnp.stack([-jnp.abs(total), difference])
    numpyro.sample("x", Crescent(loc), obs=x)


def _stimulus() -> np.ndarray:
    """Return for each time a 1 and the noise at it and at the eight times before."""
    noise = np.random.RandomState(42).randn(100)
    delayed = [np.concatenate([np.zeros(delay), noise[: 100 - delay]]) for delay in range(9)]
    return np.stack([np.ones(100), *delayed], -1).astype(np.float32)


def _smoothing() -> np.ndarray:
    """Return the precision of a filter's values, which vary smoothly."""
    differences = np.eye(9) - np.eye(9, k=-1)
    root = differences @ differences + np.diag(np.sqrt(np.arange(9) / 9))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, root.T @ root
    return precision.astype(np.float32)


STIMULUS, SMOOTHING = _stimulus(), _smoothing()


class Spikes(dist.Distribution):
    """How many of 100 times have a spike, and the sums of the stimulus before these.

    They are all that the spikes say of the weights, and the density is that of spikes, which is
    another one but for a factor without the weights.
    """

    support = constraints.real_vector
    pytree_data_fields = ("weights",)

    def __init__(self, weights: Any):
        self.weights = weights
        super().__init__(jnp.shape(weights)[:-1], (10,))

    def sample(self, key: Any, sample_shape: tuple[int, ...] = ()) -> Any:
        logits = self.weights @ STIMULUS.T
        spikes = dist.Bernoulli(logits=logits).sample(key, sample_shape)
        return spikes.astype(logits.dtype) @ STIMULUS

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        del intermediates
        normalizer = jax.nn.softplus(self.weights @ STIMULUS.T).sum(-1)
        return (value * self.weights).sum(-1) - normalizer


def bernoulli_glm(x: jax.Array) -> None:
    prior = dist.MultivariateNormal(jnp.zeros(10), precision_matrix=SMOOTHING)
    numpyro.sample("x", Spikes(numpyro.sample("theta", prior)), obs=x)


def _solve(slope: Callable[[Any], Any], start: Any, interval: float, num_steps: int) -> jax.Array:
    """Return the solution at ten times an interval apart, by the method of Runge and Kutta."""
    size = interval / num_steps

    def step(_: Any, y: jax.Array) -> jax.Array:
        first = slope(y)
        second = slope(y + size / 2 * first)
        third = slope(y + size / 2 * second)
        return y + size / 6 * (first + 2 * second + 2 * third + slope(y + size * third))

    def until_next(y: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        return jax.lax.fori_loop(0, num_steps, step, y), y

    return jax.lax.scan(until_next, jnp.asarray(start), None, 10)[1]


def sir(x: jax.Array) -> None:
    """The infected of a million people, each 17 days, in samples of 1,000."""
    prior = dist.LogNormal(jnp.log(jnp.array([0.4, 0.125])), jnp.array([0.5, 0.2])).to_event(1)
    contact, recovery = jnp.asarray(numpyro.sample("theta", prior))

    def slope(y: jax.Array) -> jax.Array:  # of the logarithms of who may be infected, and is
        return jnp.stack([-contact * jnp.exp(y[1]), contact * jnp.exp(y[0]) - recovery])

    start = jnp.log(jnp.array([1 - 1e-6, 1e-6]))
    infected = jnp.exp(_solve(slope, start, 17.0, 68)[:, 1])
    shares = jnp.clip(infected, 1e-10, 1 - 1e-6)
    numpyro.sample("x", dist.Binomial(1000, probs=shares).to_event(1), obs=x)


def lotka_volterra(x: jax.Array) -> None:
    """How many preys and predators there are, each 2.1 days."""
    prior = dist.LogNormal(jnp.array([-0.125, -3.0, -0.125, -3.0]), 0.5).to_event(1)
    birth, hunting, death, feeding = jnp.asarray(numpyro.sample("theta", prior))

    def slope(y: jax.Array) -> jax.Array:  # of logarithms
        return jnp.stack([birth - hunting * jnp.exp(y[1]), feeding * jnp.exp(y[0]) - death])

    numbers = _solve(slope, jnp.log(jnp.array([30.0, 1.0])), 2.1, 84).T.reshape(20)
    logs = jnp.clip(numbers, math.log(1e-10), math.log(1e4))
    numpyro.sample("x", dist.LogNormal(logs, 0.1).to_event(1), obs=x)


# -- their exact posteriors ------------------------------------------------------------------------

Exact = Callable[[jax.Array, np.ndarray, int], np.ndarray]


def exact_linear(rng_key: jax.Array, x: np.ndarray, num_samples: int) -> np.ndarray:
    noise = jax.random.normal(rng_key, (num_samples, 10))
    return np.asarray(x / 2 + NOISE / math.sqrt(2.0) * noise)


def exact_uniform(rng_key: jax.Array, x: np.ndarray, num_samples: int) -> np.ndarray:
    low, high = (-1.0 - x) / NOISE, (1.0 - x) / NOISE
    noise = jax.random.truncated_normal(rng_key, low, high, (num_samples, 10))
    return np.asarray(x + NOISE * noise)


def exact_mixture(rng_key: jax.Array, x: np.ndarray, num_samples: int) -> np.ndarray:
    """Draws outside the prior do not count."""
    noise_key, part_key = jax.random.split(rng_key)
    scale = np.where(jax.random.bernoulli(part_key, 0.5, (20 * num_samples, 1)), 1.0, 0.1)
    theta = x + scale * np.asarray(jax.random.normal(noise_key, (20 * num_samples, 2)))
    return theta[(abs(theta) <= 10).all(-1)][:num_samples]


def exact_moons(rng_key: jax.Array, x: np.ndarray, num_samples: int) -> np.ndarray:
    """Each point of the ring tells theta but for a sign; those outside the prior do not count."""
    ring_key, sign_key = jax.random.split(rng_key)
    ring = Crescent(jnp.array([0.25, 0.0])).sample(ring_key, (20 * num_samples,))
    size, difference = ring[:, 0] - x[0], x[1] - ring[:, 1]
    total = size * jax.random.rademacher(sign_key, size.shape, size.dtype)
    theta = np.stack([total - difference, total + difference], -1) / math.sqrt(2.0)
    inside = (np.abs(theta) <= 1).all(-1) & (np.asarray(size) >= 0)
    return theta[inside][:num_samples]


class Task(NamedTuple):
    """A model, the shape of its data, and draws from its posterior if they are known.

    Attributes:
        published: the score of neural posterior estimation in the paper, by how many simulations.
    """

    model: Callable[..., None]
    shape: tuple[int, ...]
    published: tuple[float, float, float]
    exact: Exact | None = None
    reads: Callable[[Any], Any] | None = None


TASKS = {
    "gaussian_linear": Task(gaussian_linear, (10,), (0.694, 0.552, 0.506), exact_linear),
    "gaussian_linear_uniform": Task(
        gaussian_linear_uniform, (10,), (0.696, 0.553, 0.509), exact_uniform
    ),
    "gaussian_mixture": Task(gaussian_mixture, (2,), (0.716, 0.615, 0.548), exact_mixture),
    "two_moons": Task(two_moons, (2,), (0.725, 0.606, 0.542), exact_moons),
    "slcp": Task(slcp, (4, 2), (0.975, 0.901, 0.831)),
    "bernoulli_glm": Task(bernoulli_glm, (10,), (0.863, 0.678, 0.559)),
    "sir": Task(sir, (10,), (0.815, 0.680, 0.585), reads=jnp.log1p),
    "lotka_volterra": Task(lotka_volterra, (20,), (0.999, 0.997, 0.981), reads=jnp.log),
}


def read(path: Path) -> np.ndarray:
    """Read a table of numbers with a line of names."""
    return np.loadtxt(path, np.float32, delimiter=",", skiprows=1, ndmin=2)
