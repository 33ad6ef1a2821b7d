"""The classifier two-sample test: how well a network tells two sets of draws apart.

As in Lueckmann et al. (AISTATS 2021), which takes the `MLPClassifier` of scikit-learn, two layers
of ten times as many units as there are values, and returns its accuracy in five-fold
cross-validation, of draws standardized by the first set. Here the five networks train together, by
the same rules, from the same weights, and with draws in the same order: where two sets are hard to
tell apart, it depends on the weights whether a network gets going before it is stopped.
"""

from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier

BATCH_SIZE, PENALTY, TOLERANCE = 200, 1e-4, 1e-4  # those of scikit-learn, as is Adam
MAX_EPOCHS, PATIENCE, SEED = 1000, 10, 1
ADAM = optax.adam(1e-3)


class Folds(NamedTuple):
    """Draws and labels of the folds that a network learns from, and of the one that it does not."""

    draws: Any
    labels: Any
    held_out: Any
    held_out_labels: Any


def c2st(exact: np.ndarray, found: np.ndarray) -> float:
    """Return the accuracy, 0.5 if sets of the same size cannot be told apart."""
    draws, labels = _standardized(exact, found)
    split = KFold(5, shuffle=True, random_state=SEED).split(draws)
    parts = [(draws[a], labels[a], draws[b], labels[b]) for a, b in split]
    folds = Folds(*(jnp.stack(x) for x in zip(*parts, strict=True)))
    random = np.random.RandomState(SEED)
    params = jax.tree.map(lambda x: jnp.stack([x] * 5), _init(random, draws.shape[1]))
    state, order = jax.vmap(ADAM.init)(params), np.arange(folds.labels.shape[1])
    best, waited, going = np.full(5, np.inf), np.zeros(5, int), np.ones(5, bool)
    for _ in range(MAX_EPOCHS):
        order = order[_shuffled(random, len(order))]
        params, state, loss = _epoch(params, state, folds, jnp.asarray(going), order)
        waited = np.where(loss > best - TOLERANCE, waited + 1, 0)
        best = np.minimum(best, loss)
        going &= waited <= PATIENCE
        if not going.any():
            break
    return float(_accuracy(params, folds))


def c2st_by_scikit_learn(exact: np.ndarray, found: np.ndarray) -> float:
    """Return the accuracy of the published classifier itself."""
    draws, labels = _standardized(exact, found)
    width = 10 * draws.shape[1]
    classifier = MLPClassifier((width, width), max_iter=MAX_EPOCHS, random_state=SEED)
    folds = KFold(5, shuffle=True, random_state=SEED)
    return cross_val_score(classifier, draws, labels, cv=folds, scoring="accuracy").mean()


def _standardized(exact: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return draws and labels, of a number that five divides."""
    number = min(len(exact), len(found)) // 5 * 5
    draws = np.concatenate([exact[:number], found[:number]])
    draws = (draws - exact.mean(0)) / exact.std(0)
    return draws.astype(np.float32), np.repeat([0, 1], number)


def _init(random: np.random.RandomState, num_inputs: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the weights of a network with one output."""
    sizes, layers = (num_inputs, 10 * num_inputs, 10 * num_inputs, 1), []
    for a, b in pairwise(sizes):
        bound = (6 / (a + b)) ** 0.5
        kernel, bias = random.uniform(-bound, bound, (a, b)), random.uniform(-bound, bound, b)
        layers.append((kernel.astype(np.float32), bias.astype(np.float32)))
    return layers


def _shuffled(random: np.random.RandomState, number: int) -> np.ndarray:
    order = np.arange(number)
    random.shuffle(order)
    return order


def _logits(params: list, draws: Any) -> Any:
    *hidden, (kernel, bias) = params
    for weights, shift in hidden:
        draws = jax.nn.relu(draws @ weights + shift)
    return (draws @ kernel + bias)[:, 0]


def _loss(params: list, draws: Any, labels: Any) -> Any:
    errors = optax.sigmoid_binary_cross_entropy(_logits(params, draws), labels).mean()
    return errors + PENALTY / 2 * sum((k**2).sum() for k, _ in params) / len(draws)


@jax.jit
def _epoch(params: list, state: Any, folds: Folds, going: Any, order: Any) -> tuple:
    """Take the steps of an epoch of each network that is still going; return the losses of all."""
    size = min(BATCH_SIZE, len(order))
    batches = order[: len(order) // size * size].reshape(-1, size)

    def step(carry: tuple, rows: Any) -> tuple:
        params, state = carry
        loss, slopes = jax.vmap(jax.value_and_grad(_loss))(
            params, folds.draws[:, rows], folds.labels[:, rows].astype(jnp.float32)
        )
        updates, state = jax.vmap(ADAM.update)(slopes, state)
        return (optax.apply_updates(params, updates), state), loss

    (new, state), losses = jax.lax.scan(step, (params, state), batches)
    params = jax.tree.map(partial(_where, going), new, params)
    return params, state, losses.mean(0)


def _where(going: Any, new: Any, old: Any) -> Any:
    return jnp.where(going.reshape(-1, *[1] * (new.ndim - 1)), new, old)


@jax.jit
def _accuracy(params: list, folds: Folds) -> Any:
    found = jax.vmap(_logits)(params, folds.held_out) > 0
    return (found == folds.held_out_labels).mean()
