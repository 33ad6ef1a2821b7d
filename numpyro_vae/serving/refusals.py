"""What cannot be served, found out before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from numpyro_vae.checks.base import NotApplicableError, Subject
from numpyro_vae.checks.novelty import require_reference
from numpyro_vae.guides.reading import DATA
from numpyro_vae.inference import quantities
from numpyro_vae.inference.rows import Rows
from numpyro_vae.inference.runner import Runner, draws_of_globals
from numpyro_vae.model.provenance import PREFIX, sources
from numpyro_vae.numpyro_internals import HANDLERS
from numpyro_vae.serving.inputs import require_parted
from numpyro_vae.serving.programs import SEED, Programs

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
ARTIFACTS = ("encode", "sample", "importance", "novelty")
RTOL, ATOL = 1e-3, 0.05  # up to which a row's log weights are the same, alone and among others


def require_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    """Return platforms, if they are known, and any.

    Raises:
        ValueError: if they are not.
    """
    found = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    if not found or len(set(found)) < len(found) or set(found) - set(PLATFORMS):
        raise ValueError(
            f"platforms is {platforms!r}, expected one or more of {PLATFORMS}, each once. NVIDIA's "
            "GPUs are 'cuda', AMD's 'rocm'."
        )
    return found


def require_rows(runner: Runner, rows: Rows) -> None:
    """Raise ValueError unless each row has a posterior of its own, whichever rows there are."""
    guide = runner.guide
    if guide.not_amortized:
        raise ValueError(f"The posterior cannot be exported: {guide.not_amortized}.")
    if not guide.local_sites:
        raise ValueError(
            "The posterior cannot be exported: no row has latents of its own. Draw the global "
            "sites once with Posterior.sample, and save the draws."
        )
    require_parted(rows)
    if rows.num_rows < 2:
        raise ValueError(
            "The posterior cannot be exported with a single row: two are needed to see that rows "
            "do not depend on each other. Pass more rows."
        )
    runner.draw_globals(jax.random.key(SEED), rows, 1)  # its guide is set up
    if guide.global_names and DATA in _origins_of_globals(runner, rows):
        raise ValueError(
            f"The posterior cannot be exported: the guide of the global sites "
            f"{list(guide.global_names)} reads all rows, and a server has those of a request. Use "
            "global_guide=AutoNormal, or another that does not read the data."
        )


def _origins_of_globals(runner: Runner, rows: Rows) -> frozenset[str]:
    """Return what draws of the global sites are computed from."""
    draw = partial(draws_of_globals, runner.guide.sample_globals, runner.static_kwargs, 1)
    batch = rows.everything()

    def run(rng_key: Array, arrays: tuple[Array, ...]) -> Any:
        named = tuple(checkpoint_name(x, PREFIX + DATA) for x in arrays)
        return draw(runner.params, replace(batch, arrays=named), rng_key)

    with HANDLERS:
        jaxpr = jax.make_jaxpr(run)(jax.random.key(0), batch.arrays)
    return frozenset().union(*sources(jaxpr))


def choose_artifacts(
    runner: Runner, rows: Rows, wanted: Collection[str] | None
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the artifacts to make, and why others cannot be made.

    Raises:
        ValueError: if one is unknown, or was asked for and cannot be made.
    """
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    names = ARTIFACTS if wanted is None else tuple(wanted)
    unknown = sorted(set(names) - set(ARTIFACTS))
    if unknown or not names:
        raise ValueError(
            f"artifacts is {wanted!r}, expected one or more of {ARTIFACTS}. For all that the guide "
            "has, leave it out."
        )
    reasons = {name: _reason(name, runner, rows) for name in ARTIFACTS if name in names}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if wanted is not None and left_out:
        name, reason = next(iter(left_out.items()))
        raise ValueError(f"There is no {name} of this posterior: {reason}")
    return [name for name in reasons if not reasons[name]], left_out


def _reason(name: str, runner: Runner, rows: Rows) -> str:
    """Return why there is no such artifact; empty if there is one."""
    try:
        if name == "encode":
            runner.trace(quantities.encode, rows)
        if name in ("importance", "novelty"):
            runner.require_density()
        if name == "novelty":
            Subject(runner, rows, jax.random.key(SEED)).require_features()
            require_reference(rows)
    except (NotApplicableError, ValueError) as error:
        return str(error)
    return ""


def require_same_alone(
    programs: Programs, arrays: dict[str, Any], rows: Rows, *, weighs: bool
) -> None:
    """Raise ValueError if a row has another posterior alone than it has beside another row.

    Args:
        programs: which see rows alone.
        arrays: of the parameters.
        rows: of which two are compared.
        weighs: whether log weights are to be compared, and not draws.
    """
    runner, key, number = programs.runner, jax.random.key(SEED), programs.num_samples
    numbers = np.unique([0, rows.num_rows - 1])
    given = runner.draw_globals(key, rows, number)
    by_row = _key_data(key, len(numbers)), jnp.asarray(numbers), programs.inputs.take(numbers)
    run = partial(runner.per_draw, rows=rows.choose(numbers), rng_key=key, globals_=given)
    if weighs:
        among = run(quantities.weigh, num_samples=number)
        alone = {"log_weights": _run(_log_weights, programs, arrays, *by_row)}
    else:
        names = tuple(site.name for site in runner.guide.local_sites)
        among = run(quantities.sample, num_samples=number, names=names)
        found, axes = _run(Programs.sample, programs, arrays, *by_row), programs.axes()
        alone = {name: np.moveaxis(found[name], axes[name], 1) for name in names}
    for name, there in among.items():
        _require_close(name, np.asarray(alone[name]), there, numbers)


def _log_weights(programs: Programs, *given: Any) -> Array:
    return programs.importance(*given)["log_weights"]


def _run(program: Callable[..., Any], programs: Programs, *given: Any) -> Any:
    with HANDLERS:
        return jax.jit(partial(program, programs))(*given)


def _key_data(key: Array, number: int) -> Array:
    data = jax.random.key_data(key)
    return jnp.broadcast_to(data, (number, *data.shape))


def _require_close(name: str, alone: np.ndarray, among: np.ndarray, numbers: np.ndarray) -> None:
    close = np.isclose(alone, among, RTOL, ATOL, equal_nan=True)
    if close.all():
        return
    place = tuple(np.argwhere(~close)[0])
    raise ValueError(
        f"The posterior cannot be exported: {name} of row {numbers[place[1]]} is "
        f"{alone[place]:.6g} for the row alone, and {among[place]:.6g} in a batch with another, so "
        "rows depend on each other. Does the model, or its network, take statistics of a batch, as "
        "nnx.BatchNorm does without use_running_average=True?"
    )
