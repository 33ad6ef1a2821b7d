"""Data that are not finite: fine where the model leaves them out, an error where it reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro import handlers

from numpyro_vae.data.arrays import ArrayData, Layout
from numpyro_vae.model.plates import all_rows
from numpyro_vae.model.sites import NEEDS_VALUES, trace_model


@dataclass(frozen=True, eq=False)
class FiniteObservations:
    """The rule that a model may be given NaN for what is missing, but may not observe it.

    Args:
        model: a NumPyro model.
        static_kwargs: its keyword arguments that never change.
    """

    model: Callable[..., Any]
    static_kwargs: dict[str, Any]

    def require(self, data: ArrayData) -> None:
        """Raise if a value that is not finite gets into an observed site.

        Not even where a mask hides it: the gradient there would be NaN all the same.

        Raises:
            ValueError: naming the data and the site.
        """
        if not data.not_finite:
            return
        try:
            flags = jax.jit(self._are_finite, static_argnums=0)(data.layout, data.arrays)
        except NEEDS_VALUES:
            flags = self._are_finite(data.layout, data.arrays)
        bad = [name for name, finite in flags.items() if not np.asarray(finite)]
        if bad:
            raise ValueError(
                f"{data.not_finite}, and the model observes them at {bad}. Remove them; or, if "
                "they stand for what is missing, let the model fill them in, as in "
                "obs=jnp.where(mask, x, 0.0) with mask = ~jnp.isnan(x), and leave them out with "
                "handlers.mask(mask=mask)."
            )

    def _are_finite(self, layout: Layout, arrays: tuple[Array, ...]) -> dict[str, Array]:
        args, kwargs = layout.whole(arrays)
        with handlers.block(), all_rows(), handlers.seed(rng_seed=0):
            trace = trace_model(self.model, args, {**kwargs, **self.static_kwargs})
        return {
            name: jnp.isfinite(site["value"]).all()
            for name, site in trace.items()
            if site["type"] == "sample" and site["is_observed"] and site["value"] is not None
        }
