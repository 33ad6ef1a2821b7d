"""The encoder of several inputs."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from numpyro_vae import MLP, RNN, Fusion

INPUTS = {"items": np.ones((4, 3), np.float32), "y": np.arange(8.0, dtype=np.float32).reshape(4, 2)}
SMALL = partial(MLP, hidden_sizes=(5,))
ENCODERS = {"y": SMALL, "items": partial(MLP, hidden_sizes=(6,))}


class Normed(nnx.Module):
    def __init__(self, example_inputs, *, rngs):
        self.norm = nnx.BatchNorm(example_inputs.shape[-1], rngs=rngs)

    def __call__(self, inputs):
        return self.norm(inputs)


def test_features_are_those_of_each_encoder_side_by_side():
    fusion = Fusion(INPUTS, encoders=ENCODERS, hidden_sizes=(7, 3), rngs=nnx.Rngs(0))
    parts = [fusion.encoders[name](INPUTS[name]) for name in ("items", "y")]
    hidden = jnp.concatenate(parts, -1)
    assert hidden.shape == (4, 11)
    for layer in fusion.layers:
        hidden = nnx.relu(layer(hidden))
    np.testing.assert_array_equal(fusion(dict(reversed(INPUTS.items()))), hidden)
    assert {*nnx.to_pure_dict(nnx.state(fusion))["encoders"]} == {"items", "y"}


def test_evaluation_mode_and_state_reach_the_encoders():
    fusion = Fusion({"y": INPUTS["y"]}, encoders={"y": Normed}, rngs=nnx.Rngs(0))
    norm = fusion.encoders["y"].norm
    np.testing.assert_array_equal(norm.mean, 0)
    fusion({"y": INPUTS["y"]})
    assert (norm.mean[...] != 0).all()
    fusion.eval()
    assert norm.use_running_average


@pytest.mark.parametrize(
    ("inputs", "encoders", "error", "message"),
    [
        (np.ones((4, 2)), ENCODERS, TypeError, r"\['items', 'y'\], found ndarray"),
        ({"y": INPUTS["y"]}, ENCODERS, ValueError, r"\['items', 'y'\], found inputs \['y'\]"),
        (INPUTS, {"y": SMALL}, ValueError, r"\['y'\], found inputs \['items', 'y'\]"),
        ({}, {}, ValueError, "at least one"),
        (INPUTS, {**ENCODERS, "y": lambda x, rngs: 3}, TypeError, "of 'y'.*returned int"),
        (
            INPUTS,
            {**ENCODERS, "y": partial(RNN, hidden_size=5)},
            ValueError,
            r"of 'y' returned \(4, 2, 10\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(inputs, encoders, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        Fusion(inputs, encoders=encoders, rngs=nnx.Rngs(0))


def test_inputs_of_other_names_are_refused():
    fusion = Fusion(INPUTS, encoders=ENCODERS, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"found inputs \['items', 'y', 'z'\]"):
        fusion({**INPUTS, "z": INPUTS["y"]})
