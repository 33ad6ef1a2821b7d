"""SVI on minibatches, in compiled epochs."""

from numpyro_vae.training.callbacks import Callback, StopReason

__all__ = ["Callback", "StopReason"]
