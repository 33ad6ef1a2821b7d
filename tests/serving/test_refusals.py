"""What cannot be served ends in an error that says why, and leaves no folder."""

import importlib.util

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer.autoguide import AutoNormal
from serving_cases import FEW, SMALL, hierarchical, make, model

from numpyro_vae import AutoAmortizedNormal, Posterior

ONE = {"num_samples": 2, "platforms": ("cpu",), "artifacts": ("sample",)}


@pytest.fixture(scope="module")
def few():
    return make(model, AutoAmortizedNormal(model, SMALL), FEW)


def refused(posterior, path, match, error=ValueError, data=FEW, **options):
    with pytest.raises(error, match=match):
        posterior.export(path / "served", data, **{**ONE, **options})
    assert not list(path.iterdir())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"platforms": ("gpu",)}, "platforms is .*'gpu'.*expected one or more of .*'cuda'"),
        ({"platforms": ()}, "platforms is ()"),
        ({"platforms": ("cpu", "cpu")}, "each once"),
        ({"artifacts": ("predict",)}, "artifacts is .*predict.* expected one or more of"),
        ({"artifacts": ()}, "artifacts is"),
        ({"artifacts": "novelty"}, "at least 400 rows of reference"),
        ({"artifacts": ("novelty",)}, "at least 400 rows of reference"),
        ({"num_samples": 0}, "num_samples is 0"),
    ],
)
def test_wrong_options(few, tmp_path, options, match):
    refused(few, tmp_path, match, **options)


def test_too_few_rows_for_the_novelty_leave_it_out(few, tmp_path):
    manifest = few.export(tmp_path / "served", FEW, **{**ONE, "artifacts": None})
    assert list(manifest["artifacts"]) == ["encode", "sample", "importance"]
    one = few.export(tmp_path / "one", FEW, **{**ONE, "artifacts": "sample"})
    assert list(one["artifacts"]) == ["sample"]
    assert "at least 400 rows" in manifest["left_out"]["novelty"]
    assert manifest["novelty"] is None


def test_a_folder_that_exists(few, tmp_path):
    (tmp_path / "served").mkdir()
    with pytest.raises(FileExistsError, match="served exists, and nothing is overwritten"):
        few.export(tmp_path / "served", FEW, **ONE)


def test_a_package_that_is_missing(few, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(few, tmp_path, r"flatbuffers.*numpyro-vae\[serving\]", ImportError)


def test_a_guide_of_its_training_rows(tmp_path):
    posterior = make(model, AutoNormal(model), FEW)
    refused(posterior, tmp_path, "parameters for each row that it was trained with")


def all_global(x):
    loc = numpyro.sample("loc", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(loc, 0.5).expand([2]).to_event(1), obs=x)


def test_a_guide_of_the_whole(tmp_path):
    refused(make(all_global, AutoNormal(all_global), FEW), tmp_path, "cannot be exported: ")


def test_data_that_are_taken_whole(tmp_path):
    posterior = make(model, AutoAmortizedNormal(model, SMALL), FEW, batch_axes=None)
    refused(posterior, tmp_path, "takes its data whole.*Write groups of unequal size as Masked")


def asks(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z if (np.asarray(x) > 0).all() else -z
        numpyro.sample("x", dist.Normal(loc[:, None], 0.5).to_event(1), obs=x)


def test_a_single_row(few, tmp_path):
    refused(few, tmp_path, "with a single row", data=FEW[:1])


def test_a_model_that_asks_for_values(few, tmp_path):
    guide = AutoAmortizedNormal(asks, SMALL)
    refused(Posterior(guide, few.params), tmp_path, "asks for the values of its arguments")


def in_batches(x):
    norm = nnx_module("norm", nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.sample("x", dist.Normal(norm(z), 0.5).to_event(1), obs=x)


@pytest.mark.filterwarnings("ignore:The model's networks .* take statistics:UserWarning")
def test_rows_that_depend_on_each_other(tmp_path):
    posterior = make(in_batches, AutoAmortizedNormal(in_batches, SMALL), FEW)
    match = "log_weights of row 0 is .* for the row alone, and .* in a batch.*use_running_average"
    refused(posterior, tmp_path, match, artifacts=("importance",))


def reads_all(model):
    def guide(x):
        numpyro.sample("loc", dist.Normal(x.mean(0), 0.1).to_event(1))

    return guide


def test_global_sites_that_are_read_off_the_data(tmp_path):
    guide = AutoAmortizedNormal(hierarchical, SMALL, global_guide=reads_all)
    posterior = make(hierarchical, guide, FEW)
    refused(posterior, tmp_path, r"guide of the global sites \['loc'\] reads all rows")


def calls_back(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        like = jax.ShapeDtypeStruct(z.shape, z.dtype)
        loc = jax.pure_callback(np.sin, like, z, vmap_method="broadcast_all")
        numpyro.sample("x", dist.Normal(loc, 0.5).to_event(1), obs=x)


def test_code_that_jax_cannot_export(tmp_path):
    posterior = make(calls_back, AutoAmortizedNormal(calls_back, SMALL), FEW)
    match = "JAX cannot export importance for cpu with a symbolic number of rows"
    refused(posterior, tmp_path, match, artifacts=("importance",))
