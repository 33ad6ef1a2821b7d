"""Whatever kind of guide, model and data can be exported says what the posterior says."""

import jax
import numpy as np
import pytest
from serving_cases import (
    CASES,
    FEW,
    KEY,
    NUM_SAMPLES,
    SMALL,
    X,
    hierarchical,
    load,
    make,
    model,
)

from numpyro_vae import AutoAmortizedDelta, AutoAmortizedNormal


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_programs_have_the_numbers_of_the_posterior(name, tmp_path):
    case = CASES[name]()
    posterior, folder = case.posterior(), tmp_path / "served"
    options = {"num_samples": 7, "platforms": case.platforms, "artifacts": case.artifacts}
    manifest = posterior.export(folder, case.data, **options)
    assert set(manifest["inputs"]) == set(case.inputs)
    program, arrays = load(folder, "importance")
    by_row = np.tile(jax.random.key_data(KEY), (2, 1)), np.arange(2, dtype=np.int32)
    found = program(arrays, *by_row, case.inputs)
    assert_same_draws(found["draws"], posterior, case.data, manifest)
    weights = posterior.log_weights(KEY, case.data, 7)
    np.testing.assert_allclose(found["log_weights"], weights, rtol=1e-5, atol=1e-4)
    if "encode" in case.artifacts:
        found = load(folder, "encode")[0](arrays, case.inputs)
        for site, expected in posterior.encode(case.data).items():
            for part, values in expected._asdict().items():
                np.testing.assert_allclose(found[site][part], values, rtol=1e-5, atol=1e-6)


def assert_same_draws(draws, posterior, data, manifest):
    expected = posterior.sample(KEY, data, 7)
    assert set(draws) == set(expected)
    for site, told in manifest["latents"].items():
        assert draws[site].shape[told["dims"].index("rows")] == 2
        there = expected[site] if told["role"] == "local" else expected[site][:, None]
        there = np.broadcast_to(there, draws[site].shape)
        np.testing.assert_allclose(draws[site], there, rtol=1e-5, atol=1e-5)


def test_what_a_guide_does_not_have_is_left_out_and_why(tmp_path):
    posterior, path = make(model, AutoAmortizedDelta(model, SMALL), X), tmp_path / "served"
    manifest = posterior.export(path, X, num_samples=NUM_SAMPLES, platforms=["cpu"])
    assert list(manifest["artifacts"]) == ["encode", "sample"]
    program, arrays = load(path, "encode")
    expected = posterior.encode(X)["z"].loc
    found = program(arrays, {"x": X})["z"]["loc"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert {file.stem for file in path.glob("*.jax")} == {"encode", "sample"}
    assert all("PointEstimate has no density" in why for why in manifest["left_out"].values())
    assert manifest["left_out"].keys() == {"importance", "novelty"}
    with pytest.raises(ValueError, match="There is no novelty of this posterior: Point"):
        posterior.export(tmp_path / "again", X, artifacts=["novelty"])


def test_programs_take_the_steps_of_rows(tmp_path):
    guide = AutoAmortizedNormal(hierarchical, SMALL)
    posterior = make(hierarchical, guide, FEW, natural_steps=2)
    posterior.export(tmp_path / "served", FEW, artifacts=["encode"], platforms=["cpu"])
    program, arrays = load(tmp_path / "served", "encode")
    found, expected = program(arrays, {"x": FEW})["z"], posterior.encode(FEW)["z"]
    np.testing.assert_allclose(found["loc"], expected.loc, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["scale"], expected.scale, rtol=1e-4)
