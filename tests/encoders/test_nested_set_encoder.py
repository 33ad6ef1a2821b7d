"""What a `NestedSetEncoder` knows of sets of sets without learning, beside NumPy."""

import numpy as np
from flax import nnx

from numpyro_vae import NestedSetEncoder
from numpyro_vae.data.nested import Nested
from numpyro_vae.data.ragged import Masked

GROUPS = (3, 2)
ROWS = ((7, 1, 2), (2, 5))


def test_groups_count_for_as_much_as_they_have_rows():
    """The number of rows, their mean, and their spread within groups and between."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(2, 3, 8)).astype(np.float32)
    counts = np.array([ROWS[0], (*ROWS[1], 4)])  # padded
    there = np.arange(8) < counts[..., None]
    groups = Masked(np.zeros((2, 3, 0)), np.arange(3) < np.array(GROUPS)[:, None])
    rows = Masked(y[..., None], there & groups.mask[..., None])
    inputs = Nested((np.zeros((2, 0)), groups, rows), ("all", "group", None))
    encoder = NestedSetEncoder(inputs, hidden_sizes=(5,), standardize=False, rngs=nnx.Rngs(0))
    known = np.asarray(encoder(inputs)["all"])[:, -5 - 4 : -5]
    for number, sizes in enumerate(ROWS):
        of_groups = [y[number, j, :size] for j, size in enumerate(sizes)]
        every = np.concatenate(of_groups)
        within = sum(len(x) * x.var() for x in of_groups) / len(every)
        expected = every.mean(), np.log(within) / 2, np.log(every.var() - within) / 2
        np.testing.assert_allclose(known[number], [*expected, np.log1p(len(every))], atol=1e-4)
