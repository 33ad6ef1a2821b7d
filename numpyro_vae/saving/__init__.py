"""A trained posterior as a folder: a manifest in JSON and arrays, without pickles or data."""

from numpyro_vae.saving.manifest import SavedPosteriorError

__all__ = ["SavedPosteriorError"]
