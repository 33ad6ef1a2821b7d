"""Amortized guides: networks that return a posterior for each datum."""

from numpyro_vae.guides.base import GuideOptions
from numpyro_vae.guides.encoding import Encoding

__all__ = ["Encoding", "GuideOptions"]
