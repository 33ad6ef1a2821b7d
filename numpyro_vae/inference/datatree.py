"""Results as ArviZ reads them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numpyro_vae.inference.draws import choose_names
from numpyro_vae.inference.fingerprint import NAME
from numpyro_vae.inference.runner import Runner
from numpyro_vae.model.sites import ModelSites

if TYPE_CHECKING:
    from xarray import Dataset, DataTree

SAMPLED = ("posterior", "posterior_predictive", "log_likelihood", "sample_stats")
DRAWS = ("chain", "draw")
GROUPS = (*SAMPLED, "observed_data", "constant_data")


def choose_groups(groups: Iterable[str] | None) -> tuple[str, ...]:
    """Return the groups wanted, by default all.

    Raises:
        ValueError: if one does not exist.
    """
    chosen = GROUPS if groups is None else (groups,) if isinstance(groups, str) else tuple(groups)
    unknown = sorted(set(chosen) - set(GROUPS))
    if unknown:
        raise ValueError(f"There are no groups {unknown} here, choose from {list(GROUPS)}.")
    return tuple(group for group in GROUPS if group in chosen)


def choose_sites(runner: Runner, var_names: Iterable[str] | None) -> list[str]:
    """Return the names of the latent and deterministic sites wanted, by default all."""
    guide = runner.guide
    known = (*runner.local_names, *guide.global_names, *guide.sites.deterministic)
    return choose_names(var_names, known)


def require_known_dims(
    coords: Mapping[str, Any], sites: ModelSites, found: Iterable[Hashable]
) -> None:
    """Raise ValueError for coordinates of a dimension that neither the model nor a result has.

    Args:
        coords: by dimension.
        sites: of the model, whose dimensions need not all be in each result.
        found: the dimensions of the result.
    """
    known = {"chain", "draw", *sites.plates, *map(str, found)}
    for site in sites.sites.values():
        known |= {f"{site.name}_dim_{axis}" for axis in range(len(site.event_shape))}
    unknown = sorted(set(coords) - known)
    if unknown:
        raise ValueError(
            f"coords has {unknown}, which are no dimensions here. Give coordinates of some of "
            f"{sorted(known)}."
        )


def tree_name(name: Any) -> str:
    """Return the name that a site or a plate has in a tree, where ``/`` stands between groups.

    Example:
        >>> tree_name("scope/z")
        'scope.z'
    """
    return str(name).replace("/", ".")


def for_tree(dataset: Dataset) -> Dataset:
    """Return a dataset with the names that its variables and dimensions have in a tree."""
    names = {*dataset.variables, *dataset.dims}
    return dataset.rename({name: tree_name(name) for name in names if tree_name(name) != name})


def check_names(sites: ModelSites) -> None:
    """Raise if sites or plates cannot have their names in a tree.

    Raises:
        ValueError: naming the plate or the site.
    """
    plates = dict.fromkeys(sites.plates, "plate")
    kinds = plates | dict.fromkeys((*sites.sites, *sites.deterministic), "site")
    known: dict[str, str] = {}
    for name, kind in kinds.items():
        if name in DRAWS:
            raise ValueError(
                f"The {kind} {name!r} has the name of a dimension of draws in a DataTree. Rename "
                f"the {kind} in the model, to {name + 's'!r} for instance."
            )
        if known.setdefault(tree_name(name), name) != name:
            raise ValueError(
                f"{known[tree_name(name)]!r} and {name!r} are both {tree_name(name)!r} in a "
                "DataTree, where no name has a slash. Rename one of them in the model."
            )


def argument_dims(sites: ModelSites, name: str, dims: list[str], shape: Sequence[int]) -> list[str]:
    """Return the dimensions of an argument of a model that has the name of a site.

    It may be laid out in another way than what the site observes: only where each size says which
    dimension it is, an argument has those of the site, and else that of the rows.

    Args:
        sites: those of the model.
        name: of the argument.
        dims: of an array of the site, rows in front.
        shape: of the argument, rows in front.
    """
    site = sites.sites.get(name)
    if site is None:
        return dims
    plates = {plate: sites.plates[plate].dim for plate in site.plates}
    places = (plates[dim] if dim in plates else -int(dim.rpartition("_")[2]) for dim in dims[1:])
    sizes = [site.batch_shape[place] for place in places]
    told = len({*sizes}) == len(sizes) and [*shape[1:]][: len(sizes)] == sizes
    return dims if told else dims[:1]


def build_datatree(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    dims: Mapping[str, list[str]],
    fingerprint: str,
    sites: ModelSites,
    coords: Mapping[str, Any],
) -> DataTree:
    """Return arrays as a DataTree in ArviZ's schema, with the fingerprint of their rows.

    Args:
        groups: by group and variable; in the sampled groups the draws are the leading axis, and
            become the dimensions ``chain`` and ``draw``.
        dims: by variable, the names of its leading dimensions but these.
        fingerprint: that of all rows.
        sites: those of the model.
        coords: coordinates by dimension.

    Slashes in names become points, see `tree_name`.

    Raises:
        ValueError: if a coordinate has another length than its dimension, or there is no such
            dimension.
    """
    from arviz_base import from_dict  # not from arviz, which imports its plots
    from xarray import DataTree

    coords, found = {tree_name(name): coord for name, coord in (coords or {}).items()}, {}
    for group, variables in groups.items():
        if not variables:
            continue
        sampled = group in SAMPLED
        values = {name: value[None] if sampled else value for name, value in variables.items()}
        own = {name: dims[name] for name in values}
        if group == "constant_data":
            own = {x: argument_dims(sites, x, own[x], np.shape(values[x])) for x in values}
        # A log-likelihood has no event, so that its variable has fewer dimensions than its site.
        known = {
            tree_name(name): [*map(tree_name, own[name])][: np.ndim(variables[name]) - sampled]
            for name in values
        }
        values = {tree_name(name): value for name, value in values.items()}
        tree = from_dict({group: values}, dims=known, coords=coords)
        found[group] = tree[group].to_dataset()
    require_known_dims(coords, sites, (dim for group in found.values() for dim in group.dims))
    tree = DataTree.from_dict(found)
    tree.attrs[NAME] = fingerprint
    return tree
