"""A posterior and the folder that it was exported to, once for all tests of it."""

import pytest
from serving_cases import NUM_SAMPLES, X, make, model

from numpyro_vae import AutoAmortizedNormal


@pytest.fixture(scope="session")
def posterior():
    return make(model, AutoAmortizedNormal(model), X)


@pytest.fixture(scope="session")
def folder(posterior, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "served"
    posterior.export(path, X, num_samples=NUM_SAMPLES)
    return path
