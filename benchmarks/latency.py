"""How long the first calls take, compiling included: `fit`, and what a posterior is asked for.

    python benchmarks/latency.py [--repeats 5]

The model is that of `vae.py`. A cold `fit` of one epoch is held against initialization and first
epoch of the same VAE written by hand in JAX; each method of `Posterior` is called first after a
fit. Every cold measurement has a process of its own, which has imported what it times, made its
arrays and started JAX's backend, and has no compilation cache on disk; what a call itself imports
is counted. The processes take turns, and the figures are medians over their rounds.

"again" is the second call in a process: of `fit` with the same SVI and other data of the same
shapes, or of a method of the same posterior. "compiled" counts what XLA compiles in that second
fit, or in the same method of a second `Posterior` of the guide with other rows. "model calls" says
how often the first call runs the model's own code.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from timing import seconds_of
from vae import SMALL, epoch_by_hand, init_by_hand, make_model, make_svi, random_pixels

from numpyro_vae import Posterior, fit

ROWS, TINY_ROWS, DRAWS = 128, 8, 100
# At most: `fit` in times of the same by hand, its calls of the model, those of another method.
FIT_GOAL, FIT_CALLS, METHOD_CALLS = 1.25, 2, 1
SPEEDUP_GOAL = 20  # at least, of a method's second call
METHODS: dict[str, tuple[float, Callable[..., object]]] = {  # goal in seconds, and the call
    "encode": (0.2, lambda posterior, key, x: posterior.encode(x)),
    "sample": (0.4, lambda posterior, key, x: posterior.sample(key, x, DRAWS)),
    "check": (3, lambda posterior, key, x: posterior.check(key, x, progress_bar=False)),
    "check all": (6, lambda posterior, key, x: posterior.check(key, x, "all", progress_bar=False)),
    "to_datatree": (2, lambda posterior, key, x: posterior.to_datatree(key, x, DRAWS)),
}


class Compilations:
    """Counts what XLA compiles in this process."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **_):
        self.count += event == "/jax/core/compile/backend_compile_duration"


def counting(model):
    """Return the model, with the number of its calls as the attribute ``calls``."""

    @functools.wraps(model)
    def counted(*args, **kwargs):
        counted.calls += 1
        return model(*args, **kwargs)

    counted.calls = 0
    return counted


def measure_by_hand():
    x, key = jnp.asarray(random_pixels(SMALL)), jax.block_until_ready(jax.random.key(0))
    epoch = epoch_by_hand(SMALL)

    def run():
        jax.block_until_ready(epoch(*init_by_hand(SMALL, key), key, x))

    return {"by hand": {"first": seconds_of(run)}}


def fitting():
    """Return the counted model, its SVI, and a function that fits it to data for an epoch."""
    key = jax.block_until_ready(jax.random.key(0))
    model = counting(make_model(SMALL))
    svi = make_svi(model, SMALL)
    options = {"batch_size": SMALL.batch_size, "num_epochs": 1, "progress_bar": False}
    return model, svi, lambda x: fit(svi, key, x, **options)


def measure_fit():
    (model, _, run), x, compilations = fitting(), random_pixels(SMALL), Compilations()
    first, model_calls = seconds_of(lambda: run(x)), model.calls
    before, other = compilations.count, 1 - x
    again = seconds_of(lambda: run(other))
    compiled = compilations.count - before
    return {
        "fit": {"first": first, "again": again, "compiled": compiled, "model_calls": model_calls}
    }


def measure_methods(names, num_rows):
    """Measure methods of a posterior, one after another."""
    (model, svi, run), x, key = fitting(), random_pixels(SMALL), jax.random.key(1)
    result, compilations = run(x), Compilations()
    posterior, another = (Posterior(svi.guide, result) for _ in range(2))
    rows, others = x[:num_rows], x[num_rows : 2 * num_rows]

    def measure(call):
        model.calls = 0
        first, model_calls = seconds_of(partial(call, posterior, key, rows)), model.calls
        again, before = seconds_of(partial(call, posterior, key, rows)), compilations.count
        call(another, key, others)
        compiled = compilations.count - before
        return {"first": first, "again": again, "compiled": compiled, "model_calls": model_calls}

    return {name: measure(METHODS[name][1]) for name in names}


def measure(names, num_rows):
    if names == ["by hand"]:
        return measure_by_hand()
    return measure_fit() if names == ["fit"] else measure_methods(names, num_rows)


def in_a_process(names, smoke):
    """Return what `measure` returns in a process of its own."""
    command = [sys.executable, __file__, *["--smoke"] * smoke, "--measure", *names]
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return json.loads(subprocess.check_output(command, env=env).splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="few rows and processes: does it run?")
    parser.add_argument("--measure", nargs="+", metavar="NAME", help="measure here, print JSON")
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure, TINY_ROWS if args.smoke else ROWS)))
    methods = [[name] for name in ("sample",) if args.smoke] or [[name] for name in METHODS]
    rounds: dict[str, list[dict[str, float]]] = {}
    for _ in range(1 if args.smoke else args.repeats):
        for names in (["by hand"], ["fit"], *methods):
            for name, found in in_a_process(names, args.smoke).items():
                rounds.setdefault(name, []).append(found)
    report({name: medians(founds) for name, founds in rounds.items()})


def medians(founds):
    return {key: statistics.median(found[key] for found in founds) for key in founds[0]}


def report(found):
    by_hand = found.pop("by hand")["first"]
    print(f"\nfirst calls at {SMALL}; seconds, goals in parentheses")
    print(f"{'':12}{'first':>17}{'again':>9}{'speedup':>14}{'compiled':>12}{'model calls':>13}")
    print(f"{'by hand':12}{by_hand:8.2f}")
    for name, row in found.items():
        is_fit = name == "fit"
        goal = FIT_GOAL * by_hand if is_fit else METHODS[name][0]
        speedup_goal = "" if is_fit else f"({SPEEDUP_GOAL})"
        calls_goal = FIT_CALLS if is_fit else METHOD_CALLS
        print(
            f"{name:12}{row['first']:8.2f} {f'({goal:.2f})':8}{row['again']:9.3f}"
            f"{row['first'] / row['again']:9.1f} {speedup_goal:4}{row['compiled']:8.0f} (0)"
            f"{row['model_calls']:9.0f} ({calls_goal})"
        )
    ratio = found["fit"]["first"] / by_hand
    print(f"A cold fit takes {ratio:.2f} times as long as the same by hand ({FIT_GOAL}).")


if __name__ == "__main__":
    main()
