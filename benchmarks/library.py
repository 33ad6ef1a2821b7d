"""An epoch of `numpyro_vae.fit` to run again and again, without what `fit` does once."""

from collections.abc import Callable

import jax
import numpy as np
from numpyro.infer import SVI

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.data.devices import ONE_DEVICE, Devices
from numpyro_vae.training.sources import ArraySource
from numpyro_vae.training.step import trainer_of


def library_epoch(
    svi: SVI, x: np.ndarray, batch_size: int, devices: Devices = ONE_DEVICE
) -> Callable[[], object]:
    """Return a function that runs the same epoch whenever it is called."""
    trainer = trainer_of(svi)
    source = ArraySource(trainer, ArrayData.read(x), batch_size, None, devices)
    state = devices.put(trainer.init(jax.random.key(0), source.first(), None))
    rng_key = jax.random.key(1)
    return lambda: source.run(state, rng_key, 0)
