"""A guide of handwritten digits, trained, exported, and served over HTTP without this library.

Run ``python examples/serve_digits.py``. It trains a variational autoencoder of scikit-learn's
digits, exports its posterior into ``output/served_digits``, starts ``examples/serving/server.py``
as a process of its own, which imports JAX, NumPy and Starlette alone, and asks it for the
posteriors of images: of ones held out, of noise, and in ways in which it should not be asked. With
``--serve`` the server stays up.
"""

import argparse
import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, TraceMeanField_ELBO
from sklearn.datasets import load_digits

from numpyro_vae import AutoAmortizedNormal, Posterior, fit

SERVER = Path(__file__).parent / "serving" / "server.py"
LATENT_SIZE = 8
NUM_SAMPLES = 100


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,297 images of 64 pixels, counts out of 16, and 500 held out, in a fixed random order."""
    images = load_digits(return_X_y=True)[0].astype(np.float32)
    images = images[np.random.default_rng(0).permutation(len(images))]
    return images[:1297], images[1297:]


class Decoder(nnx.Module):
    """From the latents of an image to a logit for each pixel."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(LATENT_SIZE, 128, rngs=rngs)
        self.out = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        """Return logits ``(batch, 64)``."""
        return self.out(nnx.relu(self.hidden(z)))


def make_model() -> Callable[[jax.Array], None]:
    """The generative model."""
    decoder = Decoder(rngs=nnx.Rngs(0))

    def model(images: jax.Array) -> None:
        decode = nnx_module("decoder", decoder)
        with numpyro.plate("image", len(images)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENT_SIZE]).to_event(1))
            pixels = dist.Binomial(16, logits=decode(z)).to_event(1)
            numpyro.sample("pixels", pixels, obs=images)

    return model


def train(images: np.ndarray, num_epochs: int) -> Posterior:
    """Train the model and its guide."""
    model = make_model()
    svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-3), TraceMeanField_ELBO())
    key = jax.random.key(0)
    result = fit(svi, key, images, batch_size=64, num_epochs=num_epochs, progress_bar=False)
    return Posterior(svi.guide, result)


@contextlib.contextmanager
def serve(folder: Path, host: str = "127.0.0.1") -> Generator[tuple[str, int]]:
    """Serve a folder in another process, and yield its address once it answers."""
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVER), str(folder), "--host", host, "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        while ask((host, port), "GET", "/manifest")[0] != 200:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            time.sleep(0.1)
        yield host, port
    finally:
        process.terminate()
        process.wait()


def ask(address: tuple[str, int], method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Return status and answer of a request; 0 and nothing if there is no server yet."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, body if isinstance(body, str) else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except ConnectionError:
        return 0, None
    finally:
        connection.close()


def show(posterior: Posterior, held_out: np.ndarray, address: tuple[str, int]) -> None:
    """Ask for what there is, and for what there is not."""
    given = {"inputs": {"images": held_out[:3].tolist()}, "seed": 1, "allow_novel": True}
    status, answer = ask(address, "POST", "/sample", given)
    draws = posterior.sample(jax.random.key(1), held_out[:3], NUM_SAMPLES)["z"]
    same = np.allclose(answer["sample"]["z"], draws, rtol=1e-4, atol=1e-5)
    print(f"/sample: {status}, the draws of the posterior: {same}")
    print(f"novelty of the three images: {np.round(answer['novelty'], 3)}")
    noise = np.random.default_rng(0).integers(0, 17, (1, 64)).tolist()
    for what, body in {
        "noise": {"inputs": {"images": noise}},
        "63 pixels": {"inputs": {"images": [[0] * 63]}},
        "no number": {"inputs": {"images": [[float("nan")] * 64]}},
        "no JSON": "images",
    }.items():
        status, answer = ask(address, "POST", "/encode", body)
        print(f"/encode of {what}: {status}, {answer.get('error', 'accepted')}")


def main() -> None:
    """Train, export and serve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few epochs, to see that it runs")
    parser.add_argument("--serve", action="store_true", help="keep the server running")
    args = parser.parse_args()
    images, held_out = digits()
    posterior = train(images, 5 if args.quick else 200)
    folder = args.output / "served_digits"
    shutil.rmtree(folder, ignore_errors=True)  # of a run before this one
    posterior.export(folder, held_out, num_samples=NUM_SAMPLES)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder} has {size / 2**20:.1f} MB: {sorted(file.name for file in folder.iterdir())}")
    with serve(folder) as address, contextlib.suppress(KeyboardInterrupt):
        show(posterior, held_out, address)
        while args.serve:
            time.sleep(1)


if __name__ == "__main__":
    main()
