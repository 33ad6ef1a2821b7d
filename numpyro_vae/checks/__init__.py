"""Checks, datum by datum, of whether a posterior can be trusted; one to a file.

`numpyro_vae.checks.base` says what a check is; `numpyro_vae.Posterior.check` runs them.
"""

from numpyro_vae.checks.base import Finding

__all__ = ["Finding"]
