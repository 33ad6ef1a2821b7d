"""The discrete latents of a datum, which are summed over instead of sampled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Int
from numpyro import handlers

from numpyro_vae.model.independent import independent_plates
from numpyro_vae.model.provenance import RANDOM, Names
from numpyro_vae.model.run import Run
from numpyro_vae.model.sites import Plate, Site

MAX_COMBINATIONS = 10_000


@dataclass(frozen=True)
class Level:
    """The enumerated sites of a row, or of the elements of plates within it.

    Attributes:
        plates: those plates, none for the row itself; what is in each of their elements is summed
            over by itself.
        sites: the sites.
        values: by site, those in each combination of an element, ``(num_combinations, ...)`` with
            the axes of a row's values that are of no such plate.
        num_combinations: how many there are; one if there are no sites.
    """

    plates: tuple[Plate, ...]
    sites: tuple[Site, ...]
    values: dict[str, Array]
    num_combinations: int

    @property
    def names(self) -> Names:
        """The names of the plates."""
        return frozenset(plate.name for plate in self.plates)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many elements the plates have."""
        return tuple(plate.length for plate in self.plates)


@dataclass(frozen=True)
class Enumeration:
    """All combinations of values that the enumerated sites of a datum can take.

    Elements of a plate within a row are independent given all outside it, so that they are summed
    over one by one: tables of log-densities have an axis of combinations for each level.

    Attributes:
        plate: the local plate.
        levels: of the row itself, and of plates within it, each after those around it.
        supports: by enumerated site, its possible values.
        places: by name of a site whose log-density depends on their values, the number of the
            level that it belongs to.
    """

    plate: Plate
    levels: tuple[Level, ...]
    supports: dict[str, Array]
    places: dict[str, int]

    @classmethod
    def read(cls, run: Run) -> Enumeration:
        """Read the enumerated sites of a model's run.

        Raises:
            ValueError: if there are too many combinations to sum over.
        """
        sites = tuple(run.sites.enumerated(run.plate.name))
        reads = run.sites.reads.densities if sites else {}
        plates = {name: frozenset(run.sites.sites[name].plates) for name in reads}
        return cls.of(run, sites, plates, reads)

    @classmethod
    def of(
        cls,
        run: Run,
        sites: tuple[Site, ...],
        plates: Mapping[str, Names],
        reads: Mapping[str, Names],
    ) -> Enumeration:
        """Return the enumeration of some sites; see `read`.

        Args:
            run: the model's run.
            sites: the sites to sum over.
            plates: by name of a site that has a log-density, the plates around it.
            reads: by name of such a site, what its log-density is made of.
        """
        local = frozenset({run.plate.name})
        within = {name: x - local if local <= x else frozenset() for name, x in plates.items()}
        mixed = run.mixed if any(within[site.name] for site in sites) else frozenset()
        kept, why = independent_plates(sites, within, reads, mixed)
        of_site = {site.name: within[site.name] & kept for site in sites}
        supports = {site.name: _support(run, site) for site in sites}
        groups = sorted({frozenset(), *of_site.values()}, key=lambda x: (len(x), sorted(x)))
        _require_few(run, sites, groups, of_site, supports, why)
        levels = tuple(_level(run, sites, group, of_site, supports) for group in groups)
        names = {site.name for site in sites}
        places = {}
        for name, found in reads.items():
            read = names if RANDOM in found else names & (found | {name})
            if read:
                places[name] = max(groups.index(of_site[x]) for x in read)
        return cls(run.plate, levels, supports, places)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The enumerated sites."""
        return tuple(site for level in self.levels for site in level.sites)

    @property
    def num_combinations(self) -> int:
        """How many combinations there are of one element of each level."""
        return math.prod(self._grid)

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(level.num_combinations for level in self.levels)

    def everywhere(self, combination: Array, num_rows: int) -> dict[str, Array]:
        """Return the sites' values where all elements of all rows have the same."""
        each = jnp.unravel_index(combination, self._grid)
        shapes = [(num_rows, *level.lengths) for level in self.levels]
        return self._assign([jnp.full(*pair) for pair in zip(shapes, each, strict=True)])

    def _assign(self, chosen: Sequence[Int[Array, "batch ..."]]) -> dict[str, Array]:
        """Return the sites' values, given by level the combination of every element."""
        return {
            site.name: self._in_place(site, level, level.values[site.name][index])
            for level, index in zip(self.levels, chosen, strict=True)
            for site in level.sites
        }

    def _in_place(self, site: Site, level: Level, values: Array) -> Array:
        """Return values of a site, whose axes of rows and elements are in front, as it has them."""
        axes = [site.axis(plate) for plate in (self.plate, *level.plates)]
        return jnp.moveaxis(values, range(len(axes)), axes)

    def add_up(self, tables: Sequence[Array]) -> list[Array]:
        """Sum over the values of elements, from the innermost plates outwards.

        Args:
            tables: by level the log-density of each element, where all elements have the same
                combination, ``(num_combinations, batch, *elements)``.

        Returns:
            By level the log-density of an element and of all within it, summed over the values of
            these: an axis of combinations for each level, of one entry where it depends on none,
            and ``(batch, *elements)``.
        """
        found = [self._open(*pair) for pair in enumerate(tables)]
        for place in reversed(range(1, len(self.levels))):
            around = self._around(place)
            inner = logsumexp(found[place], axis=place, keepdims=True)
            inner = self._to_front(place, around, inner)
            found[around] += inner.sum(tuple(range(found[around].ndim, inner.ndim)))
        return found

    def of_rows(self, tables: Sequence[Array]) -> Array:
        """Return of what `add_up` returns the first, ``(num_combinations, batch)``."""
        return tables[0].reshape(self._grid[0], -1)

    def draw(self, row_keys: Array, tables: Sequence[Array]) -> dict[str, Array]:
        """Draw values of the sites, those of inner plates given those of the plates around.

        Args:
            row_keys: a key for each row.
            tables: what `add_up` returns.
        """
        chosen = [jax.vmap(jax.random.categorical, (0, 1))(row_keys, self.of_rows(tables))]
        for place, table in enumerate(tables[1:], start=1):
            for outer, index in enumerate(chosen):
                if table.shape[outer] > 1:
                    spread = self._to_back(outer, place, index)
                    spread = spread.reshape((1,) * len(self.levels) + spread.shape)
                    table = jnp.take_along_axis(table, spread, outer)
            logits = table.reshape(self._grid[place], *table.shape[len(self.levels) :])
            keys = jax.vmap(partial(jax.random.fold_in, data=place))(row_keys)
            draw = partial(jax.random.categorical, axis=0)
            chosen.append(jax.vmap(draw, (0, 1))(keys, logits))
        return self._assign(chosen)

    def log_marginals(self, tables: Sequence[Array]) -> list[Array]:
        """Return the log-probability of the combinations of each element, plus that of its row.

        Args:
            tables: what `add_up` returns.

        Returns:
            By level ``(num_combinations, batch, *elements)``; the sum over the first axis is the
            log-density of the row.
        """
        grid, joint = len(self.levels), [tables[0]]
        for place, table in enumerate(tables[1:], start=1):
            around = self._around(place)
            given = table - logsumexp(table, axis=place, keepdims=True)
            joint.append(self._to_back(around, place, joint[around], grid) + given)
        found = []
        for place, table in enumerate(joint):
            others = tuple(axis for axis in range(grid) if axis != place)
            found.append(logsumexp(table, axis=others))
        return found

    def probabilities(self, weights: Sequence[Array]) -> dict[str, Array]:
        """Return by site the probability of each possible value.

        Args:
            weights: by level the probability of every combination of each element,
                ``(num_combinations, batch, *elements)``.

        Returns:
            Arrays ``(batch, *datum_shape, len(support))``.
        """
        found = {}
        for level, weight in zip(self.levels, weights, strict=True):
            for site in level.sites:
                chosen = level.values[site.name][..., None] == self.supports[site.name]
                values = jnp.tensordot(weight, chosen.astype(weight.dtype), axes=(0, 0))
                values = self._in_place(site, level, values)
                found[site.name] = jnp.moveaxis(values, site.axis(self.plate), 0)
        return found

    def _around(self, place: int) -> int:
        """Return the number of the innermost level around another."""
        inside = self.levels[place].names
        return max(x for x in range(place) if self.levels[x].names < inside)

    def _open(self, place: int, table: Array) -> Array:
        """Return a table with an axis for each level, of those that are around one alone."""
        table = table.reshape(*self._grid, *table.shape[1:])
        inside = self.levels[place].names
        used = [slice(None) if x.names <= inside else slice(1) for x in self.levels]
        return table[tuple(used)]

    def _to_front(self, place: int, around: int, table: Array) -> Array:
        """Return a level's table with the axes of the plates of one around it before others."""
        mine, outer = self.levels[place].plates, self.levels[around].plates
        start = table.ndim - len(mine)
        axes = [start + mine.index(plate) for plate in outer]
        return jnp.moveaxis(table, axes, range(start, start + len(outer)))

    def _to_back(self, around: int, place: int, table: Array, start: int = 0) -> Array:
        """Return an outer level's table with axes of one entry for the other plates of a level."""
        mine, outer = self.levels[place].plates, self.levels[around].plates
        inside = [x for x, plate in enumerate(mine) if plate not in outer]
        return jnp.expand_dims(table, [start + 1 + x for x in inside])


