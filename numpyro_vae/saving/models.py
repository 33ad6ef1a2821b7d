"""What a manifest says of the model, and how another model is told from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_vae.data.shapes import argument_shapes
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.model.plan import GuidePlan
from numpyro_vae.model.plates import all_rows
from numpyro_vae.model.sites import Plate, Site
from numpyro_vae.model.trace import NEEDS_VALUES
from numpyro_vae.saving.codec import CannotStoreError, Json, pack, unpack

REMEDY = "Pass the model, and what else it was trained with, as they were."


@dataclass(frozen=True)
class SavedModel:
    """What a manifest says of a model.

    Attributes:
        content: that part of the manifest.
        path: of the folder, for messages.
    """

    content: Json
    path: str

    def __call__(self, plan: GuidePlan) -> None:
        """Compare with the model as it is read on any data, in all but the shapes of its sites.

        Raises:
            ValueError: naming what differs.
        """
        found = {name: _without_shape(site) for name, site in describe_sites(plan).items()}
        known = {name: _without_shape(site) for name, site in self.content["sites"].items()}
        self.compare("site", known, found)

    def compare(self, what: str, known: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Raise a ValueError that names the first of two descriptions by name that differ."""
        for name in (*known, *found):
            if known.get(name) != found.get(name):
                here, there = (x.get(name, "missing") for x in (known, found))
                raise ValueError(
                    f"{self.path} does not fit: {what} {name!r} is {here} in it, and {there} in "
                    f"this model. {REMEDY}"
                )
        if list(known) != list(found):
            raise ValueError(
                f"{self.path} does not fit: it has the {what}s {list(known)}, and this model "
                f"{list(found)}, in another order. {REMEDY}"
            )


def describe_model(guide: AmortizedGuide, static_names: Collection[str]) -> Json:
    """Return what a manifest says of a guide's model.

    Args:
        guide: that has read it.
        static_names: of the keyword arguments that are the same in every call.

    Raises:
        ValueError: if it has not, or if the support of a global site depends on data.
    """
    if guide.plan is None and isinstance(guide.expects, SavedModel):
        return guide.expects.content  # loaded, and saved again
    if guide.plan is None:
        raise ValueError(
            "The guide has not read its model yet, so that it is unknown what to save. Call the "
            "posterior once, as in posterior.encode(data), and save it then."
        )
    content = {"sites": describe_sites(guide.plan), "unlike": guide.plan.unlike}
    args, kwargs, rows = guide.arguments
    own = {name: value for name, value in kwargs.items() if name not in static_names}
    try:
        arguments, supports = pack((args, own, rows), _store_shape), _supports(guide)
    except (CannotStoreError, *NEEDS_VALUES):  # it is read on data alone, and compared then
        return content | {"supports": None, "arguments": None}
    if _bounds(guide, supports) != guide.plan.bounds:
        raise ValueError(
            f"The supports of global sites, among {list(guide.plan.globals)}, depend on the data, "
            "which are not saved. Give the model their bounds as static keyword arguments."
        )
    return content | {"supports": told_supports(supports), "arguments": arguments}


def read_saved(guide: AmortizedGuide, saved: SavedModel, static_kwargs: Mapping[str, Any]) -> None:
    """Let a guide read its model without data, and compare it with the one that was saved.

    Args:
        guide: that has not read its model.
        saved: what is known.
        static_kwargs: keyword arguments of the model that are the same in every call.

    Raises:
        ValueError: naming what differs.
    """
    args, own, rows = unpack(saved.content["arguments"], _restore_shape)
    given, plans = (args, {**own, **static_kwargs}, rows), []
    try:
        jax.eval_shape(lambda: plans.append(guide.plan_for(*_zeros(given))))
    except Exception as error:  # of any kind, as the model's own code raises it
        raise ValueError(
            f"{saved.path} does not fit: this model does not run with the arguments that it was "
            f"saved with, {argument_shapes(args, own)}: {error}. {REMEDY}"
        ) from error
    saved.compare("site", saved.content["sites"], describe_sites(plans[-1]))
    guide.adopt(plans[-1], given)
    supports = _supports(guide)
    saved.compare("support", saved.content["supports"], told_supports(supports))
    known = {"unlike": saved.content["unlike"], "bounds": _bounds(guide, supports)}
    guide.plan = replace(plans[-1], **known)  # what cannot be told without values


