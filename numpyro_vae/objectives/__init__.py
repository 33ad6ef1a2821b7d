"""Objectives that numpyro.infer lacks; one a file, each a `numpyro.infer.elbo.ELBO`."""

from numpyro_vae.objectives.forward_kl import ForwardKL

__all__ = ["ForwardKL"]
