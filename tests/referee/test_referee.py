"""NumPyro's own answers agree with the library's, on random models."""

from functools import partial
from unittest import mock

import arguments
import jax
import numpy as np
import pytest
from arguments import draw_values
from generator import FEATURES, generate
from run import COMPARISONS, Failure, failures, table

from numpyro_vae.guides.encoding import Encoding
from numpyro_vae.inference import natural

SEEDS = (1000, 1002)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_model(seed):
    found = failures(seed, FEATURES, tuple(COMPARISONS))
    features = " ".join(generate(seed, FEATURES).features)
    assert not found, f"seed {seed} of {features}: {found}"


def test_a_fault_is_found():
    """Without the volumes of the maps to the supports, weights are wrong."""

    def constrain(self, packed):
        values, log_det = honest(self, packed)
        return values, 0 * log_det

    honest = Encoding.constrain
    with mock.patch.object(Encoding, "constrain", constrain):
        assert "weights" in failures(3, ("positive", "gamma", "unit"), ("weights",))


def test_a_fault_of_steps_is_found():
    """Rows are drawn from other Normals than those that their steps came to."""

    def of_normal(encoding, normal):
        return honest(encoding, (normal[0], 1.1 * normal[1]))

    honest = natural.of_normal
    with mock.patch.object(natural, "of_normal", of_normal):
        assert "log weights" in failures(3, ("positive",), ("steps",))["steps"]


@pytest.fixture
def without_values(monkeypatch):
    """Put zeros in place of the models' data, which take long to draw."""

    def zeros(*args):
        shape = jax.eval_shape(partial(draw_values, args[0]), *args[1:])
        return np.zeros(shape.shape, shape.dtype)

    monkeypatch.setattr(arguments, "draw_values", zeros)


@pytest.mark.usefixtures("without_values")
def test_a_seed_is_the_same_model_again_and_a_feature_can_be_switched_off():
    for seed in range(50):
        case, again = generate(seed), generate(seed)
        assert case.program == again.program
        for name in case.features[:3]:
            less = generate(seed, set(FEATURES) - {name})
            assert name not in less.features
            others = [step for step in case.program.steps if step in less.program.steps]
            assert others or len(case.program.steps) < 4


@pytest.mark.usefixtures("without_values")
def test_every_feature_is_drawn():
    missing = set(FEATURES).difference(*(generate(seed).features for seed in range(400)))
    assert not missing


def test_the_table_has_a_line_for_each_kind_of_failure():
    found = [Failure(seed, "weights", ("gamma",), "too large") for seed in range(7)]
    lines = table([*found, Failure(9, "sites", (), "no such site")]).splitlines()
    assert lines[0].split() == ["7", "weights", "gamma"]
    assert lines[1].strip() == "seeds 0, 1, 2, 3, 4: too large"
    assert lines[2].split() == ["1", "sites", "(none)"]
