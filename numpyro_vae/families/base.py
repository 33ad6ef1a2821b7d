"""What a family is, on one page.

A **family** turns features into a NumPyro distribution over the latents of **one** datum: the
vector of ``size`` unconstrained values of all its local sites, side by side in the model's order.
Write two methods, for one datum; batching, splitting by site, supports and log-determinants are
done for you:

* `AbstractFamily.head` returns an ``nnx.Module`` from features ``(batch, k)`` to ``raw``, a pytree
  of arrays with the batch in front,
* `AbstractFamily.distribution` turns the ``raw`` of one datum (no batch axis, or any number of
  them in front) into a distribution with ``event_shape == (size,)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpyro.distributions as dist
from flax import nnx

__all__ = ["AbstractFamily"]


class AbstractFamily(ABC):
    """The contract of a guide family; see the module's docstring."""

    @abstractmethod
    def head(self, num_features: int, size: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """Return a module from features ``(batch, num_features)`` to the family's raw outputs.

        Args:
            num_features: the length of a feature vector.
            size: the number of unconstrained latent values of a datum.
            rngs: where the initial weights come from.
        """

    @abstractmethod
    def distribution(self, raw: Any) -> dist.Distribution:
        """Return the distribution over a datum's latents.

        Args:
            raw: what the head returned, ``(*batch, ...)``.

        Returns:
            A distribution with ``batch_shape == batch`` and ``event_shape == (size,)``.
        """
