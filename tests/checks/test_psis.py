"""Pareto-smoothed importance sampling of many rows, against ArviZ's of one."""

import numpy as np
import pytest
from arviz_stats.base import array_stats

from numpyro_vae.inference import psis

RNG = np.random.default_rng(0)
ROWS = 12

# Log weights by the shape of their tail, ``(num_samples, ROWS)``.
TAILS = {
    "light": lambda size: RNG.normal(size=size),
    "bounded": lambda size: np.log(RNG.uniform(size=size)),
    "pareto": lambda size: -np.linspace(0.1, 1.5, ROWS) * np.log(RNG.uniform(size=size)),
    "student": lambda size: 2 * RNG.standard_t(3, size),
    "cauchy": lambda size: RNG.standard_t(1, size),
    "wide": lambda size: 100 * RNG.normal(size=size),
    "nearly equal": lambda size: 1e-2 * RNG.normal(size=size),
    "some ties": lambda size: RNG.normal(size=size).round(2),
    "many ties": lambda size: (3 * RNG.normal(size=size)).round(),
    "large, in float32": lambda size: np.float32(5e5 + RNG.normal(size=size)).astype(float) - 5e5,
}


def by_arviz(log_weights):
    """Smoothed log weights of each row, and k-hats."""
    with np.errstate(all="ignore"):
        smoothed, khat = array_stats.psislw(-log_weights.T, axis=-1)
    return smoothed.T, khat


@pytest.mark.parametrize("number", [100, 226, 1000, 4000])
@pytest.mark.parametrize("tail", TAILS)
def test_rows_together_have_what_arviz_gives_each(tail, number):
    log_weights = TAILS[tail]((number, ROWS))
    highest = log_weights.max(0)
    expected, khat = by_arviz(log_weights)
    smoothed, found = psis.smooth(log_weights)
    known = np.isfinite(khat)
    np.testing.assert_allclose(found[known], khat[known], rtol=1e-9, atol=1e-9)
    # Where ArviZ knows no k-hat, there are ties, or weights that are zero beside the highest.
    assert (np.isnan(found[~known]) | (found[~known] == np.inf)).all()
    # Of draws with the same weight, either may have the greater smoothed one.
    np.testing.assert_allclose(np.sort(smoothed, axis=0), np.sort(expected, axis=0), atol=1e-9)
    largest = np.sort(log_weights, axis=0)[::-1][: psis.tail_length(number) + 1]
    of_tail = psis.khat_of_tail(largest, log_weights.min(0), highest)
    np.testing.assert_array_equal(of_tail, found)


def test_weights_that_are_alike_up_to_rounding_have_no_tail():
    """What is left of log densities in the thousands is rounding, and so are its ties."""
    rounding = np.spacing(np.float32(5000)) * RNG.integers(0, 3, (1000, 2))
    log_weights = rounding - rounding.mean(0)
    assert (psis.smooth(log_weights, np.full(2, 5000.0))[1] == -np.inf).all()
    smoothed, khat = psis.smooth(log_weights)  # which are not alike if they come from small numbers
    assert np.isfinite(smoothed).all()
    assert not (khat > 0).any()


def test_weights_of_which_many_have_the_highest_have_no_tail():
    """As of a likelihood that is constant where it is not zero; ArviZ raises."""
    log_weights = np.where(RNG.uniform(size=(1000, 2)) < 0.5, 0.0, -np.inf)
    with pytest.raises(ValueError, match="All tail values are the same"), np.errstate(all="ignore"):
        array_stats.psislw(-log_weights.T, axis=-1)
    smoothed, khat = psis.smooth(log_weights)
    assert (khat == -np.inf).all()
    np.testing.assert_allclose(np.exp(smoothed).sum(0), 1)


def test_a_tail_beyond_floating_point_is_a_heavy_one():
    """ArviZ's arithmetic overflows, and gives some of these the k-hats of good weights."""
    log_weights = 400 * RNG.normal(size=(1000, 50))
    assert by_arviz(log_weights)[1].min() < 0.2 or np.isnan(by_arviz(log_weights)[1]).any()
    smoothed, khat = psis.smooth(log_weights)
    assert (khat > 10).all()
    assert np.isfinite(smoothed).all()


def test_rows_do_not_depend_on_how_many_there_are():
    log_weights = RNG.standard_t(4, (300, 2 * psis.BLOCK + 3))
    _, khat = psis.smooth(log_weights)
    alone = [psis.smooth(column[:, None])[1][0] for column in log_weights.T]
    np.testing.assert_allclose(khat, alone, rtol=1e-12)
