"""Amortized guides: networks that return a posterior for each datum."""

from numpyro_vae.guides.encoding import Encoding
from numpyro_vae.guides.options import GuideOptions

__all__ = ["Encoding", "GuideOptions"]
