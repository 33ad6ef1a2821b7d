"""What an encoder reads beside what is observed: covariates, among the model's arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclass(frozen=True)
class WithCovariates:
    """As ``inputs=`` of a guide: what is observed of each datum, and arrays of the arguments.

    A posterior depends on all that the likelihood does, such as a regressor or an exposure.

    Args:
        axes: where among ``(args, kwargs)`` each array is, as `jax.tree_util.keystr` writes it,
            and its datum axis.

    Example:
        >>> WithCovariates((("[0][1]", 0),))(jnp.zeros((2, 3)), jnp.ones(2))
        {'[0][1]': Array([1., 1.], dtype=float32)}
    """

    axes: tuple[tuple[str, int], ...]

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Return the covariates, data along the leading axis.

        Raises:
            ValueError: naming one that is not given.
        """
        given = dict(arrays_by_path(args, kwargs))
        missing = [path for path, _ in self.axes if path not in given]
        if missing:
            raise ValueError(
                f"The encoder reads covariates at {missing} of the model's (args, kwargs), found "
                f"arrays at {sorted(given)}. Pass all arguments, in the form of the training data."
            )
        return {path: jnp.moveaxis(jnp.asarray(given[path]), axis, 0) for path, axis in self.axes}


def arrays_by_path(args: tuple, kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the leaves of a model's arguments, each with where it is."""
    leaves = jax.tree.leaves_with_path((args, kwargs))
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
