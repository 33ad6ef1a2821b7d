"""The options that all amortized guides share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from numpyro.infer.autoguide import AutoGuide

__all__ = ["GuideOptions"]


class GuideOptions(TypedDict, total=False):
    """The options that all amortized guides share.

    Attributes:
        inputs: ``inputs(*args, **kwargs)``, from the model's arguments to what the encoder reads,
            data along the leading axis. By default what is observed of the data.
        plate: the local plate's name; by default the one that subsamples, else the only one
            that holds latent sites.
        segments: where another plate holds the observations of the local plate's data, as houses
            do those of counties: by that plate's name, a function of the model's arguments that
            returns for each of its rows the datum, the row of the local plate, it belongs to.
        condition_on: the names of global sites whose sampled values the heads read.
        dependencies: by local site, the local sites whose sampled values its head reads.
        global_guide: an AutoGuide class, or a callable from a model to a guide, for the latent
            sites outside the local plate. Another amortized guide serves a second local plate.
        create_plates: as in every `numpyro.infer.autoguide.AutoGuide`; seldom needed, as plates
            are those of the model.
        prefix: of the guide's parameters.
    """

    inputs: Callable[..., Any] | None
    plate: str | None
    segments: Mapping[str, Callable[..., Any]]
    condition_on: Sequence[str]
    dependencies: Mapping[str, Sequence[str]]
    global_guide: Callable[..., Any]
    create_plates: Callable[..., Any] | None
    prefix: str


def require_functions(model: Any, inputs: Any) -> None:
    """Raise TypeError if the model or ``inputs=`` is no function, or the model is a guide."""
    if not callable(model) or isinstance(model, AutoGuide):
        raise TypeError(
            f"The model is of type {type(model).__name__}, expected a function with NumPyro's "
            "sample sites. Pass the model itself, before the encoder."
        )
    if inputs is not None and not callable(inputs):
        raise TypeError(
            f"inputs is of type {type(inputs).__name__}, expected a function of the model's "
            "arguments that returns what the encoder reads, such as lambda x: jnp.log1p(x)."
        )


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return names as a tuple, of which one may be given alone.

    Example:
        >>> as_names("mu")
        ('mu',)
    """
    return (names,) if isinstance(names, str) else tuple(names)
