"""Data that are not finite: fine where the model leaves them out, an error where it reads them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.model.reading import ModelReader
from numpyro_vae.model.supports import MISSING
from numpyro_vae.model.trace import Rows


def require_finite_observations(
    reader: ModelReader,
    data: ArrayData,
    static_kwargs: dict[str, Any],
    rows: Rows,
    besides: Collection[str] = (),
) -> None:
    """Raise if a value that is not finite gets into an observed site.

    A model may be given NaN for what is missing, but may not observe it, not even where a mask
    hides it: the gradient there would be NaN all the same.

    Args:
        reader: of the model.
        data: its arguments.
        static_kwargs: its keyword arguments that never change.
        rows: by plate, the size and the rows that it is to hold.
        besides: sites that may have such values.

    Raises:
        ValueError: naming the data and the site.
    """
    if not data.not_finite:
        return
    args, kwargs = data.whole()
    values = reader.read_all(args, {**kwargs, **static_kwargs}, rows).values
    looked = {name: value for name, value in values.items() if name not in besides}
    bad = [name for name, value in looked.items() if not np.asarray(jnp.isfinite(value)).all()]
    if bad:
        raise ValueError(f"{data.not_finite}, and the model observes them at {bad}. {MISSING}.")
