"""Eight devices find what one does: losses up to the order of sums, and the very draws."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from numpyro_vae.data.devices import Devices

SCRIPT = pathlib.Path(__file__).parent / "on_devices.py"
HOSTS = SCRIPT.parent / "on_hosts.py"
ROOT = SCRIPT.parent.parent.parent
FITS = (
    "a network with convolution, batch statistics, dropout",
    "global latents, rows weighed by importance",
    "a plate that subsamples",
    "an array on disk",
    "an iterable of batches, steps that are skipped",
    "simulations",
)


@pytest.fixture(scope="module")
def found():
    """All that the script has found, in one process, as JAX takes a second to start."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, SCRIPT],
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
def test_losses_are_those_of_one_device(found, name):
    one, many = found["fits"][name]
    assert len(one) > 2
    np.testing.assert_allclose(many, one, rtol=5e-4)


def test_all_fits_are_looked_at(found):
    assert set(found["fits"]) == set(FITS)


def test_a_step_that_fails_is_skipped(found):
    assert found["fits"]["an iterable of batches, steps that are skipped"][1].count(-1.0) == 2


@pytest.mark.parametrize("name", ["sample", "log_weights"])
def test_draws_are_those_of_one_device(found, name):
    """Of 37 rows, which eight devices do not divide, after saving and loading."""
    assert found["posteriors"][name] < 1e-4


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("two axes", "{'a': 4, 'b': 2}, expected one"),
        ("not divided", "batch_size is 20, .* such as batch_size=16 or 24"),
        ("default not divided", "batch_size is 44, .* such as batch_size=40 or 48"),
        ("iterable not divided", "rows in the first batch is 20"),
        ("no rows", "batch_axes=None the model takes all data at once"),
    ],
)
def test_bad_input(found, name, match):

    assert re.search(match, found["errors"][name])


def test_a_mesh_that_is_none():
    with pytest.raises(TypeError, match=r"mesh is of type list, expected a jax\.sharding\.Mesh"):
        Devices.of(jax.devices())


def found_by_hosts(folder, what):
    """What each of two processes with four devices has found."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    given = [port, str(folder), what]
    commands = [[sys.executable, HOSTS, str(number), *given] for number in range(2)]
    running = [subprocess.Popen(c, env=env, stdout=subprocess.PIPE, text=True) for c in commands]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()  # as one waits for the other
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    return found_by_hosts(tmp_path_factory.mktemp("hosts"), "data")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["losses", "validation", "on disk", "iterable", "again"])
def test_hosts_find_the_same(hosts, name):
    assert len(hosts[0][name]) > 1
    assert np.isfinite(hosts[0][name]).all()
    assert hosts[0][name] == hosts[1][name]


def test_losses_of_hosts_are_those_of_one_process(hosts):
    np.testing.assert_allclose(hosts[0]["losses"], hosts[0]["by hand"], rtol=1e-5)


def test_hosts_go_on_from_a_checkpoint(hosts):
    assert hosts[0]["again"] == hosts[0]["losses"]


def test_hosts_skip_the_same_steps(hosts):
    assert any(hosts[0]["skipped"])
    assert hosts[0]["skipped"] == hosts[1]["skipped"]


def test_a_host_draws_for_its_own_rows(hosts):
    assert max(host["draws"] for host in hosts) < 1e-5


def test_hosts_with_different_numbers_of_rows(hosts):
    for host in hosts:
        assert "different numbers of rows: [20, 21]" in host["error"]


def test_what_one_host_is_given_wrongly_ends_all(hosts):
    first, second = (host["refused"] for host in hosts)
    for message in first:
        assert "The data of the hosts [1] were refused, of 2 hosts" in message
    for message, match in zip(second, ["NaN", "<U", "NaN", "NaN", "arguments"], strict=True):
        assert match in message


@pytest.mark.slow
def test_hosts_simulate_what_one_process_does(tmp_path):
    """With covariates, and real rows, of both of them."""
    found = found_by_hosts(tmp_path, "simulations")
    for name in ("simulations", "real ones among them"):
        first, second = (host[name] for host in found)
        assert first["two"] == second["two"]
        assert len(first["two"]) == 6
        np.testing.assert_allclose(first["two"], first["one"], rtol=1e-5)
    assert "The data of the hosts [1] were refused" in found[0]["refused"]
    assert "NaN" in found[1]["refused"]
