"""An exported posterior says what the posterior says, of any rows, without the library."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving_cases import KEY, NUM_SAMPLES, X, load

from numpyro_vae import Novelty
from numpyro_vae.serving.leaves import Leaves

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "serving.md"
BLOCKS = PAGE.read_text(encoding="utf-8").split("```python\n")
PAGE_LINES = next(block for block in BLOCKS if "hashlib" in block).partition("```")[0]
BLOCKED = ("arviz", "flax", "numpyro", "numpyro_vae", "optax", "xarray")
ROWS = 5

# The page's own lines, and then what a client asks for.
SCRIPT = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # so that importing it fails
{page}
given = dict(np.load("given.npz"))
inputs, by_row = {{"x": given["x"]}}, (given["keys"], given["numbers"])
found = programs["importance"](arrays, *by_row, inputs)
encoded = programs["encode"](arrays, inputs)["z"]
np.savez(
    "found.npz",
    z=programs["sample"](arrays, *by_row, inputs)["z"],
    draws=found["draws"]["z"],
    log_weights=found["log_weights"],
    loc=encoded["loc"],
    scale=encoded["scale"],
    **programs["novelty"](arrays, inputs),
)
"""


@pytest.fixture(scope="module")
def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.fixture(scope="module")
def found(folder):
    """What a process without the library computes, for rows of which the last is novel."""
    x = np.concatenate([X[: ROWS - 1], np.full((1, 2), 40.0, np.float32)])
    keys = np.tile(jax.random.key_data(KEY), (ROWS, 1))
    np.savez(folder.parent / "given.npz", x=x, keys=keys, numbers=np.arange(ROWS, dtype=np.int32))
    script = SCRIPT.format(blocked=BLOCKED, page=PAGE_LINES)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {"x": x, **np.load(folder.parent / "found.npz")}


@pytest.mark.slow
def test_a_process_without_the_library_has_the_same_numbers(posterior, found):
    x = found["x"]
    encoded = posterior.encode(x)["z"]
    np.testing.assert_allclose(found["loc"], encoded.loc, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found["scale"], encoded.scale, rtol=1e-6)
    draws = posterior.sample(KEY, x, NUM_SAMPLES)["z"]
    np.testing.assert_allclose(found["z"], draws, rtol=1e-5)
    np.testing.assert_array_equal(found["draws"], found["z"])
    weights = posterior.log_weights(KEY, x, NUM_SAMPLES)
    np.testing.assert_allclose(found["log_weights"], weights, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_novelty_is_that_of_the_check(posterior, found, monkeypatch):
    """Of each row alone, and with the key that was exported."""
    monkeypatch.setattr("numpyro_vae.checks.base.Subject.with_key", lambda subject, _: subject)
    for row in (0, ROWS - 1):
        report = posterior.check(
            jax.random.key(0), found["x"][row : row + 1], Novelty(X), progress_bar=False
        )
        for name in ("novelty", "novelty_features", "novelty_evidence"):
            expected = report.dataset[name].values
            np.testing.assert_allclose(found[name][row], expected[0], rtol=2e-5)
    assert found["novelty"][-1] <= 0.01 < found["novelty"][0]


def test_rows_of_several_requests_share_a_call(folder, posterior):
    """Each with its own key, and numbered from zero."""
    keys = [jax.random.key(7), jax.random.key(8)]
    data = np.repeat(np.stack([jax.random.key_data(key) for key in keys]), [2, 3], axis=0)
    numbers = np.array([0, 1, 0, 1, 2], np.int32)
    program, arrays = load(folder, "sample")
    draws = program(arrays, data, numbers, {"x": X[:5]})["z"]
    for key, rows in zip(keys, (slice(0, 2), slice(2, 5)), strict=True):
        expected = posterior.sample(key, X[rows], NUM_SAMPLES)["z"]
        np.testing.assert_allclose(draws[:, rows], expected, rtol=1e-5)


def test_the_manifest_says_what_programs_take_and_return(folder, manifest):
    assert manifest["inputs"] == {"x": {"shape": ["rows", 2], "dtype": "float32"}}
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    assert manifest["latents"]["z"]["dims"] == ["draw", "rows", "z_dim_0"]
    assert "Positive" in manifest["latents"]["z"]["support"]
    assert manifest["novelty"]["num_reference"] == len(X)
    assert manifest["importance"] == {"khat_threshold": 0.5, "max_divergence": 0.1}
    assert manifest["left_out"] == {}
    draws = {"z": {"shape": [NUM_SAMPLES, "rows", 2], "dtype": "float32"}}
    weights = {"shape": [NUM_SAMPLES, "rows"], "dtype": "float32"}
    artifacts = manifest["artifacts"]
    assert artifacts["importance"]["outputs"] == {"draws": draws, "log_weights": weights}
    assert artifacts["sample"]["arguments"] == ["arrays", "keys", "numbers", "inputs"]
    for name in (manifest["arrays"], *(told["file"] for told in artifacts.values())):
        data = (folder / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == manifest["fingerprints"][name]
    assert {path.name for path in folder.iterdir()} == set(manifest["fingerprints"])


def test_what_there_is_of_the_reference_are_features(folder, manifest):
    _, arrays = load(folder, "novelty")
    assert arrays["novelty.fitted"].shape[0] == len(arrays["novelty.calibrating"]) == len(X) // 2
    assert len(arrays["novelty.evidence"]) == len(X)
    told = manifest["novelty"]["quantiles"]["novelty_evidence"]["0.9"]
    assert np.isclose(told, np.quantile(arrays["novelty.evidence"], 0.9), rtol=1e-5)


@pytest.mark.parametrize(
    "x", [np.zeros((3, 4), np.float32), np.zeros(2, np.float32), np.zeros((3, 2), np.int32)]
)
def test_another_width_or_dtype_is_refused_by_name(folder, x):
    program, arrays = load(folder, "encode")
    with pytest.raises(ValueError, match=r"\['x'\]"):
        program(arrays, {"x": x})
    with pytest.raises(ValueError, match="pytree"):
        program(arrays, {"y": X})


@pytest.mark.parametrize("file", ["arrays.npz", "encode.jax"])
def test_the_lines_of_the_page_notice_a_file_that_is_cut_short(folder, file, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "served")
    monkeypatch.chdir(tmp_path)
    exec(PAGE_LINES, {})
    (tmp_path / "served" / file).write_bytes((folder / file).read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file} is not as it was exported"):
        exec(PAGE_LINES, {})


def test_parameters_are_made_of_plain_arrays_again(tmp_path):
    """Of integer keys, typed random keys and dtypes that NumPy lacks, which files do not hold."""
    params = {
        "layers": {0: jnp.ones(2, jnp.bfloat16), 1: [jnp.arange(3), (jnp.array(True),)]},
        "key": jax.random.split(jax.random.key(1, impl="rbg")),
        "number": 0.5,
    }
    arrays, leaves = Leaves.of(params)
    np.savez(tmp_path / "arrays.npz", **arrays)
    found = leaves.restore(dict(np.load(tmp_path / "arrays.npz")))
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert str(jax.random.key_impl(found["key"])) == "rbg"
    assert found["layers"][0].dtype == jnp.bfloat16
    expected, _ = Leaves.of(params)
    for name, array in Leaves.of(found)[0].items():
        np.testing.assert_array_equal(array, expected[name])
