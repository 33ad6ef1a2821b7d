"""The discrete latents of a datum, which are summed over instead of sampled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from numpyro import handlers

from numpyro_vae.model.plates import all_rows
from numpyro_vae.model.reading import ModelReader
from numpyro_vae.model.run import Run, run_model
from numpyro_vae.model.sites import Plate, Site
from numpyro_vae.model.trace import Rows

MAX_COMBINATIONS = 10_000


@dataclass(frozen=True)
class Enumeration:
    """All combinations of values that the enumerated sites of a datum can take.

    Attributes:
        plate: the local plate.
        sites: the enumerated sites in it.
        values: by site, ``(num_combinations, *datum_shape)``.
        supports: by site, its possible values.
    """

    plate: Plate
    sites: tuple[Site, ...]
    values: dict[str, Array]
    supports: dict[str, Array]

    @classmethod
    def read(cls, run: Run, sites: tuple[Site, ...] | None = None) -> Enumeration:
        """Read the enumerated sites of a model's run, or some of them.

        Raises:
            ValueError: if there are too many combinations to sum over.
        """
        plate = run.plate
        sites = tuple(run.sites.enumerated(plate.name)) if sites is None else sites
        supports = {site.name: _support(run, site) for site in sites}
        sizes = {site.name: (len(supports[site.name]),) * site.datum_size(plate) for site in sites}
        lengths = [length for name in sizes for length in sizes[name]]
        if math.prod(lengths) > MAX_COMBINATIONS:
            raise ValueError(
                f"The discrete sites {list(sizes)} of plate {plate.name!r} have "
                f"{math.prod(lengths)} combinations of values for each datum, more than the "
                f"{MAX_COMBINATIONS} that are summed over. Marginalize some in the model."
            )
        combined = np.array(list(itertools.product(*map(range, lengths))), int)
        values, start = {}, 0
        for site in sites:
            stop = start + len(sizes[site.name])
            chosen = supports[site.name][combined[:, start:stop]]
            values[site.name] = chosen.reshape(len(combined), *site.datum_shape(plate))
            start = stop
        return cls(plate, sites, values, supports)

    @classmethod
    def of_model(
        cls, reader: ModelReader, plate: str, args: tuple, kwargs: dict, rows: Rows
    ) -> Enumeration:
        """Read the enumerated sites of a plate off the model, whose plates hold given rows."""
        with handlers.block(), all_rows(rows=rows):
            return cls.read(run_model(reader, plate, {}, args, kwargs))

    @property
    def num_combinations(self) -> int:
        """How many combinations there are; one if nothing is enumerated."""
        return len(next(iter(self.values.values()))) if self.values else 1

    def assign(self, combination: Int[Array, "batch"]) -> dict[str, Array]:
        """Return the sites' values where every datum has a combination of its own."""
        return {
            site.name: site.unpack(
                self.values[site.name][combination].reshape(len(combination), -1), self.plate
            )
            for site in self.sites
        }

    def probabilities(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Return by site the probability of each possible value.

        Args:
            weights: the probability of every combination, ``(num_data, num_combinations)``.

        Returns:
            Arrays ``(num_data, *datum_shape, len(support))``.
        """
        return {name: np.tensordot(weights, self._is(name), axes=(1, 0)) for name in self.supports}

    def _is(self, name: str) -> np.ndarray:
        """Whether a combination gives an entry of a site a value of its support."""
        return np.asarray(self.values[name][..., None] == self.supports[name], float)


def _support(run: Run, site: Site) -> Any:
    """Return the values that a site can take."""
    if site.event_shape:
        raise ValueError(
            f"The enumerated site {site.name!r} has event shape {site.event_shape}; a discrete "
            "latent is a scalar. Put its entries into a plate."
        )
    return jnp.asarray(run.reading.choices[site.name]).reshape(-1)


def enumerated(model: Callable[..., Any], plate: str | None) -> Callable[..., Any]:
    """Return a model whose discrete latents in a plate are marked to be summed over.

    Args:
        model: the model.
        plate: the local plate; by default sites in any plate are marked.
    """

    def mark(msg: dict[str, Any]) -> dict[str, str]:
        plates = {frame.name for frame in msg["cond_indep_stack"]}
        inside = plate in plates if plate is not None else bool(plates)
        latent = msg["type"] == "sample" and not msg["is_observed"] and inside
        return {"enumerate": "parallel"} if latent and msg["fn"].has_enumerate_support else {}

    return handlers.infer_config(model, config_fn=mark)
