"""What is known of the data of a training, and other data in their form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.data.labels import ColumnNames, in_order
from numpyro_vae.guides.abstract import AbstractGuide
from numpyro_vae.model.data_sets import DataSets
from numpyro_vae.model.signatures import in_form
from numpyro_vae.numpyro_internals import HANDLERS


@dataclass(frozen=True)
class Seen:
    """What is known of the data that a guide was trained on.

    Attributes:
        num_data: how many rows they had, if that is known.
        sizes: of data sets, by plate the least and the largest number of rows.
        columns: the names of columns, see `column_names`.
    """

    num_data: int | None = None
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    columns: ColumnNames = field(default_factory=dict)

    @classmethod
    def of(cls, result: Any) -> Seen:
        """Return what a `FitResult` says of them; of a result of ``svi.run`` nothing."""
        names = [name for name in cls.__dataclass_fields__ if hasattr(result, name)]
        return cls(**{name: getattr(result, name) for name in names})

    def as_trained(self, guide: AbstractGuide, batch_axes: Any, data: Any) -> Any:
        """Return data as the guide was given those of its training.

        By position or by name, and with their columns in the same order, where both have names.
        """
        known = guide.argument_shapes
        if known or isinstance(batch_axes, tuple | dict):
            by_position = not all(name.startswith("'") for name in known)
            if isinstance(batch_axes, tuple | dict):
                by_position = isinstance(batch_axes, tuple)
            data = in_form(data, guide.model, by_position=by_position)
        return in_order(data, batch_axes, self.columns)

    def require_sizes(self, model: Any, data: Any, static_kwargs: dict[str, Any]) -> None:
        """Raise if data sets have sizes that a guide of them was not trained on."""
        if self.sizes and isinstance(data, ArrayData) and isinstance(model, DataSets):
            args, kwargs = data.whole()
            with HANDLERS:
                model.require_seen(dict(self.sizes), args, {**kwargs, **static_kwargs})
