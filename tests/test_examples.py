"""The examples, run as their readers would run them."""

import os
import pathlib
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import arviz as az
import example_data
import matplotlib.image
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 300  # seconds, for machines much slower than ours
EXAMPLES = [path.stem for path in sorted((ROOT / "examples").glob("*.py"))]
# Those of which the reader gives the data, and the form of the file.
WITH_DATA = {
    "amortize_check_repair": ".npz",
    "compare_radon": ".npz",
    "deep_markov": ".mat",
    "item_response": ".csv",
    "radon": ".npz",
    "single_cell": ".npz",
    "topics": ".npz",
    "tutorial_cvae": ".npz",
}


class Run(NamedTuple):
    """A script that is through, or will be, and the folder that it writes to."""

    process: Future[subprocess.CompletedProcess[str]]
    folder: pathlib.Path

    def finish(self) -> str:
        """Return what it prints, once it is through without an error."""
        done = self.process.result()
        assert done.returncode == 0, done.stderr
        return done.stdout


def command(name: str, folder: pathlib.Path) -> list[str]:
    """How a reader runs an example, on data of the form it asks for."""
    options = ["--quick", "--output", str(folder)]
    if name in WITH_DATA:
        path = folder.parent / f"{folder.name}{WITH_DATA[name]}"
        getattr(example_data, name)(path)
        options += ["--data", str(path)]
    return [str(ROOT / "examples" / f"{name}.py"), *options]


