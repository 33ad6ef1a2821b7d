"""What a manifest says of the programs that are served."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from numpyro_vae.checks.importance import MAX_DIVERGENCE
from numpyro_vae.checks.novelty import LEVEL, NEIGHBOURS, PARTICLES, NoveltyReference
from numpyro_vae.inference.gathering import site_dims
from numpyro_vae.inference.psis import MIN_SAMPLES, khat_threshold
from numpyro_vae.numpyro_internals import HANDLERS
from numpyro_vae.saving.codec import Json
from numpyro_vae.saving.models import told_supports
from numpyro_vae.serving.programs import Programs

ROWS = "rows"  # the symbol that stands for their number
QUANTILES = (0.5, 0.9, 0.99)


def describe_inputs(programs: Programs) -> Json:
    """Return by name the shape and type of each array of rows, and along each axis its names."""
    found = told_shapes(programs.inputs.shapes(export.symbolic_shape(ROWS)[0]))
    for name, columns in programs.inputs.columns(programs.runner.seen.columns).items():
        found[name]["columns"] = columns
    return found


def told_shapes(tree: Any) -> Json:
    """Return shapes, with names for what is symbolic, and types."""

    def told(leaf: Any) -> Json:
        shape = [size if isinstance(size, int) else str(size) for size in leaf.shape]
        return {"shape": shape, "dtype": str(leaf.dtype)}

    return jax.tree.map(told, tree)


def describe_latents(programs: Programs) -> Json:
    """Return by latent site the dimensions of its draws, and its support."""
    guide, axes = programs.runner.guide, programs.axes()
    dims, supports, found = site_dims(guide.sites), _supports(programs), {}
    for name in axes:
        site = guide.sites.sites[name]
        is_local = guide.plate.name in site.plates
        event = [f"{name}_dim_{axis}" for axis in range(len(site.event_shape))]
        own = [ROWS if dim == guide.plate.name else dim for dim in dims[name]]
        found[name] = {
            "role": "local" if is_local else "global",
            "dims": ["draw", *([] if is_local else [ROWS]), *own, *event],
            "support": supports.get(name, "the values of a discrete site"),
        }
    return found


def _supports(programs: Programs) -> dict[str, str]:
    """Return the support of each latent site, "depends on the data" where rows differ in it."""
    rows, guide = programs.inputs.rows, programs.runner.guide

    def read(number: int) -> dict[str, str]:
        batch = programs.inputs.batch(_row(programs, number), jnp.asarray(number))
        args, kwargs = batch.arguments()
        kwargs |= programs.runner.static_kwargs
        reading = guide.reader.read(args, kwargs, batch.rows)
        return told_supports({**reading.fixed_supports.value, **reading.supports})

    with HANDLERS:
        first, last = read(0), read(rows.num_rows - 1)
    return {name: x if last[name] == x else "depends on the data" for name, x in first.items()}


def _row(programs: Programs, number: int) -> dict[str, Any]:
    found, axes = programs.inputs.take([number]), programs.inputs.axes
    return {
        name: x if axes[name] is None else jnp.squeeze(x, axes[name]) for name, x in found.items()
    }


def describe_importance(num_samples: int) -> Json:
    """Return the thresholds of the importance check, of as many draws."""
    khat = khat_threshold(num_samples) if num_samples >= MIN_SAMPLES else None
    return {"khat_threshold": khat, "max_divergence": MAX_DIVERGENCE}


def describe_novelty(reference: NoveltyReference) -> Json:
    """Return what rows are compared with, of which the arrays have all."""
    scores = {"features": reference.neighbours.calibrating, "evidence": reference.evidence}
    told = {
        f"novelty_{name}": {str(q): float(np.quantile(x, q)) for q in QUANTILES}
        for name, x in scores.items()
    }
    return {
        "level": LEVEL,
        "num_reference": len(reference.evidence),
        "neighbours": NEIGHBOURS,
        "particles": PARTICLES,
        "quantiles": told,
    }
