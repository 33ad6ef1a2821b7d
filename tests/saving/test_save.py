"""A posterior that is loaded in a new process draws what the saved one draws, bit for bit."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from saved_cases import CASES, X

from numpyro_vae import Posterior

# One of the models takes statistics of a batch.
pytestmark = pytest.mark.filterwarnings("ignore:The model's networks .* take statistics of a batch")
HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each case with its draws, and the folder in which a new process has loaded and drawn."""
    folder, draws = tmp_path_factory.mktemp("saved"), {}
    for name, case in CASES.items():
        posterior = case.train()
        posterior.save(folder / name)
        draws[name] = case.draw(posterior)
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error::UserWarning", "-W", "ignore:The model's networks"),
            *(HERE / "saved_cases.py", folder),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE.parent.parent)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return draws, folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_new_process_draws_the_same(saved, name):
    draws, folder = saved
    with np.load(folder / f"{name}.npz") as found:
        assert set(found) == set(draws[name])
        for site, expected in draws[name].items():
            np.testing.assert_array_equal(found[site], expected)
            assert np.isfinite(expected).all()
            assert expected.any()


@pytest.mark.slow
def test_what_is_loaded_can_be_saved_again(saved, tmp_path):
    _, folder = saved
    for name in ("state and dropout", "values"):
        case = CASES[name]
        loaded = Posterior.load(folder / name, case.model, **case.again)
        loaded.save(tmp_path / name)
        for file in ("manifest.json", "arrays.safetensors"):
            first, second = ((path / name / file).read_bytes() for path in (folder, tmp_path))
            assert first == second


@pytest.mark.slow
def test_no_code_and_no_data_are_saved(saved):
    _, folder = saved
    for name in CASES:
        files = sorted((folder / name).iterdir())
        assert [file.name for file in files] == ["arrays.safetensors", "manifest.json"]
        for row in X:
            assert row.tobytes() not in files[0].read_bytes()


@pytest.mark.slow
def test_parameters_keep_their_form(saved):
    """Integer names, lists and tuples, and random keys come back as they were."""
    _, folder = saved
    for name in ("state and dropout", "networks in the model"):
        case = CASES[name]
        loaded = Posterior.load(folder / name, case.model, **case.again).params
        trained = case.train().params
        assert jax.tree.structure(loaded) == jax.tree.structure(trained)
        for one, other in zip(*map(jax.tree.leaves, (loaded, trained)), strict=True):
            assert one.dtype == other.dtype