def require_params(guide: AmortizedGuide, params: dict[str, Any], saved: SavedModel) -> None:
    """Compare the shapes of parameters with those that a guide and its model declare.

    Args:
        guide: that has read its model.
        params: the parameters.
        saved: what is known.

    Raises:
        ValueError: naming what differs.
    """
    declared = jax.eval_shape(lambda: guide.reader.read(*_zeros(guide.arguments)).params)
    needed = {name: _shapes(param.value) for name, param in declared.items()}
    found = {name: _shapes(params[name]) for name in declared if name in params}
    saved.compare("parameter", found, needed)

    def encode() -> None:
        args, kwargs, rows = _zeros(guide.arguments)
        guide.encode_rows(all_rows(rows=rows), params, args, kwargs)

    try:
        jax.eval_shape(encode)
    except Exception as error:  # of any kind, as the encoder may be the user's
        raise ValueError(f"{saved.path} does not fit this encoder: {error} {REMEDY}") from error


def describe_sites(plan: GuidePlan) -> dict[str, Json]:
    """Return by site what a guide depends on, local sites first, in their order."""
    sites = plan.sites.sites
    roles = {site.name: "local" for site in plan.local} | dict.fromkeys(plan.globals, "global")
    rest = {name: site for name, site in sites.items() if name not in roles}
    roles |= {name: "observed" if site.is_observed else "other" for name, site in rest.items()}
    return {name: _describe(sites[name], role, plan.plate) for name, role in roles.items()}


def _describe(site: Site, role: str, plate: Plate) -> Json:
    is_local = plate.name in site.plates
    shape = site.batch_shape + site.unconstrained_shape
    shape = site.datum_shape(plate) if is_local else shape
    return {
        "role": role,
        "local plate": plate.name if is_local else None,
        "plates": list(site.plates),
        "shape": list(shape),
    }


def _without_shape(site: dict[str, Json]) -> dict[str, Json]:
    return {key: value for key, value in site.items() if key != "shape"}


def _supports(guide: AmortizedGuide) -> dict[str, Any]:
    """Return the support of each latent site, with bounds as they are for data of zeros."""
    fixed: dict[str, Any] = {}

    def read() -> dict[str, Any]:
        reading = guide.reader.read(*_zeros(guide.arguments))
        fixed.update(reading.fixed_supports.value)
        return reading.supports

    computed = jax.jit(read)()
    return dict(sorted({**fixed, **computed}.items()))


def told_supports(supports: dict[str, Any]) -> dict[str, str]:
    """Return supports in words, with bounds as they are on any machine."""
    rounded = np.vectorize(lambda bound: float(f"{bound:.5g}"))
    return {
        name: repr(jax.tree.map(lambda bound: rounded(np.asarray(bound)).tolist(), support))
        for name, support in supports.items()
    }


def _bounds(guide: AmortizedGuide, supports: dict[str, Any]) -> tuple[bytes, ...]:
    """Return what the supports of global sites are made of, see `ModelReader.bounds`."""
    leaves = jax.tree.leaves([supports[name] for name in supports if name in guide.global_names])
    return tuple(np.asarray(leaf).tobytes() for leaf in leaves)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}


def _zeros(tree: Any) -> Any:
    """Return arguments of zeros; made in a compiled function they take no memory."""

    def fill(leaf: Any) -> Any:
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        return jnp.zeros(leaf.shape, leaf.dtype) if is_shape else leaf

    return jax.tree.map(fill, tree)


def _store_shape(array: Any, path: str) -> Json:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _restore_shape(known: Json) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(known["shape"]), jnp.dtype(known["dtype"]))
