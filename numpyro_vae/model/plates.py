"""Handlers that say which rows of the data a run sees, and what each of them weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpyro.primitives import CondIndepStackFrame, Messenger

from numpyro_vae.model.trace import Rows
from numpyro_vae.numpyro_internals import ask_handlers, was_observed

ROWS = "numpyro_vae.rows"  # the type of a message that asks for the rows of a plate
STEP = "numpyro_vae.step"  # that of one that asks how many optimizer steps have been taken


def given_rows(plate: str) -> Rows:
    """Return the rows that a handler gives a plate whatever it declares, with its size.

    The handlers are asked before the model is run, as it may not run with another number of rows.
    """
    found = ask_handlers(ROWS, plate=plate)
    return {} if found is None else {plate: found}


class all_rows(Messenger):  # noqa: N801 - handlers are lower case, as in numpyro.handlers
    """Let every plate hold all of its rows, in order, whatever it would subsample.

    Args:
        fn: a model or a guide.
        rows: by the name of a plate that is to hold others, its size and these rows.

    Example:
        >>> import numpyro
        >>> from numpyro import handlers
        >>> def model():
        ...     with numpyro.plate("data", 5, subsample_size=2) as rows:
        ...         return rows
        >>> handlers.seed(all_rows(model), 0)()
        Array([0, 1, 2, 3, 4], dtype=int32)
    """

    def __init__(self, fn: Callable[..., Any] | None = None, rows: Rows | None = None):
        self.rows = rows or {}
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        """Give a plate its rows: those given, or all if it subsamples."""
        if msg["type"] == ROWS and msg["plate"] in self.rows:
            msg["value"] = self.rows[msg["plate"]]
        if msg["type"] != "plate":
            return
        size, length = msg["args"]
        if msg["name"] in self.rows:
            size, msg["value"] = self.rows[msg["name"]]
            msg["args"] = (size, len(msg["value"]))
        elif length not in (None, size):
            msg["value"], msg["args"] = jnp.arange(size), (size, size)


class same_rows(Messenger):  # noqa: N801
    """Let a plate that subsamples hold the rows it drew first, however often it is entered.

    By itself it draws others each time, while the trace, and the model by it, knows the last alone.

    Args:
        fn: a guide.

    Example:
        >>> import numpyro
        >>> from numpyro import handlers
        >>> def guide():
        ...     with numpyro.plate("data", 9, subsample_size=3) as first:
        ...         pass
        ...     with numpyro.plate("data", 9, subsample_size=3) as second:
        ...         return first, second
        >>> first, second = handlers.seed(same_rows(guide), 0)()
        >>> bool((first == second).all())
        True
    """

    def __init__(self, fn: Callable[..., Any] | None = None):
        self._drawn: dict[str, Array] = {}
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        """Give a plate the rows that it has drawn before."""
        if msg["type"] == "plate" and msg["name"] in self._drawn:
            msg["value"] = self._drawn[msg["name"]]

    def postprocess_message(self, msg: Any) -> None:
        """Remember the rows of a plate that does not hold all of them."""
        if msg["type"] == "plate" and len(msg["value"]) < msg["args"][0]:
            self._drawn[msg["name"]] = msg["value"]


class observed_plates(Messenger):  # noqa: N801
    """Let observed sites that stand in no plate have one for each dimension of their batch.

    It has ArviZ's name of the dimension, ``y_dim_0`` and so on.

    Args:
        fn: a model.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro import handlers
        >>> def model(y):
        ...     numpyro.sample("y", dist.Normal(0.0, 1.0).expand([3]), obs=y)
        >>> trace = handlers.trace(observed_plates(model)).get_trace(jnp.zeros(3))
        >>> trace["y"]["cond_indep_stack"]
        [CondIndepStackFrame(name='y_dim_0', dim=-1, size=3)]
    """

    def __init__(self, fn: Callable[..., Any] | None = None):
        self.__wrapped__ = fn  # whose arguments have names
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        """Add the plates; the model's own have been added by then."""
        seen = msg["type"] == "sample" and was_observed(msg)
        if not seen or msg["cond_indep_stack"] or msg["fn"] is None:
            return
        shape = msg["fn"].batch_shape
        msg["cond_indep_stack"] = [
            CondIndepStackFrame(f"{msg['name']}_dim_{axis}", axis - len(shape), size)
            for axis, size in enumerate(shape)
        ]


def given_step() -> Any:
    """Return how many optimizer steps were taken before, if a handler knows, or None."""
    return ask_handlers(STEP)


class at_step(Messenger):  # noqa: N801
    """Tell an objective how many optimizer steps were taken before.

    Args:
        step: the number.

    Example:
        >>> with at_step(3):
        ...     given_step()
        3
    """

    def __init__(self, step: Any):
        self.step = step
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        """Answer."""
        if msg["type"] == STEP:
            msg["value"] = self.step


class minibatch(Messenger):  # noqa: N801
    """Tell a model, or a guide, that its plate is a minibatch of ``num_data`` rows.

    Every site in the plate is weighted so that the ELBO of the batch is an unbiased estimate of
    that of all ``num_data`` rows: by ``num_data / batch`` where the model declares a plate of
    just the batch's size, and by nothing more where it declares the full size itself.

    Args:
        fn: a model or a guide.
        plate: the name of the local plate.
        num_data: how many rows there are in all.
        indices: which of them the batch holds; None leaves the plate's own.
        weights: a factor for each row of the batch; zero makes a row count for nothing.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro import handlers
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        >>> batch_model = minibatch(model, plate="data", num_data=100)
        >>> float(handlers.trace(batch_model).get_trace(jnp.zeros(20))["x"]["scale"])
        5.0
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None = None,
        *,
        plate: str,
        num_data: int,
        indices: Int[Array, "batch"] | None = None,
        weights: Float[Array, "batch"] | None = None,
    ):
        self.plate, self.num_data = plate, num_data
        self.indices, self.weights = indices, weights
        self._factor: float | None = None
        super().__init__(fn)

    def process_message(self, msg: Any) -> None:
        """Fill in the plate's rows, and weight the sites inside it."""
        if msg["type"] == "plate" and msg["name"] == self.plate:
            declared, length = msg["args"]
            if self.indices is not None:
                msg["value"], length = self.indices, len(self.indices)
            msg["args"] = (self.num_data, length)
            self._factor = self.num_data / declared
        elif msg["type"] == ROWS and msg["plate"] == self.plate and self.indices is not None:
            msg["value"] = (self.num_data, self.indices)
        elif msg["type"] in ("sample", "param"):
            for frame in msg["cond_indep_stack"]:
                if frame.name == self.plate:
                    self._weight(msg, frame)

    def _weight(self, msg: Any, frame: Any) -> None:
        # A plate inside numpyro.contrib.control_flow.scan is not seen, only its sites are.
        factor = self.num_data / frame.size if self._factor is None else self._factor
        if self.weights is not None:
            factor = factor * self.weights.reshape(-1, *[1] * (-frame.dim - 1))
        elif factor == 1.0:
            return
        msg["scale"] = factor if msg["scale"] is None else msg["scale"] * factor
