"""The versions of the packages that a result depends on, for those who keep results."""

from __future__ import annotations

from importlib import metadata

PACKAGES = ("numpyro_vae", "numpyro", "flax", "jax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Return by package its version, "unknown" of one that is run without being installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
