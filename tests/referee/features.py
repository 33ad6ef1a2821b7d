"""Features that a model may have, and the decisions by which a seed chooses among them.

Each choice has a random stream of its own, so that a feature can be switched off and all else
stays as it was.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from kinds import LATENTS, OBSERVED

# By feature, how often a model has it that may.
STRUCTURE = {
    "second_plate": 0.35,
    "third_plate": 0.3,
    "dim_left": 0.2,
    "implicit_dim": 0.2,
    "many_locals": 0.6,
    "nested_latent": 0.5,
    "event_vector": 0.25,
    "event_matrix": 0.12,
    "extra_batch": 0.08,
    "latent_reads_latent": 0.4,
    "globals": 0.5,
    "global_vector": 0.3,
    "global_positive": 0.3,
    "global_in_plate": 0.4,
    "globals_last": 0.15,
    "latent_reads_global": 0.6,
    "many_observed": 0.4,
    "nested_observed": 0.5,
    "global_observed": 0.15,
    "grouped": 0.2,
    "latent_reads_group": 0.4,
    "bounded_rows": 0.08,
    "scoped": 0.1,
}
MODIFIERS = {
    "mask_rows": 0.15,
    "mask_cells": 0.15,
    "mask_entries": 0.5,
    "obs_mask": 0.2,
    "mask_latent": 0.12,
    "mask_latent_entries": 0.1,
    "mask_false": 0.1,
    "mask_method": 0.4,
    "auxiliary": 0.1,
    "scale_latent": 0.15,
    "scale_latent_rows": 0.1,
    "scale_mixed": 0.1,
    "scale_observed": 0.15,
    "scale_observed_rows": 0.1,
    "scale_global": 0.2,
    "scale_all": 0.1,
    "factor": 0.2,
    "factor_scaled": 0.3,
    "factor_global": 0.15,
    "missing": 0.3,
    "enumerated": 0.08,
    "reparam": 0.15,
    "reparam_transform": 0.3,
    "conditioned": 0.12,
}
DETERMINISTIC = {
    "det_local": 0.3,
    "det_value": 0.2,
    "det_event": 0.2,
    "det_scalar": 0.1,
    "det_observed": 0.2,
    "det_global": 0.3,
    "det_other_plate": 0.3,
    "det_outside": 0.15,
    "det_total": 0.12,
    "det_nested": 0.3,
}
ARGUMENTS = {
    "subsample": 0.25,
    "subsample_method": 0.5,
    "subsample_second": 0.5,
    "declared_size": 0.12,
    "param": 0.3,
    "param_positive": 0.3,
    "param_plate": 0.3,
    "nnx": 0.15,
    "linen": 0.15,
    "static_kwarg": 0.2,
    "none_argument": 0.15,
    "covariate": 0.2,
    "constant_argument": 0.2,
    "noise_argument": 0.5,
    "keywords": 0.3,
    "nested_argument": 0.2,
    "inputs": 0.15,
    "condition_on": 0.3,
    "dependencies": 0.2,
    "multivariate": 0.08,
    "low_rank": 0.06,
    "flow": 0.08,
    "delta": 0.06,
    "softplus": 0.1,
    "log_variance": 0.1,
    "global_delta": 0.15,
    "global_joint": 0.15,
    "x64": 0.6,
}
KINDS = tuple(name for name in (*LATENTS, *OBSERVED) if name not in ("real", "normal"))
RATES = {**STRUCTURE, **MODIFIERS, **DETERMINISTIC, **ARGUMENTS}
FEATURES = (*RATES, *KINDS)


@dataclass
class Choices:
    """Random decisions of a seed, each by a name; those of features that are off come out as no.

    ``used`` gathers the features that the model has.
    """

    seed: int
    enabled: Collection[str]
    used: set[str] = field(default_factory=set)

    def rng(self, *name: Any) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(repr(name).encode())])

    def key(self, *name: Any) -> jax.Array:
        return jax.random.key(int(self.rng(*name).integers(2**31)))

    def has(self, feature: str, *where: Any) -> bool:
        found = feature in self.enabled and self.rng(feature, *where).random() < RATES[feature]
        self.used |= {feature} if found else set()
        return found

    def first(self, features: Iterable[str], *where: Any) -> str | None:
        """Return the first of features that it has, in a random order."""
        order = self.rng("first", *where).permutation(list(features))
        return next((str(name) for name in order if self.has(str(name), *where)), None)

    def kind(self, kinds: Sequence[str], base: str, *where: Any) -> str:
        """Return a kind of distribution, half of the time the base."""
        rng = self.rng("kind", *where)
        found = str(rng.choice(list(kinds)))
        if rng.random() < 0.35 or found not in self.enabled:
            return base
        self.used.add(found)
        return found

    def some(self, names: Sequence[str], *where: Any) -> tuple[str, ...]:
        """Return a subset of names that is not empty, if there are any."""
        rng = self.rng("some", *where)
        kept = [name for name in names if rng.random() < 0.5]
        return tuple(kept or names[:1])
