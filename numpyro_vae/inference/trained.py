"""What `Posterior` is made of: a guide that was trained, and what it was trained to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpyro_vae.guides.abstract import AbstractGuide
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.guides.traced import TracedGuide


def require_trained(
    guide: Any,
    params: Any,
    model: Callable[..., Any] | None = None,
    plate: str | None = None,
) -> AbstractGuide:
    """Return any guide as one of rows, if these are a trained one and what it was trained to.

    Raises:
        TypeError: if one of them is something else, or a guide written by hand has no model.
    """
    if not callable(guide) or isinstance(guide, type):
        found = f"the class {guide.__name__}" if isinstance(guide, type) else type(guide).__name__
        raise TypeError(
            f"The guide is {found}, expected a guide such as AutoAmortizedNormal(model), "
            "AutoNormal(model), or a function. Pass the guide that was trained, before its "
            "parameters."
        )
    values = getattr(params, "params", params)
    if not isinstance(values, Mapping):
        raise TypeError(
            f"The parameters are of type {type(params).__name__}, expected what fit or svi.run "
            "returned, or a dict of parameters. Pass result, or result.params."
        )
    if isinstance(guide, AmortizedGuide):
        if model is not None or plate not in (None, guide.plate_name):
            raise TypeError("An amortized guide knows its model and its plate: leave them out.")
        return guide
    model = getattr(guide, "model", None) if model is None else model
    if model is None:
        raise TypeError(
            f"The guide {getattr(guide, '__name__', guide)!r} does not know its model. Pass it "
            "too: Posterior(guide, result, model=model)."
        )
    return TracedGuide(guide, model, with_state(params), plate)


def with_state(params: Any) -> dict[str, Any]:
    """Return parameters, of a result with the networks' state among them."""
    state = getattr(getattr(params, "state", None), "mutable_state", None)
    return {**getattr(params, "params", params), **(state or {})}