def _level(
    run: Run,
    sites: tuple[Site, ...],
    group: Names,
    of_site: Mapping[str, Names],
    supports: Mapping[str, Array],
) -> Level:
    """Return the level of the sites whose plates, as far as they are independent, are a group."""
    plates = sorted((run.sites.plates[name] for name in group), key=lambda plate: plate.dim)
    mine = tuple(site for site in sites if of_site[site.name] == group)
    shapes = {site.name: _shape_of_element(run, site, group) for site in mine}
    lengths = [len(supports[x]) for x, shape in shapes.items() for _ in range(math.prod(shape))]
    combined = np.array(list(itertools.product(*map(range, lengths))), int)
    values, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        values[name] = supports[name][combined[:, start:stop]].reshape(len(combined), *shape)
        start = stop
    return Level(tuple(plates), mine, values, len(combined))


def _shape_of_element(run: Run, site: Site, group: Names) -> tuple[int, ...]:
    """Return the shape of a site's values in an element of some plates within a row."""
    plates = (run.plate, *map(run.sites.plates.__getitem__, group))
    taken = {site.axis(plate) for plate in plates}
    return tuple(n for axis, n in enumerate(site.batch_shape) if axis not in taken)


def _require_few(
    run: Run,
    sites: tuple[Site, ...],
    groups: Sequence[Names],
    of_site: Mapping[str, Names],
    supports: Mapping[str, Array],
    why: str,
) -> None:
    """Raise ValueError if there are too many combinations."""
    total = math.prod(
        len(supports[site.name]) ** math.prod(_shape_of_element(run, site, of_site[site.name]))
        for site in sites
    )
    if total > MAX_COMBINATIONS:
        names = [site.name for site in sites]
        reason = f" {why}, so that their values count together." if why else ""
        raise ValueError(
            f"The discrete sites {names} of plate {run.plate.name!r} have {total} combinations of "
            f"values for each datum, more than the {MAX_COMBINATIONS} that are summed over."
            f"{reason} Marginalize some in the model."
        )


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
