"""What a `NestedSetEncoder` knows of sets of sets without learning, beside NumPy."""

import numpy as np
from flax import nnx

from numpyro_vae import NestedSetEncoder
from numpyro_vae.data.nested import Nested
from numpyro_vae.data.ragged import Masked

GROUPS = (3, 2)
ROWS = ((7, 1, 2), (2, 5))


def test_what_is_known_of_rows_in_groups():
    """Their number, mean, and spread within groups and between; the mean that weighs groups."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(2, 3, 8)).astype(np.float32)
    y[0] += np.array([[-3.0], [0.0], [2.0]])  # groups that differ by more than chance, and less
    y[1, :2] -= [[y[1, 0, :2].mean()], [y[1, 1, :5].mean() - 0.3]]
    counts = np.array([ROWS[0], (*ROWS[1], 4)])  # padded
    there = np.arange(8) < counts[..., None]
    groups = Masked(np.zeros((2, 3, 0)), np.arange(3) < np.array(GROUPS)[:, None])
    rows = Masked(y[..., None], there & groups.mask[..., None])
    inputs = Nested((np.zeros((2, 0)), groups, rows), ("all", "group", None))
    encoder = NestedSetEncoder(inputs, hidden_sizes=(5,), standardize=False, rngs=nnx.Rngs(0))
    known = np.asarray(encoder(inputs)["all"])[:, -5 - 6 : -5]
    chance = []
    for number, sizes in enumerate(ROWS):
        of_groups = [y[number, j, :size].astype(float) for j, size in enumerate(sizes)]
        n, means = np.array(sizes), np.array([x.mean() for x in of_groups])
        every = np.concatenate(of_groups)
        within = sum(len(x) * x.var() for x in of_groups) / (n.sum() - len(n))
        # DerSimonian and Laird's equations for weights n / within
        w = n / within
        q = (w * (means - np.average(means, weights=w)) ** 2).sum()
        tau2 = (q - len(n) + 1) / (w.sum() - (w**2).sum() / w.sum())
        chance.append(tau2 <= 0)
        w = 1 / (within / n + max(tau2, 0))
        spreads = [within, np.average((means - every.mean()) ** 2, weights=n), 1 / w.sum()]
        expected = [every.mean(), np.average(means, weights=w), *np.log(spreads) / 2]
        np.testing.assert_allclose(known[number], [*expected, np.log1p(n.sum())], atol=1e-4)
    assert chance == [False, True]
