"""The server of the examples: the posterior's numbers, and an answer to whatever is wrong."""

import contextlib
import http.client
import json
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from serving_cases import NUM_SAMPLES, X

SERVER = pathlib.Path(__file__).parents[2] / "examples" / "serving" / "server.py"
# The server itself, in a process that has nothing else than it may import.
SCRIPT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys(("flax", "numpyro", "numpyro_vae", "optax")))
sys.path.insert(0, {str(SERVER.parent)!r})
runpy.run_path({str(SERVER)!r}, run_name="__main__")
"""
NOVEL = [[90.0, -90.0]]


def inputs(x):
    return {"inputs": {"x": x}}


WRONG = {
    "another width": (422, inputs([[1.0]]), "expected float32 of shape ['rows', 2]"),
    "one datum": (422, inputs([1.0, 2.0]), "of shape (2,)"),
    "no rows": (422, inputs([]), "of shape (0,)"),
    "ragged": (422, inputs([[1.0, 2.0], [1.0]]), "input x is no array"),
    "texts": (422, inputs([["1.0", "2.0"]]), "input x is <U3"),
    "null": (422, inputs([[None, 2.0]]), "input x is no array"),
    "NaN": (422, inputs([[float("nan"), 1.0]]), "not finite"),
    "too large for float32": (422, inputs([[1e300, 1.0]]), "not finite"),
    "other inputs": (422, {"inputs": {"y": [[1.0, 2.0]]}}, "inputs are ['x']"),
    "too many rows": (413, inputs([[1.0, 2.0]] * 257), "there are 257 rows"),
    "too many bytes": (413, " " * (2**24 + 1), "bytes"),
    "no JSON": (400, "x = 1", "no JSON"),
    "nothing": (400, "", "no JSON"),
    "deep": (400, "[" * 100_000, "no JSON"),
    "no object": (400, [1], "expected an object with inputs"),
    "other fields": (400, inputs([[1.0, 2.0]]) | {"sed": 1}, "expected an object with inputs"),
    "seed": (422, inputs([[1.0, 2.0]]) | {"seed": -1}, "seed is"),
    "novel": (422, inputs(NOVEL), "rows [0] are unlike"),
}


@pytest.fixture(scope="module")
def address(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), "--port", str(port)])
    while process.poll() is None:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            break
        time.sleep(0.1)
    yield "127.0.0.1", port
    process.terminate()
    assert process.wait(30) in (0, -15)


def ask(address, path, body=None, method="POST"):
    """Return status and answer."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request(method, path, body if isinstance(body, str) else json.dumps(body))
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


@pytest.mark.slow
def test_answers_are_those_of_the_posterior(address, posterior):
    status, found = ask(address, "/encode", inputs(X[:3].tolist()))
    assert status == 200
    encoded = posterior.encode(X[:3])["z"]
    np.testing.assert_allclose(found["encode"]["z"]["loc"], encoded.loc, rtol=1e-5, atol=1e-6)
    status, found = ask(address, "/sample", inputs(X[:3].tolist()) | {"seed": 7})
    draws = posterior.sample(jax.random.key(7), X[:3], NUM_SAMPLES)["z"]
    np.testing.assert_allclose(found["sample"]["z"], draws, rtol=1e-4)
    weights = posterior.log_weights(jax.random.key(7), X[:3], NUM_SAMPLES)
    status, found = ask(address, "/importance", inputs(X[:3].tolist()) | {"seed": 7})
    np.testing.assert_allclose(found["importance"]["log_weights"], weights, rtol=1e-4, atol=1e-3)
    assert len(found["novelty"]) == 3


def test_rows_that_are_novel_can_be_let_pass(address):
    status, found = ask(address, "/encode", inputs(NOVEL) | {"allow_novel": True})
    assert (status, found["novelty"][0] <= 0.01) == (200, True)
    status, found = ask(address, "/novelty", inputs(NOVEL))
    assert (status, set(found)) == (200, {"novelty", "novelty_features", "novelty_evidence"})


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(address, name):
    status, body, text = WRONG[name]
    found = ask(address, "/encode", body)
    assert (found[0], text in found[1]["error"]) == (status, True), found


def test_other_routes(address):
    assert ask(address, "/predict", inputs([[1.0, 2.0]]))[0] == 404
    assert ask(address, "/a/b")[0] == 404
    assert ask(address, "/encode", method="GET")[0] == 405
    assert ask(address, "/manifest", method="GET")[1]["format"] == 1


def test_no_request_spoils_another(address, posterior):
    """Of many at once, all are answered, and right ones have the numbers that they have alone."""
    wrong = [(status, body) for status, body, _ in WRONG.values()]
    expected = posterior.sample(jax.random.key(5), X[:2], NUM_SAMPLES)["z"]

    def client(number):
        if number % 3:
            status, body = wrong[number % len(wrong)]
            return ask(address, "/sample", body)[0] == status
        body = inputs(X[:2].tolist()) | {"seed": 5, "allow_novel": True}
        status, found = ask(address, "/sample", body)
        return status == 200 and np.allclose(found["sample"]["z"], expected, rtol=1e-4)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(client, range(60)))


@pytest.mark.parametrize("file", ["arrays.npz", "encode.jax"])
def test_a_folder_that_is_not_whole_is_not_served(folder, tmp_path, file):
    path = tmp_path / "served"
    shutil.copytree(folder, path)
    (path / file).write_bytes((folder / file).read_bytes()[:-10])
    command = [sys.executable, "-c", SCRIPT, str(path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert f"{file} is not as it was exported" in done.stderr