def example(item: pytest.Item) -> str:
    """The example that a test is of, if it is of one that the suite may leave out."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    return str(params.get("name", item.name.removeprefix("test_")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """All of them, two at a time, as each spends most of its time compiling, on one core."""

    def start(name: str) -> Run:
        folder = tmp_path_factory.mktemp(name)
        process = pool.submit(
            subprocess.run,
            [sys.executable, *command(name, folder)],
            capture_output=True,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            timeout=TIMEOUT,
        )
        return Run(process, folder)

    wanted = {example(item) for item in request.session.items} & {*EXAMPLES}
    with ThreadPoolExecutor(2) as pool:
        yield {name: start(name) for name in sorted(wanted)}
        pool.shutdown(cancel_futures=True)


def assert_is_a_picture(path):
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert min(height, width) > 500
    colours = np.unique((pixels[:, :, :3] * 255).astype(int).reshape(-1, 3), axis=0)
    assert len(colours) > 50
    # Every part of it, in a grid of two by three, has something drawn.
    parts = [part for band in np.array_split(pixels, 2) for part in np.array_split(band, 3, axis=1)]
    assert all(part[..., :3].std() > 0.02 for part in parts)


@pytest.mark.slow
def test_digits_vae(runs):
    printed = runs["digits_vae"].finish()
    folder = runs["digits_vae"].folder
    assert sorted(path.name for path in folder.iterdir()) == ["digits_vae.nc", "digits_vae.png"]
    assert_is_a_picture(folder / "digits_vae.png")
    errors = r"nats a datum \(se \d+\.\d+, Monte Carlo \d+\.\d+\)"
    assert re.search(rf"elbo +-\d+\.\d+ {errors}", printed)
    assert re.search(rf"log_evidence +-\d+\.\d+ {errors}", printed)
    assert re.search(r"elpd_loo +-\d+", printed)
    with az.from_netcdf(folder / "digits_vae.nc") as tree:
        assert set(tree.children) == {
            "posterior",
            "posterior_predictive",
            "log_likelihood",
            "sample_stats",
            "observed_data",
            "checks",
        }
        assert tree.checks.sizes["image"] == 100
        assert tree.posterior["z"].dims == ("chain", "draw", "image", "z_dim_0")
        assert tree.posterior["z"].shape == (1, 50, 100, 8)
        assert tree.posterior_predictive["pixels"].shape == (1, 50, 100, 8, 8)
        assert tree.log_likelihood["pixels"].dims == ("chain", "draw", "image")
        assert tree.sample_stats["log_weights"].dims == ("chain", "draw", "image")
        counts = tree.observed_data["pixels"]
        assert counts.dims[0] == "image"
        assert (counts.values.min(), counts.values.max()) == (0, 16)
        assert "ess_bulk" in az.summary(tree.isel(image=slice(2)), var_names=["z"])


def assert_has_colours(path):
    picture = matplotlib.image.imread(path)
    assert len(np.unique((picture[:, :, :3] * 255).astype(int).reshape(-1, 3), axis=0)) > 20


@pytest.mark.slow
def test_compare_guides(runs):
    printed = runs["compare_guides"].finish()
    assert re.search(r"AutoNormal +-\d+\.\d+", printed)
    assert re.search(r"by hand: \d+ of \d+ values of site 'z' are off", printed)
    assert re.search(r"AutoMultivariateNormal +-\d+\.\d+ .* -  ", printed)  # nothing by row
    assert_has_colours(runs["compare_guides"].folder / "compare_guides.png")


@pytest.mark.slow
def test_compare_radon(runs):
    printed = runs["compare_radon"].finish()
    for name in ("AutoMultivariateNormal", "AutoIAFNormal", "by hand", "amortized flow"):
        assert re.search(rf"{name} +-\d+\.\d+", printed)
        assert re.search(rf"{name}: \d+ of 12 values of site 'intercept' are off", printed)
    assert_has_colours(runs["compare_radon"].folder / "compare_radon.png")


@pytest.mark.slow
def test_parameterizations(runs):
    printed = runs["parameterizations"].finish()
    folder = runs["parameterizations"].folder
    assert_is_a_picture(folder / "parameterizations.png")
    table = (folder / "parameterizations.md").read_text(encoding="utf-8")
    assert table in printed
    for optimizer in ("SGD", "Adam"):
        for name in ("log_scale", "log_variance", "softplus"):
            assert re.search(rf"^\| {optimizer} \| {name} \|.*\d", table, re.MULTILINE)


@pytest.mark.slow
def test_serve_digits(runs):
    printed = runs["serve_digits"].finish()
    assert "/sample: 200, the draws of the posterior: True" in printed
    assert re.findall(r"/encode of [\w ]+: (\d+), ", printed) == ["422", "422", "422", "400"]
    assert (runs["serve_digits"].folder / "served_digits" / "manifest.json").is_file()


@pytest.mark.slow
def test_radon_states(runs):
    printed = runs["radon_states"].finish()
    folder = runs["radon_states"].folder
    assert re.search(r"repaired  level  median \d\.\d+", printed)
    assert re.search(r"mu\[AZ\] +\d", printed)
    assert_is_a_picture(folder / "radon_states.png")
    with az.from_netcdf(folder / "radon_states.nc") as tree:
        assert {"posterior", "checks", "repair"} <= set(tree.children)
        assert list(tree.posterior["data_sets"].values) == ["AZ", "IN"]
        assert tree.posterior["level_decentered"].sizes["draw"] == 200


PICTURED = (
    "compare_guides",
    "compare_radon",
    "digits_vae",
    "parameterizations",
    "radon_states",
    "serve_digits",
)

# What each of the others prints that it could not print had it failed.
PRINTED = {
    "amortize_check_repair": r"repaired by importance +\d+[^$]*chosen, repaired +\d+\.\d+",
    "deep_markov": r"log evidence, at least +-?\d+\.\d+",
    "eight_schools": r"repaired: means within \d+\.\d+ sd of those of NUTS",
    "half_images": r"nats",
    "item_response": r"with dependencies +\d+\.\d+",
    "radon": r"12 data, 200 draws of each",
    "semi_supervised": r"100 labels, 1197 images without, 500 held out",
    "single_cell": r"nats a cell: -?\d+\.\d+",
    "topics": r"perplexity",
    "tutorial_cvae": r"epoch  2  test ELBO +-\d+\.\d+ nats an image",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name for name in EXAMPLES if name not in PICTURED],
)
def test_the_others_end_in_a_picture_and_a_datatree(runs, name):
    assert re.search(PRINTED[name], runs[name].finish())
    folder = runs[name].folder
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.nc", f"{name}.png"]
    assert_is_a_picture(folder / f"{name}.png")
    with az.from_netcdf(folder / f"{name}.nc") as tree:
        assert {"posterior", "posterior_predictive", "observed_data"} <= set(tree.children)
        for group in ("posterior", "posterior_predictive"):
            for draws in tree[group].data_vars.values():
                assert draws.dims[:2] == ("chain", "draw")
                assert np.isfinite(draws.values).all()


def test_readme_names_the_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^\$ make ([a-z-]+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile, f"README.md says `make {target}`; Makefile does not"
