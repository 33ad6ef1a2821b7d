"""A model with data and a guide."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from kinds import ENUMERATED
from numpyro import handlers
from program import PlateSpec, Program


@dataclass(frozen=True)
class Case:
    """A model with data and a guide.

    Attributes:
        seed: of the generator.
        features: those that it has.
        program: what the model does.
        data: as for `numpyro_vae.fit`.
        batch_axes: the datum axis of each.
        static_kwargs: keyword arguments that never change.
        guide: from a model to its guide.
        is_x64: whether it runs with 64 bits.
        reparam: the configuration of ``handlers.reparam``.
        conditioned: the values of ``handlers.condition``.
        names: of the model's arguments.
    """

    seed: int
    features: tuple[str, ...]
    program: Program
    data: Any
    batch_axes: Any
    static_kwargs: dict[str, Any]
    guide: Callable[..., Any]
    is_x64: bool
    reparam: dict[str, Any]
    conditioned: dict[str, Any]
    names: tuple[str, ...]

    def model(self, *, subsamples: bool = True) -> Callable[..., Any]:
        """Return the model; without subsampling its plates hold all of their rows."""
        program = self.program
        if not subsamples:
            plates = tuple(replace(plate, subsample=None) for plate in program.plates)
            program = replace(program, plates=plates)
        model = as_model(program, self.names)
        model = handlers.reparam(model, config=self.reparam) if self.reparam else model
        return handlers.condition(model, data=self.conditioned) if self.conditioned else model

    def one_of(self, what: str, ways: Sequence[str]) -> str:
        """Return one of several ways to the same answer, by the seed; others see the others."""
        return ways[zlib.crc32(f"{what} {self.seed}".encode()) % len(ways)]

    @property
    def has_noise(self) -> bool:
        """Whether the scale of the noise is among the data."""
        return "noise_argument" in self.features

    def with_argument(self, name: str, value: float) -> Any:
        """Return the data with another value of an argument that is one number."""
        if isinstance(self.data, dict):
            return {**self.data, name: np.full_like(self.data[name], value)}
        if self.names[0] == "batch":
            return ({**self.data[0], name: np.full_like(self.data[0][name], value)},)
        pairs = zip(self.names, self.data, strict=False)
        return tuple(np.full_like(x, value) if key == name else x for key, x in pairs)

    @property
    def is_enumerated(self) -> bool:
        """Whether it has discrete latents, which are summed over."""
        return ENUMERATED in self.features

    @property
    def subsampled(self) -> dict[str, PlateSpec]:
        return {p.name: p for p in self.program.plates if p.subsample is not None}


def as_model(program: Program, names: Sequence[str]) -> Callable[..., Any]:
    """Return a model with a signature of its own."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        for name in names
    ]
    signature = inspect.Signature(parameters)

    def model(*args: Any, **kwargs: Any) -> None:
        bound = dict(signature.bind(*args, **kwargs).arguments)
        program.run({"noise": 1.0, "power": 2, **bound.pop("batch", {}), **bound})

    model.__signature__ = signature  # ty: ignore
    return model
