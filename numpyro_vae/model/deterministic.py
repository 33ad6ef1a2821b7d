"""The deterministic sites of a model: which have a value for each row, and what others need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from numpyro_vae.model.provenance import RANDOM
from numpyro_vae.model.sites import ModelSites, Plate

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Derived:
    """How the deterministic sites of a model are computed, and what their dimensions are called.

    Attributes:
        by_row: of those with a value for each row of the local plate, or of another that holds the
            data's observations, the axis of the rows in the value.
        of_all: those that read local latents and have no such axis: of all rows at once.
        of_globals: those that read none of the local latents: once for each draw of the globals.
        dims: by site, names of the leading dimensions as results have them, the rows in front;
            those that no plate explains are named by ArviZ.
    """

    by_row: dict[str, int]
    of_all: tuple[str, ...]
    of_globals: tuple[str, ...]
    dims: dict[str, list[str]]

    def with_mixed(self, mixed: Collection[str]) -> Derived:
        """Return the same, with sites of all rows at once whose rows depend on one another."""
        by_row = {name: axis for name, axis in self.by_row.items() if name not in mixed}
        dims = {name: _moved_back(self.dims[name], self.by_row[name], name) for name in mixed}
        return Derived(by_row, (*self.of_all, *mixed), self.of_globals, self.dims | dims)

    @classmethod
    def of(
        cls,
        sites: ModelSites,
        shapes: Shapes,
        plate: str,
        groups: Sequence[str],
        *,
        is_probed: bool,
    ) -> Derived:
        """Divide the deterministic sites of a model.

        Args:
            sites: what the model holds, of as many rows as the values have.
            shapes: the shapes of the values.
            plate: the local plate's name.
            groups: the names of other plates that hold the data's observations.
            is_probed: whether nothing but rows has the number of the rows.
        """
        local = {site.name for site in (*sites.local(plate), *sites.enumerated(plate))} | {RANDOM}
        plates = (plate, *groups)
        axes = {name: _row_axis(sites, name, shapes[name], plates, is_probed) for name in shapes}
        rest = [name for name, axis in axes.items() if axis is None]
        # Where nothing is read of the local sites they are drawn, if they can be.
        drawn = not any(site.is_improper for site in sites.local(plate))
        of_all = tuple(x for x in rest if local & sites.reads.deterministic[x] or not drawn)
        return cls(
            {name: axis for name, axis in axes.items() if axis is not None},
            of_all,
            tuple(name for name in rest if name not in of_all),
            {name: _dims(sites, name, shapes[name], axes[name], plates) for name in shapes},
        )


def _row_plate(sites: ModelSites, name: str, plates: Sequence[str]) -> Plate | None:
    """Return the plate around a deterministic site whose rows are the data's."""
    around = (plate for plate in plates if plate in sites.deterministic[name])
    return next((sites.plates[plate] for plate in around), None)


def _row_axis(
    sites: ModelSites, name: str, shape: Shape, plates: Sequence[str], is_probed: bool
) -> int | None:
    """Return the axis of a value that counts the rows, or None if none or several do."""
    plate = _row_plate(sites, name, plates)
    if plate is None:
        return None
    axes = [axis for axis, size in enumerate(shape) if size == plate.length]
    if len(axes) == 1:
        return axes[0]
    expected = _axis(sites, name, plate, shape)
    return expected if expected in axes and not is_probed else None


def _axis(sites: ModelSites, name: str, plate: Plate, shape: Shape) -> int:
    """Return where a plate's axis is by NumPyro's rule: the event's dimensions come last."""
    batch_dim = max(-sites.plates[around].dim for around in sites.deterministic[name])
    return min(batch_dim, len(shape)) + plate.dim


def _dims(
    sites: ModelSites, name: str, shape: Shape, row_axis: int | None, plates: Sequence[str]
) -> list[str]:
    """Return the names of the leading dimensions that plates explain, the rows in front."""
    by_axis = {}
    for around in sites.deterministic[name]:
        plate = sites.plates[around]
        axis = _axis(sites, name, plate, shape)
        if 0 <= axis < len(shape) and shape[axis] == plate.length:
            by_axis[axis] = around
    order = list(range(len(shape)))
    rows = _row_plate(sites, name, plates)
    if row_axis is not None and rows is not None:
        by_axis[row_axis] = rows.name
        order.insert(0, order.pop(row_axis))
    named = [by_axis.get(axis) for axis in order]
    last = max((place for place, dim in enumerate(named) if dim), default=-1)
    return [dim or f"{name}_batch_{place}" for place, dim in enumerate(named[: last + 1])]


def _moved_back(dims: list[str], axis: int, name: str) -> list[str]:
    """Return the names of dimensions with that of the rows, which is in front, at its axis."""
    rows, *others = dims
    missing = [f"{name}_batch_{place}" for place in range(len(others), axis)]
    others += missing
    return [*others[:axis], rows, *others[axis:]]
