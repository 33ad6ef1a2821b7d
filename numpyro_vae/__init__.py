"""Amortized guides for NumPyro models in which every datum has latent variables of its own.

A network reads a datum and says what the posterior over its latents is; it is trained by SVI, and
every datum's posterior is checked::

    data -> inputs -> encoder -> scale parameterization / family -> sites -> guide
         -> fit -> posterior -> checks -> DataTree

`AutoAmortizedNormal` is the guide, `fit` trains it, `Posterior` encodes, samples and predicts for
any rows of data and hands them to ArviZ, and `check` says which of them can be trusted.
"""

import lazy_loader

# What is imported, JAX and flax too, is imported when it is first used; the list is in the stub.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
