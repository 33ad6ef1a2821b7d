"""The benchmarks are all run by `benchmarks/run.py`, and by CI at tiny sizes; nothing is timed."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
NEED_MNIST = {
    "mnist_elbo.py",
    "mnist_gaps.py",
    "mnist_particles.py",
    "checking.py",
    "hand_written.py",
    "tutorial.py",
}
# What can be run; the other files are imported by these.
SCRIPTS = sorted(
    path.name
    for path in FOLDER.glob("*.py")
    if path.name != "run.py" and "__main__" in path.read_text(encoding="utf-8")
)


@pytest.fixture(scope="module")
def run():
    """The module `benchmarks/run.py`, which is in no package."""
    spec = importlib.util.spec_from_file_location("benchmarks_run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_smoke_run_has_every_benchmark(run):
    found = run.commands(data=None, smoke=True)
    assert sorted(script for script, _ in found) == SCRIPTS
    assert {option for _, option in found} == {"--smoke"}


def test_with_mnist_every_benchmark_runs_and_those_that_can_read_it(run):
    found = {script: options for script, *options in run.commands(data="mnist.npz", smoke=False)}
    assert sorted(found) == SCRIPTS
    readers = {script for script, options in found.items() if options}
    assert readers == {"convolution.py", *NEED_MNIST}


def test_without_mnist_those_that_need_it_are_left_out(run):
    found = run.commands(data=None, smoke=False)
    assert {script for (script,) in found} == {*SCRIPTS} - NEED_MNIST


def test_a_benchmark_that_fails_fails_the_run(run, tmp_path, monkeypatch):
    for name, code in {"fine.py": 0, "broken.py": 3}.items():
        (tmp_path / name).write_text(f"raise SystemExit({code})", encoding="utf-8")
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    assert [run.run([name], {}, capture=True) for name in ("fine.py", "broken.py")] == [0, 3]
    # One killed by a signal has a negative status.
    (tmp_path / "killed.py").write_text("import os; os.abort()", encoding="utf-8")
    monkeypatch.setattr(run, "commands", lambda data, smoke: [["fine.py"], ["killed.py"]])
    monkeypatch.setattr(sys, "argv", ["run.py", "--smoke"])
    assert run.main() == 1


def test_ci_runs_the_smoke_sizes():
    assert "make --no-print-directory bench-smoke" in (ROOT / ".ci/run").read_text("utf-8")
    done = subprocess.run(
        ["make", "--dry-run", "bench-smoke"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "benchmarks/run.py --smoke" in done.stdout
