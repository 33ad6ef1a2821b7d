"""The programs that are served: each is a function of one row, over any number of them.

A model's Python code sees a single row, as ``len(x)`` must be a number: the rows are an axis of
`jax.vmap`, which may be symbolic. So no row can depend on another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from numpyro_vae.checks.novelty import NEIGHBOURS, PARTICLES, NoveltyReference, row_features
from numpyro_vae.inference import quantities
from numpyro_vae.inference.encoded import PAIRS, EncodedBatch, Trained
from numpyro_vae.inference.functions import draws_of_globals, encoded, globals_key
from numpyro_vae.inference.runner import NUM_GLOBALS, ROWS, Runner
from numpyro_vae.serving.inputs import Inputs
from numpyro_vae.serving.leaves import Leaves

Arrays = dict[str, Any]
SEED = 0  # of the key by which rows are compared with the reference
FIRST = 0  # the number of a row whose draws need not differ from those of others


@dataclass(frozen=True)
class Programs:
    """What a posterior is asked for, as functions of arrays by name.

    Attributes:
        runner: the trained guide.
        inputs: what is given of rows.
        leaves: how parameters are made of arrays.
        num_samples: draws of each row.
    """

    runner: Runner
    inputs: Inputs
    leaves: Leaves
    num_samples: int

    def encode(self, arrays: Arrays, inputs: Arrays) -> dict[str, dict[str, Array]]:
        """Return ``loc`` and ``scale`` by site, as `Posterior.encode`."""

        def one(row: Arrays) -> dict[str, dict[str, Array]]:
            found = quantities.encode(self._encoded(arrays, row, jnp.int32(FIRST)))
            return {
                name: {"loc": loc[0], "scale": scale[0]} for name, (loc, scale) in found.items()
            }

        return self._over_rows(one, 0)(inputs)

    def sample(
        self,
        arrays: Arrays,
        keys: UInt32[Array, "rows 2"],
        numbers: Int[Array, "rows"],
        inputs: Arrays,
    ) -> dict[str, Array]:
        """Return draws by site, as `Posterior.sample`; of global sites for each row's key."""

        def one(row: Arrays, key: Array, number: Array) -> dict[str, Array]:
            encoded, key = self._encoded(arrays, row, number), jax.random.wrap_key_data(key)
            return self._draws(encoded, key, self._globals(encoded, key, self.num_samples))

        return self._over_rows(one, self.axes())(inputs, keys, numbers)

    def importance(
        self,
        arrays: Arrays,
        keys: UInt32[Array, "rows 2"],
        numbers: Int[Array, "rows"],
        inputs: Arrays,
    ) -> dict[str, Any]:
        """Return ``draws`` as `sample` has them, and the ``log_weights`` of the draws."""

        def one(row: Arrays, key: Array, number: Array) -> dict[str, Any]:
            encoded, key = self._encoded(arrays, row, number), jax.random.wrap_key_data(key)
            globals_ = self._globals(encoded, key, self.num_samples)
            found = quantities.weigh(encoded, key, globals_, num_samples=self.num_samples)
            return {
                "draws": self._draws(encoded, key, globals_),
                "log_weights": found["log_weights"][:, 0],
            }

        axes = {"draws": self.axes(), "log_weights": 1}
        return self._over_rows(one, axes)(inputs, keys, numbers)

    def novelty(self, arrays: Arrays, inputs: Arrays) -> dict[str, Array]:
        """Return the p-value of each row, and its scores, as `Novelty` has them of it alone."""

        def one(row: Arrays) -> dict[str, Array]:
            encoded, key = self._encoded(arrays, row, jnp.int32(FIRST)), jax.random.key(SEED)
            sizes = {"num_samples": 1, "particles": PARTICLES}
            found = quantities.evidence(encoded, key, self._globals(encoded, key, 1), **sizes)
            return _novelty(arrays, row_features(encoded)[0], -found["log_evidence"][0, 0])

        return self._over_rows(one, 0)(inputs)

    def axes(self) -> dict[str, int]:
        """Return by latent site the axis of the rows in its draws, as those of `sample` are."""
        guide = self.runner.guide
        local = {
            name: guide.sites.sites[name].axis(guide.plate) for name in self.runner.local_names
        }
        return {name: 1 + axis for name, axis in local.items()} | dict.fromkeys(
            guide.global_names, 1
        )

    def _over_rows(self, fn: Callable[..., Any], out_axes: Any) -> Callable[..., Any]:
        def run(inputs: Arrays, *by_row: Array) -> Any:
            in_axes = (self.inputs.axes, *[0] * len(by_row))
            return jax.vmap(fn, in_axes=in_axes, out_axes=out_axes)(inputs, *by_row)

        return run

    def _encoded(self, arrays: Arrays, row: Arrays, number: Array) -> EncodedBatch:
        """Encode one row, so that a call with as many of them as a batch has fits in memory."""
        batch, params = self.inputs.batch(row, number), self.leaves.restore(arrays)
        guide, static = self.runner.guide, self.runner.static_kwargs
        steps, globals_ = self.runner.natural_steps, {}
        if steps:
            draw = partial(draws_of_globals, guide.sample_globals, static, NUM_GLOBALS)
            globals_ = draw(params, batch, globals_key(jax.random.key(0)))
        trained = Trained(params, globals_, steps)
        return replace(encoded(guide, static, trained, batch), pairs=PAIRS // ROWS)

    def _globals(self, encoded: EncodedBatch, key: Array, num_samples: int) -> Arrays:
        given = (self.runner.guide.sample_globals, self.runner.static_kwargs, num_samples)
        return draws_of_globals(*given, encoded.params, encoded.batch, globals_key(key))

    def _draws(self, encoded: EncodedBatch, key: Array, globals_: Arrays) -> dict[str, Array]:
        options = {"num_samples": self.num_samples, "names": self.runner.local_names}
        local = quantities.sample(encoded, key, globals_, **options)
        return {name: value[:, 0] for name, value in local.items()} | globals_


def reference_arrays(reference: NoveltyReference) -> Arrays:
    """Return what `Programs.novelty` compares rows with, by name."""
    near = reference.neighbours._asdict()
    near["kept"] = near["kept"].nonzero()[0].astype("int32")
    found = near | {"evidence": reference.evidence}
    return {f"novelty.{name}": jnp.asarray(value, _dtype(value)) for name, value in found.items()}


def _dtype(value: Any) -> Any:
    return jnp.result_type(float) if value.dtype.kind == "f" else value.dtype


def _novelty(arrays: Arrays, features: Array, evidence: Array) -> dict[str, Array]:
    """Return the novelty of a row with these features, and this negative log evidence."""
    distance = _distance(arrays, features)
    scores = {"calibrating": distance, "evidence": evidence}
    known = {name: arrays[f"novelty.{name}"] for name in scores}
    shares = [(jnp.sum(known[x] >= scores[x]) + 1) / (len(known[x]) + 1) for x in scores]
    p_value = jnp.minimum(1.0, 2 * jnp.minimum(*shares))
    return {"novelty": p_value, "novelty_features": distance, "novelty_evidence": evidence}


def _distance(arrays: Arrays, features: Array) -> Float[Array, ""]:
    """Return the mean distance from the nearest neighbours.

    They are found by squared distances, expanded for a matrix product; their own distances are
    computed of the differences, which lose no digits.
    """
    fitted = arrays["novelty.fitted"]
    row = (features[arrays["novelty.kept"]] - arrays["novelty.mean"]) / arrays["novelty.spread"]
    squares = (fitted**2).sum(1) - 2 * jnp.dot(fitted, row, precision="highest")
    _, nearest = jax.lax.top_k(-squares, NEIGHBOURS)
    return jnp.linalg.norm(fitted[nearest] - row, axis=1).mean()
