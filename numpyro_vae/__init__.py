"""Amortized guides for NumPyro models in which every datum has latent variables of its own.

A network reads a datum and returns the posterior over its latents. It is trained by SVI, every
datum's posterior is checked, and those that fail are repaired::

    amortize  ->  check  ->  repair

`AutoAmortizedNormal` is the guide, `fit` trains it, and `Posterior` encodes, samples, predicts,
checks and repairs any rows of data, and hands the results to ArviZ.
"""

import lazy_loader

# What is imported, JAX and flax too, is imported when it is first used; the list is in the stub.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
