"""The phases of training by which `amortize` comes to a posterior."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from numpyro.infer import SVI
from numpyro.infer.elbo import ELBO

from numpyro_vae.choices import (
    choose_posterior,
    choose_refining,
    find_globals,
    judge_posterior,
    why_unjudged,
)
from numpyro_vae.data.arrays import count_rows, take_rows
from numpyro_vae.data.labels import ColumnNames
from numpyro_vae.guides.base import AmortizedGuide
from numpyro_vae.inference.psis import NoWeightsError
from numpyro_vae.inference.rows import Rows
from numpyro_vae.model.simulate import NotSimulableError
from numpyro_vae.posterior import Posterior
from numpyro_vae.training.fit import fit
from numpyro_vae.training.result import FitResult
from numpyro_vae.training.simulations import Simulations

HELD_OUT = 0.1, 1000  # the share of the rows that are held out, and the most of them
CHECKS, CHECKED = ("importance", "collapse"), 256  # and how many rows held out they look at
GLOBAL_STEPS = 4  # of the steps of the first phase, one in so many is taken for the globals alone
TABLE, EPOCHS = 40_000, 8  # simulated rows at once, and passes over them


@dataclass(frozen=True)
class Split:
    """The data, and which of them are held out.

    Args:
        data: all.
        train: those to train on.
        held_out: the others; None if there are none.
        batch_axes: the datum axis of each argument.
        cuts: whether rows can be taken from the data.
        size: how many rows a step has.
        batch_size: what `fit` is told of this.
    """

    data: Any
    train: Any
    held_out: Any
    batch_axes: Any
    cuts: bool
    size: int
    batch_size: int | None

    @classmethod
    def of(
        cls,
        rows: Rows,
        data: Any,
        validation: Any,
        batch_axes: Any,
        batch_size: int | None,
        key: Array,
    ) -> Split:
        """Hold a share of the rows out, if there is no validation and the model lets rows go."""
        cuts = not (rows.data.is_whole or rows.subsamples)
        train, held_out = data, validation
        if validation is None and cuts:
            train, held_out = _hold_out(data, batch_axes, rows.num_rows, key)
        left = count_rows(train, batch_axes) if cuts else rows.num_rows
        size = left if rows.data.is_whole else min(batch_size or 128, left)
        return cls(data, train, held_out, batch_axes, cuts, size, size if cuts else batch_size)

    @property
    def some(self) -> Any:
        """Rows to look at: of those held out, if there are any."""
        rows = self.train if self.held_out is None else self.held_out
        return take_rows(rows, self.batch_axes, slice(CHECKED)) if self.cuts else rows


def _hold_out(data: Any, batch_axes: Any, number: int, rng_key: Array) -> tuple[Any, Any]:
    """Return rows to train on, and others to validate with."""
    share, most = HELD_OUT
    order = np.asarray(jax.random.permutation(rng_key, number))
    kept = number - min(int(share * number), most)
    if kept == number:
        return data, None
    return tuple(take_rows(data, batch_axes, rows) for rows in (order[:kept], order[kept:]))


@dataclass(frozen=True)
class Phases:
    """Trains a guide, phase by phase, and says how each went.

    Args:
        model: the model.
        guide: its guide.
        rows: the data, as they were read.
        split: the data, and which of them are held out.
        make_optimizer: from a number of steps.
        static_kwargs: keyword arguments of the model that are the same in every call.
        columns: the names of the columns of the data.
        progress_bar: whether to show progress, and to say anything.
    """

    model: Callable[..., Any]
    guide: AmortizedGuide
    rows: Rows
    split: Split
    make_optimizer: Callable[[int], Any]
    static_kwargs: dict[str, Any]
    columns: ColumnNames
    progress_bar: bool

    def say(self, text: Any) -> None:
        """Print it, unless the user wants silence."""
        if self.progress_bar:
            print(text)

    def on_data(self, rng_key: Array, loss: ELBO, num_steps: int) -> FitResult:
        """Train model and guide until rows held out improve no more."""
        split = self.split
        steps, more = (num_steps, self.rows.num_rows), {"validation": split.held_out}
        return self._train("The ELBO of the data", rng_key, loss, split.train, *steps, **more)

    def on_simulations(
        self,
        rng_keys: Iterable[Array],
        first: FitResult,
        num_steps: int,
        to_data: Callable[[dict], Any] | None,
    ) -> list[FitResult]:
        """Train the guide alone on what the model makes; return what each phase comes to."""
        results, size = [first], self.split.size
        try:
            chosen = choose_refining(self.guide, num_steps, to_data, self.rows)
            for rng_key, (name, objective, number) in zip(rng_keys, chosen, strict=False):
                table = max(min(TABLE, number * size // EPOCHS), size)
                simulations = Simulations(
                    table, like=self.split.train, redraw_every=EPOCHS, to_data=to_data
                )
                more = {"init_params": results[-1].params, "freeze": ("model", "globals")}
                args = rng_key, objective, simulations, number, table
                found = self._train_unless_it_fails(name, *args, **more)
                if found is None:
                    break
                results.append(found)
        except NotSimulableError as reason:
            self.say(f"No simulations. {reason}")
        return results[1:]

    def choose(self, rng_key: Array, results: list[FitResult], steps: list[int]) -> Posterior:
        """Return the posterior that rows held out like best, of each phase and number of steps."""
        unjudged = why_unjudged(self.guide)
        results = results if self.split.cuts and not unjudged else results[-1:]

        def judge(posterior: Posterior) -> tuple[np.ndarray, float]:
            return judge_posterior(rng_key, self.split.some, posterior)

        posterior, undone = choose_posterior(
            self.guide, results, steps, None if unjudged else judge
        )
        if undone:
            self.say(
                f"Phases undone, as rows held out had better verdicts before: the last {undone}."
            )
        return posterior

    def globals_on_all_rows(
        self, rng_key: Array, loss: ELBO, posterior: Posterior, num_steps: int
    ) -> Posterior:
        """Train the guide of the globals alone, whose posterior is of all rows."""
        data, known = self.split.data, map(find_globals(self.guide, self.rows), posterior.params)
        if self.split.train is data or not any(known):
            return posterior
        more = {"init_params": posterior.params, "freeze": ("model", self.guide.prefix)}
        args = rng_key, loss, data, max(num_steps // GLOBAL_STEPS, 1), self.rows.num_rows
        found = self._train_unless_it_fails("The globals, on all rows", *args, **more)
        if found is None:
            return posterior
        return Posterior(self.guide, found, natural_steps=posterior.natural_steps)

    def tell(self, rng_key: Array, posterior: Posterior) -> None:
        """Say what was chosen, and what the quick check finds of it on rows held out."""
        if number := posterior.natural_steps:
            self.say(f"Rows take up to {number} natural-gradient steps after the network.")
        if unjudged := why_unjudged(self.guide):
            self.say(f"No checks. {unjudged}.")
        elif self.progress_bar:
            try:
                self.say(posterior.check(rng_key, self.split.some, CHECKS, progress_bar=False))
            except NoWeightsError as reason:
                self.say(f"No verdicts. {reason}")

    def _train(
        self,
        name: str,
        rng_key: Array,
        loss: ELBO,
        data: Any,
        num_steps: int,
        num_rows: int,
        validation: Any = None,
        **more: Any,
    ) -> FitResult:
        """Train for so many steps on so many rows; say how long it took and where it ended."""
        start = time.perf_counter()
        num_epochs = max(num_steps * self.split.size // num_rows, 1)
        result = fit(
            SVI(self.model, self.guide, self.make_optimizer(num_steps), loss, **self.static_kwargs),
            rng_key,
            data,
            num_epochs=num_epochs,
            validation=validation,
            patience=None if validation is None else max(10, num_epochs // 5),
            batch_axes=self.split.batch_axes,
            batch_size=self.split.batch_size,
            progress_bar=self.progress_bar,
            **more,
        )
        losses = result.history.get("validation_loss")
        end = "" if losses is None else f", held-out loss {np.nanmin(losses):.3f} nats"
        epochs, seconds = len(result.history["loss"]), time.perf_counter() - start
        self.say(f"{name}: {epochs} epochs, {seconds:.0f} s{end}.")
        return result._replace(columns=self.columns)

    def _train_unless_it_fails(self, name: str, *args: Any, **more: Any) -> FitResult | None:
        """Return what a phase comes to; None, with a warning, if it can take no step."""
        try:
            return self._train(name, *args, **more)
        except FloatingPointError as error:
            warnings.warn(
                f"This phase of amortize failed, and what came before it is kept. {name}: {error}",
                stacklevel=4,
            )
            return None
