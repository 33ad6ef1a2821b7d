"""What is compared of a model, by name."""

from __future__ import annotations

from collections.abc import Callable

import densities
import results
from stepped import steps
from subject import Subject
from trees import datatree

COMPARISONS: dict[str, Callable[[Subject], None]] = {
    "sites": densities.sites,
    "elbo": densities.elbo,
    "supports": densities.supports,
    "weights": densities.weights,
    "jacobians": densities.jacobians,
    "minibatches": densities.minibatches,
    "subsamples": densities.subsamples,
    "rows": results.rows,
    "deterministic": results.deterministic,
    "predictions": results.predictions,
    "datatree": datatree,
    "steps": steps,
}
