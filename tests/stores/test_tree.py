"""A tree written to Zarr in parts: that in memory, also if a run was killed."""

from functools import partial

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray as xr
import zarr

from numpyro_vae import Posterior, fit
from numpyro_vae.inference import regions
from tests.helpers import make_svi
from tests.stores.store_cases import KEY, ROWS, drawn, fitted, kill, to_zarr

DATA = drawn()
PARTS = 5  # of eight rows, and a last one


@pytest.fixture(scope="module")
def posterior():
    return fitted(DATA)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts of eight rows, and chunks of four."""
    monkeypatch.setattr(regions, "PART_ROWS", 8)
    monkeypatch.setattr("numpyro_vae.inference.runner.ROWS", 4)
    monkeypatch.setattr(regions, "CHUNK_BYTES", 4 * 6 * 3 * 4)


def require_same(tree, known):
    """Compare values, dimensions, coordinates and attributes, but the times of creation."""
    assert set(tree.children) == set(known.children)
    assert tree.attrs == known.attrs
    for group, expected in known.children.items():
        found = tree[group].to_dataset().load()
        for dataset in (found, expected := expected.to_dataset()):
            del dataset.attrs["created_at"]
        xr.testing.assert_identical(found, expected)


@pytest.mark.slow
def test_the_tree_on_disk_is_that_in_memory(posterior, tmp_path):
    path = tmp_path / "tree.zarr"
    tree = posterior.to_datatree(KEY, DATA, 6, store=path)
    known = posterior.to_datatree(KEY, DATA, 6)
    require_same(tree, known)
    require_same(xr.open_datatree(path, engine="zarr"), known)
    z = zarr.open_group(path)["posterior"]["z"]
    assert z.shape == (1, 6, ROWS)
    assert z.chunks == (1, 6, 8)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_rows_that_are_on_disk_themselves(posterior, tmp_path):
    stored = {"x": to_zarr(DATA["x"], tmp_path), "y": DATA["y"]}
    tree = posterior.to_datatree(KEY, stored, 6, store=tmp_path / "tree.zarr")
    known = posterior.to_datatree(KEY, DATA, 6)
    assert tree.attrs == known.attrs
    for group in known.children:
        xr.testing.assert_allclose(
            tree[group].to_dataset(), known[group].to_dataset(), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("parts", [1, 3])
def test_a_run_that_was_killed_goes_on_where_it_stopped(posterior, tmp_path, parts, monkeypatch):
    path = tmp_path / "tree.zarr"
    kill(lambda: posterior.to_datatree(KEY, DATA, 6, store=path), parts)
    assert not path.exists()
    made = []
    part = type(posterior._runner.read(DATA)).part
    monkeypatch.setattr(
        "numpyro_vae.inference.rows.Rows.part",
        lambda self, *args: (made.append(args[0]), part(self, *args))[1],
    )
    tree = posterior.to_datatree(KEY, DATA, 6, store=path)
    assert made == list(range(8 * parts, ROWS, 8))
    require_same(tree, posterior.to_datatree(KEY, DATA, 6))


def test_a_run_that_was_killed_in_its_first_part_begins_anew(posterior, tmp_path):
    path = tmp_path / "tree.zarr"
    kill(lambda: posterior.to_datatree(KEY, DATA, 6, store=path), 0)
    tree = posterior.to_datatree(KEY, DATA, 6, store=path)
    require_same(tree, posterior.to_datatree(KEY, DATA, 6))


def test_a_tree_that_is_complete_is_not_computed_again(posterior, tmp_path, monkeypatch):
    path = tmp_path / "tree.zarr"
    first = posterior.to_datatree(KEY, DATA, 6, store=path).load()
    monkeypatch.delattr("numpyro_vae.inference.gathering.Gathering.of_rows")
    xr.testing.assert_identical(posterior.to_datatree(KEY, DATA, 6, store=path).load(), first)


@pytest.mark.slow
@pytest.mark.parametrize("is_complete", [True, False])
def test_other_results_are_refused_by_what_differs(posterior, tmp_path, is_complete):
    path = tmp_path / "tree.zarr"
    if is_complete:
        posterior.to_datatree(KEY, DATA, 6, store=path)
    else:
        kill(lambda: posterior.to_datatree(KEY, DATA, 6, store=path), 2)
    other = {**DATA, "y": DATA["y"] + 1}
    params = {name: 2 * x for name, x in posterior.params.items() if name == "mu_auto_loc"}
    trained = Posterior(posterior.guide, posterior.params | params)
    assert params
    for run, message in (
        (lambda **x: posterior.to_datatree(KEY, other, 6, **x), "the data was 37 rows"),
        (lambda **x: posterior.to_datatree(KEY, DATA, 7, **x), "num_samples was 6, and now is 7"),
        (lambda **x: posterior.to_datatree(jax.random.key(1), DATA, 6, **x), "of the rng_key was"),
        (lambda **x: posterior.to_datatree(KEY, DATA, 6, marginal=True, **x), "marginal was False"),
        (lambda **x: trained.to_datatree(KEY, DATA, 6, **x), "of the parameters of the posterior"),
        (
            lambda **x: posterior.to_datatree(
                KEY, DATA, 6, coords={"cells": np.arange(1, 38)}, **x
            ),
            "coords was",
        ),
    ):
        remedy = "with, or another path" + ("" if is_complete else ", or remove them to begin anew")
        with pytest.raises(ValueError, match=f"has other results: .*{message}.*{remedy}"):
            run(store=path)


def test_what_is_no_such_store_is_left_alone(posterior, tmp_path):
    folder, file, other = tmp_path / "folder", tmp_path / "file", tmp_path / "other.zarr"
    folder.mkdir()
    file.write_text("mine")
    zarr.open_group(other, mode="w").attrs["mine"] = True
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").touch()
    for path in (folder, file, other, tmp_path / "new"):
        with pytest.raises(ValueError, match=r"exists and was not written by store="):
            posterior.to_datatree(KEY, DATA, 6, store=path)
    assert file.read_text() == "mine"
    assert (tmp_path / "new.partial" / "mine").exists()


def test_another_guide_without_parameters_is_refused(tmp_path):
    def model(x):
        with numpyro.plate("cells", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, shift):
        with numpyro.plate("cells", len(x)):
            numpyro.sample("z", dist.Normal(0.8 * x + shift, 0.4))

    x = DATA["y"]
    one, same, other = (
        Posterior(partial(guide, shift=shift), {}, model=model) for shift in (0.0, 0.0, 5.0)
    )
    one.to_datatree(KEY, x, 6, store=tmp_path / "tree.zarr")
    same.to_datatree(KEY, x, 6, store=tmp_path / "tree.zarr")
    with pytest.raises(ValueError, match=r"what model and guide compute was .*, and now is"):
        other.to_datatree(KEY, x, 6, store=tmp_path / "tree.zarr")


def test_where_nothing_can_be_written_is_said_with_a_remedy(posterior, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "new.partial").touch()
    (tmp_path / "torn.partial").mkdir()
    (tmp_path / "torn.partial" / "progress.json").write_text('{"identity": ')
    write = partial(posterior.to_datatree, KEY, DATA, 6)
    for name in ("new", "torn"):
        with pytest.raises(ValueError, match=rf"{name}\.partial exists and was not .*remove it"):
            write(store=tmp_path / name)
    with pytest.raises(NotADirectoryError, match=r"cannot be written: Not a dir.*Pass as store="):
        write(store=tmp_path / "file" / "tree.zarr")
    with pytest.raises(ValueError, match=r"'s3://mine/tree', expected .* on this machine. Write"):
        write(store="s3://mine/tree")
    with pytest.raises(TypeError, match="store is of type dict, expected the path of a folder"):
        regions.path_of({})

    def mkdir(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    with pytest.raises(PermissionError, match=r"tree\.zarr\.partial cannot be written: Permission"):
        write(store=tmp_path / "tree.zarr")


def test_a_run_that_was_killed_while_it_cleared_up_begins_anew(posterior, tmp_path, monkeypatch):
    """And its results were moved away since."""
    path = tmp_path / "tree.zarr"
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        first = posterior.to_datatree(KEY, DATA, 6, store=path).load()
    assert path.with_name("tree.zarr.partial").exists()
    path.rename(tmp_path / "moved.zarr")
    require_same(posterior.to_datatree(KEY, DATA, 6, store=path), first)


def test_coordinates_groups_and_sites_are_those_asked_for(posterior, tmp_path):
    options = {
        "coords": {"cells": [f"cell {n}" for n in range(ROWS)], "x_dim_0": ["a", "b", "c"]},
        "groups": ("posterior", "observed_data"),
        "var_names": ["z", "mu"],
    }
    path = tmp_path / "tree.zarr"
    tree = posterior.to_datatree(KEY, DATA, 6, store=path, **options)
    known = posterior.to_datatree(KEY, DATA, 6, **options)
    assert set(tree.children) == {"posterior", "observed_data"}
    assert set(tree.posterior.data_vars) == {"z", "mu"}
    for group in known.children:
        xr.testing.assert_equal(tree[group].to_dataset(), known[group].to_dataset())
    with pytest.raises(ValueError, match=r"coords\['cells'\] has 3 values, and the data have 37"):
        posterior.to_datatree(KEY, DATA, 6, store=tmp_path / "b", coords={"cells": [1, 2, 3]})


@pytest.mark.slow
def test_a_site_of_all_rows_at_once_is_refused_by_name(tmp_path):
    def model(x, y):
        with numpyro.plate("cells", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])
        numpyro.deterministic("total", z.sum())

    posterior = fitted(DATA, model)
    with pytest.raises(ValueError, match=r"\['total'\] are computed of all rows at once"):
        posterior.to_datatree(KEY, DATA, 6, store=tmp_path / "tree.zarr")
    tree = posterior.to_datatree(KEY, DATA, 6, store=tmp_path / "tree.zarr", var_names=["z"])
    assert set(tree.posterior.data_vars) == {"z"}


@pytest.mark.slow
def test_data_that_the_model_takes_whole_are_one_part(tmp_path):
    def model(x, y):
        with numpyro.plate("cells", x.shape[0]):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x[:, 0])
        numpyro.deterministic("total", z.sum())

    svi = make_svi(model)
    result = fit(svi, KEY, DATA, num_epochs=1, batch_axes=None, progress_bar=False)
    posterior = Posterior(svi.guide, result)
    tree = posterior.to_datatree(KEY, DATA, 3, store=tmp_path / "tree.zarr")
    require_same(tree, posterior.to_datatree(KEY, DATA, 3))


def test_without_zarr_the_error_says_what_to_install(posterior, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zarr", None)
    with pytest.raises(ImportError, match=r"takes the package zarr: pip install"):
        posterior.to_datatree(KEY, DATA, 6, store=tmp_path / "tree.zarr")
