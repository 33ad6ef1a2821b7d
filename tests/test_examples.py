"""The examples, and the code in README.md, run as their readers would run them."""

import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import arviz as az
import matplotlib.image
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
TIMEOUT = 300  # seconds, for machines much slower than ours


class Run(NamedTuple):
    """A script that is running, and the folder that it writes to."""

    process: subprocess.Popen
    folder: pathlib.Path

    def finish(self) -> str:
        """Return what it prints, once it is through without an error."""
        printed, errors = self.process.communicate(timeout=TIMEOUT)
        assert self.process.returncode == 0, errors
        return printed


def readme_code() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All of them at once, as each spends most of its time compiling, on one core."""

    def start(name, *command):
        folder = tmp_path_factory.mktemp(name)
        options = [] if name == "readme" else ["--quick", "--output", str(folder)]
        process = subprocess.Popen(
            [sys.executable, *command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return Run(process, folder)

    names = ("digits_vae", "parameterizations", "half_images")
    started = {name: start(name, str(ROOT / "examples" / f"{name}.py")) for name in names}
    started["readme"] = start("readme", "-c", readme_code())
    yield started
    for run in started.values():
        run.process.kill()
        run.process.communicate()


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
def test_half_images(runs):
    runs["half_images"].finish()
    folder = runs["half_images"].folder
    assert_is_a_picture(folder / "half_images.png")
    with az.from_netcdf(folder / "half_images.nc") as tree:
        assert {"posterior", "posterior_predictive", "checks"} <= set(tree.children)


@pytest.mark.slow
def test_readme(runs):
    printed = runs["readme"].finish()
    assert "200 data, 1000 draws of each" in printed
    fine = int(re.search(r"fine +(\d+)", printed)[1])
    assert fine > 100
    assert "trend" in printed
    assert "elpd_loo" in printed


def test_readme_names_the_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^\$ make ([a-z-]+)", text, re.MULTILINE):
        assert f"\n{target}:" in makefile, f"README.md says `make {target}`; Makefile does not"
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", text):
        assert (ROOT / link).is_file(), f"README.md links to {link}, which does not exist"
