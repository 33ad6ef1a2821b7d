"""Results as ArviZ reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_vae.sites import ModelSites

if TYPE_CHECKING:
    from xarray import DataTree

SAMPLED = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats")


def site_dims(sites: ModelSites) -> dict[str, list[str]]:
    """Return by site the names of its plates, outermost first, as dimensions.

    Dimensions of the event get ArviZ's own names, ``<site>_dim_0`` and so on.
    """
    found = {}
    for site in sites.sites.values():
        by_dim = {sites.plates[name].dim: name for name in site.plates}
        batch = range(-len(site.batch_shape), 0)
        found[site.name] = [by_dim.get(dim, f"{site.name}_batch_{-dim}") for dim in batch]
    return found


def build_datatree(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    dims: Mapping[str, list[str]],
    coords: Mapping[str, Any] | None = None,
) -> DataTree:
    """Return arrays as a DataTree in ArviZ's schema.

    Args:
        groups: by group and variable; in the sampled groups the draws are the leading axis, and
            become the dimensions ``chain`` and ``draw``.
        dims: by variable, the names of its leading dimensions but these.
        coords: coordinates by dimension.

    Raises:
        ValueError: if a coordinate has another length than its dimension.
    """
    import arviz as az

    data = {
        group: {
            name: value[None] if group in SAMPLED else value for name, value in variables.items()
        }
        for group, variables in groups.items()
        if variables
    }
    tree = az.from_dict(data, dims=dict(dims), coords=dict(coords or {}))
    tree.attrs["inference_library"] = "numpyro_vae"
    return tree
