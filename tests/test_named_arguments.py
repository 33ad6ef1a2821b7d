"""Data by position and data by name are the same data, whichever of them training had."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest

from numpyro_vae import Posterior, fit
from numpyro_vae.choices import choose_guide
from tests.helpers import SMALL, make_svi

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(3.0, 1.0, 40).astype(np.float32)
Y = RNG.poisson(3.0, (2, 40)).astype(np.float32)
FORMS = {"by position": (X, Y), "by name": {"y": Y, "x": X}}
AXES = {"by position": (0, 1), "by name": {"y": 1, "x": 0}}
OTHER = {"by position": "by name", "by name": "by position"}


def model(x, y=None):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.3 * x, 1.0))
        rate = jnp.exp(z)[:, None].repeat(2, -1)
        numpyro.sample("y", dist.Poisson(rate).to_event(1), obs=None if y is None else y.T)


def stacked(a, b):
    """As `inputs=`, with other names than the model's."""
    return jnp.stack([a, *jnp.log1p(b)], -1)


def trained(form, **options):
    svi = make_svi(model, SMALL, **options)
    result = fit(svi, KEY, FORMS[form], num_epochs=1, batch_axes=AXES[form], progress_bar=False)
    return Posterior(svi.guide, result)


@pytest.mark.parametrize("form", FORMS)
def test_a_posterior_takes_both(form, tmp_path):
    posterior = trained(form, inputs=stacked)
    posterior.save(tmp_path / "saved")
    loaded = Posterior.load(tmp_path / "saved", model, SMALL, inputs=stacked)
    expected = posterior.sample(KEY, FORMS[form], 3)["z"]
    for one in (posterior, loaded):
        np.testing.assert_array_equal(one.sample(KEY, FORMS[OTHER[form]], 3)["z"], expected)
    named = {"x": pd.Series(X, index=[f"row {i}" for i in range(40)]), "y": Y}
    data = named if form == "by position" else (named["x"], Y)
    tree = posterior.to_datatree(KEY, data, 3)
    np.testing.assert_array_equal(tree.posterior["z"].values[0], expected)
    assert tree.posterior["data"].values[3] == "row 3"
    report = posterior.check(KEY, data, "importance", progress_bar=False)
    assert posterior.repair(KEY, FORMS[form], report, method="importance").rows.size


@pytest.mark.parametrize("form", FORMS)
def test_covariates_are_found_in_both(form):
    guide = choose_guide(model, FORMS[form], batch_axes=AXES[form])
    guide.encoder = SMALL
    svi = make_svi(model)
    svi.guide = guide
    options = {"num_epochs": 1, "batch_axes": AXES[form], "progress_bar": False}
    result = fit(svi, KEY, FORMS[form], validation=FORMS[OTHER[form]], **options)
    posterior = Posterior(guide, result)
    expected = posterior.sample(KEY, FORMS[form], 3)["z"]
    np.testing.assert_array_equal(posterior.sample(KEY, FORMS[OTHER[form]], 3)["z"], expected)
    assert np.isfinite(result.history["validation_loss"]).all()


def test_the_first_arguments_alone():
    posterior = trained("by position")
    alone = Posterior(posterior.guide, posterior.params, batch_axes=0)
    expected = alone.predict(KEY, (X,), 3)["y"]
    np.testing.assert_array_equal(alone.predict(KEY, {"x": X}, 3)["y"], expected)


def test_groups_of_segments_have_names_of_their_own():
    group = np.arange(40) % 8

    def of_groups(x, group):
        with numpyro.plate("groups", 8):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("observations", len(x)):
            numpyro.sample("x", dist.Normal(z[group], 1.0), obs=x)

    found = {}
    for form, data in {"tuple": (X, group), "dict": {"group": group, "x": X}}.items():
        options = {"plate": "groups", "inputs": lambda x, group: jnp.zeros((8, 1))}
        svi = make_svi(of_groups, **options, segments={"observations": lambda values, ids: ids})
        result = fit(svi, KEY, data, num_epochs=2, batch_axes=None, progress_bar=False)
        found[form] = result.losses
    np.testing.assert_array_equal(found["tuple"], found["dict"])


def test_validation_of_another_form_is_named():
    with pytest.raises(ValueError, match=r"at the arguments \['0'\], the data at \['0', '1'\]"):
        fit(make_svi(model), KEY, (X, Y), batch_axes=(0, 1), num_epochs=1, validation=(X, None))
