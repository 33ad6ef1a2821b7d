"""A source of data that draws them from the model, with the covariates of given data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.infer.svi import SVIState

from numpyro_vae.data.arguments import require_count
from numpyro_vae.data.arrays import ArrayData
from numpyro_vae.data.batch import Batch
from numpyro_vae.model.plan import why_tempered
from numpyro_vae.model.simulate import (
    NotSimulableError,
    explain_unsettled,
    places,
    why_censored,
    why_not_simulable,
)
from numpyro_vae.numpyro_internals import HANDLERS
from numpyro_vae.objectives import ForwardKL
from numpyro_vae.training.guarded import guarded_steps
from numpyro_vae.training.simulating import Simulation
from numpyro_vae.training.sources import Source
from numpyro_vae.training.step import Trainer, batch_of

__all__ = ["Simulations"]


@dataclass(frozen=True)
class Simulations:
    """Data that `fit` draws from the model itself, with its parameters as they are.

    A guide trained on the ELBO of simulated rows reads more data than there are, and cannot learn
    the noise of a training set by heart (Zhang, Hayes and Barber, *Generalization Gap in Amortized
    Inference*, NeurIPS 2022); trained by `ForwardKL`, it learns the posterior from the latents that
    the rows were drawn with. Pass ``freeze=("model", "globals")`` to `fit`: data drawn from the
    model say nothing of its own parameters.

    Latents in the local plate are drawn from their prior, global ones from the guide.

    Args:
        num_data: how many rows an epoch has, of all processes together.
        like: data as `fit` takes them, whose covariates the simulated rows have; what the model
            observes of them is replaced.
        redraw_every: after how many epochs the rows are drawn anew; None to have the same in all,
            a budget of simulations.
        real_fraction: the share of each batch that stays the data it is, from 0 to below 1; of
            several processes, that of the part of each.
        to_data: from simulated values by observed site to data as `fit` takes them, for a model
            whose observed values are not one of its arguments as it stands.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import optax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro_vae import AutoAmortizedNormal, fit
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        ...         numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
        >>> svi = SVI(model, AutoAmortizedNormal(model), optax.adam(1e-3), Trace_ELBO())
        >>> simulations = Simulations(1000, like=np.linspace(-2.0, 2.0, 50))
        >>> result = fit(svi, jax.random.key(0), simulations, num_epochs=2, progress_bar=False)
        >>> result.losses.shape  # in batches of 50
        (40,)
    """

    num_data: int
    like: Any
    redraw_every: int | None = 1
    real_fraction: float = 0.0
    to_data: Any = None

    def __post_init__(self) -> None:
        require_count("num_data", self.num_data)
        if self.redraw_every is not None:
            require_count("redraw_every", self.redraw_every)
        if not 0 <= self.real_fraction < 1:
            raise ValueError(
                f"real_fraction is {self.real_fraction}, expected a share from 0 to below 1. "
                "Without simulations, pass the data themselves."
            )


class SimulationSource:
    """Batches whose rows are drawn from the model.

    Args:
        trainer: takes the steps.
        like: a source of the data whose covariates they have.
        simulations: how many there are, and what else is known of them.

    Raises:
        NotSimulableError: if the model cannot be simulated from, or there is no place for what it
            observes.
        ValueError: if an objective has no use for real rows.
    """

    def __init__(self, trainer: Trainer, like: Source, simulations: Simulations):
        self.trainer, self.like, self.simulations = trainer, like, simulations
        self.data, self.sites = like.data, like.sites
        batch = like.first()
        self.size, self.devices = len(batch.indices), batch.layout.devices
        self.num_steps = -(-simulations.num_data // self.size)
        self.plan = self._plan(batch)
        self._table: Batch | None = None
        self._take = jax.jit(batch_of)

    def require_frozen(self) -> None:
        """Raise if an ELBO would be maximized of data that were drawn with what it trains.

        Raises:
            ValueError: naming the parameters.
        """
        trainer = self.trainer
        if isinstance(trainer.svi.loss, ForwardKL):  # which trains none of them
            return
        trained = (trainer.parts["model"] | trainer.parts["globals"]) - trainer.frozen
        if trained:
            raise ValueError(
                f"Data simulated from the model say nothing of its parameters or global latents, "
                f"and {sorted(trained)} would be trained on them. Pass "
                'freeze=("model", "globals"), and their values with init_params=result.params.'
            )

    def _plan(self, batch: Batch) -> Simulation:
        """Return how the rows of a batch are simulated."""
        guide, wanted = self.trainer.svi.guide, self.simulations
        if reason := why_not_simulable(self.sites, getattr(guide, "global_names", ())):
            raise NotSimulableError(f"{reason}, or train on the data themselves.")
        if wanted.to_data is None and (reason := why_censored(self.sites)):
            raise NotSimulableError(
                f"{reason}. Pass Simulations(to_data=...), a function that censors them too."
            )
        if wanted.real_fraction and isinstance(self.trainer.svi.loss, ForwardKL):
            raise ValueError(
                f"real_fraction is {wanted.real_fraction}, but ForwardKL trains on the latents "
                "that rows were simulated with, which data do not have. Leave it out."
            )
        plates = (batch.plate, *getattr(guide, "segments", ()))
        self._require_untempered(batch, plates)
        places = () if wanted.to_data is not None else tuple(self._places(batch, plates))
        num_parts = self.devices.num_hosts
        num_real = round(wanted.real_fraction * (self.size // num_parts))
        return Simulation(places, num_real, wanted.to_data, plates, num_parts)

    def _require_untempered(self, batch: Batch, plates: tuple[str, ...]) -> None:
        """Raise if the latents that data are simulated with are of another posterior."""
        trainer, (args, kwargs) = self.trainer, batch.arguments()
        if not isinstance(trainer.svi.loss, ForwardKL):
            return
        kwargs = {**kwargs, **trainer.svi.static_kwargs}
        with HANDLERS:
            reason = why_tempered(trainer.reader, self.sites, plates, args, kwargs, batch.rows)
        if reason:
            raise NotSimulableError(
                f"{reason}. Train on these simulations with an ELBO, such as "
                'ImportanceWeightedELBO(1, "stl"), and freeze=("model", "globals").'
            )

    def _places(self, batch: Batch, plates: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        """Yield for each observed site the numbers of the arrays among the arguments that hold it.

        All rows of all hosts are compared, so that a site that observes something else is not taken
        for one of the arguments.
        """
        devices = self.devices
        held = devices.together(lambda: dict(self._holds(batch, plates)))
        of_all = devices.gather(np.array([*held.values()])).all(0)
        for name, found in zip(held, of_all, strict=True):
            if not found.any():
                raise NotSimulableError(
                    f"The observed values of site {name!r} are not one of the model's arguments as "
                    "it stands, so simulated ones cannot be put in its place. Pass "
                    "Simulations(to_data=...), a function from simulated values by site to data as "
                    "fit takes them."
                )
            yield name, tuple(np.flatnonzero(found).tolist())

    def _holds(self, batch: Batch, plates: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield for each site of rows whether each array has its values, in this host's rows."""
        trainer, data = self.trainer, self.data
        args, kwargs = data.whole()
        kwargs = {**kwargs, **trainer.svi.static_kwargs}
        number = 1 if data.is_whole else data.num_data
        with HANDLERS:
            reading = trainer.reader.read_all(args, kwargs, batch.every(number))
        for name, value in reading.values.items():
            site = reading.sites.sites[name]
            plate = next((reading.sites.plates[p] for p in plates if p in site.plates), None)
            if plate is None:
                continue  # what is observed of no row is not drawn
            rows = jnp.moveaxis(value, site.axis(plate), 0)
            found = places(data.arrays, data.layout.axes, np.asarray(rows))
            numbers = [number for number, _ in found]
            yield name, np.isin(np.arange(len(data.arrays)), numbers)

    def shapes(self, state: SVIState) -> Batch:
        """Return a simulated batch, shapes for arrays."""
        order = jax.ShapeDtypeStruct((self.num_steps, self.size), jnp.int32)
        table, _ = jax.eval_shape(self._draw, state, jax.random.key(0), order)
        return jax.eval_shape(partial(self._take, number=0), table)

    def first(self) -> Batch:
        """Return a batch of the data to initialize with."""
        return self.like.first()

    def batches(self, data: ArrayData) -> list[tuple[Batch, int]]:
        """Return all rows of data like these in batches, and how many of them are in each."""
        return self.like.batches(data)

    def run(self, state: SVIState, rng_key: Array, epoch: int) -> tuple[SVIState, np.ndarray]:
        """Run an epoch on the table of simulated batches, in an order of its own.

        As with arrays in memory it is a scan, and where a step is not finite each step is guarded.
        """
        every, (table_key, order_key) = self.simulations.redraw_every, jax.random.split(rng_key)
        drawn = 0 if every is None else epoch - epoch % every
        if self._table is None or drawn == epoch:  # also where training goes on from a checkpoint
            rows_key, draw_key = jax.random.split(jax.random.fold_in(table_key, drawn))
            self._table, settled = self._draw(state, draw_key, self._order(rows_key))
            if not settled.all():
                raise NotSimulableError(f"{explain_unsettled()}, or train on the data themselves.")
        table, trainer = self._table, self.trainer
        order = jax.random.permutation(jax.random.fold_in(order_key, epoch), self.num_steps)
        if not trainer.is_slow_in_scan(state, self._take(table, 0)):
            new_state, losses, ok = trainer.scan_batches(state, table, order)
            if ok:
                return new_state, np.asarray(losses)
        batches = (self._take(table, number) for number in order)
        return guarded_steps(trainer, state, batches, epoch)

    def _draw(self, state: SVIState, rng_key: Array, order: Array) -> tuple[Batch, Array]:
        """Return the simulated batches of an epoch, and of each whether it has settled.

        They are drawn from the model as it is in a state.
        """
        keys = jax.random.split(rng_key, self.num_steps)
        return self.trainer.draw(self.plan, state, keys, self.first(), order)

    def _order(self, rng_key: Array) -> Array:
        """Return the rows of each batch whose covariates are taken, as many of each host."""
        if self.data.is_whole:
            return jnp.tile(self.first().indices, (self.num_steps, 1))
        devices, number = self.devices, self.data.num_data
        part = self.size // devices.num_hosts
        keys = jax.random.split(devices.own_key(rng_key), -(-self.num_steps * part // number))
        order = jnp.concatenate([jax.random.permutation(key, number) for key in keys])
        order = order[: self.num_steps * part].reshape(self.num_steps, part)
        return devices.divide(devices.numbers(order, number), axis=1)
