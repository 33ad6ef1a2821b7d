"""Compares random models with NumPyro's own answers, and prints which features fail.

    python tests/referee/run.py --seeds 0:2000
    python tests/referee/run.py --seeds 7 --features second_plate,mask_rows
    python tests/referee/run.py --seeds 0:100 --without scale_all --comparisons weights
    python tests/referee/run.py --seeds 3:2000:8 --workers 1 --every 1

A failure is reduced to the features that it needs; those of the same comparison and features are
one line of the table. How far it is stands in a line after every 20 models, or ``--every`` so many.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import jax
from compare import COMPARISONS
from features import FEATURES
from generator import generate
from subject import Subject, settings

AT_ONCE = 40  # models in a process, before it is replaced: what is compiled is never freed

# What no posterior of the rows has, or no network; in messages that name it.
REFUSALS = ("unlike factors", "which subsamples", "draws all latents of a datum jointly")

# By comparison the features that were found to fail, which others that fail most often have too.
KNOWN: dict[str, list[tuple[str, ...]]] = {}


@dataclass(frozen=True)
class Failure:
    """A comparison that fails, or None if the guide could not be made, and why."""

    seed: int
    comparison: str
    features: tuple[str, ...]
    message: str

    @property
    def kind(self) -> tuple[str, tuple[str, ...]]:
        return self.comparison, self.features


def prepare() -> None:
    """Let a process compile for the CPU, without optimizing.

    Nothing is kept on disk: hardly a program is compiled twice, and writing them takes long. What
    is imported is never garbage, nor is most of what a model leaves before it is examined.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


def failures(seed: int, enabled: Collection[str], comparisons: Sequence[str]) -> dict[str, str]:
    """Return by comparison what is wrong with the model of a seed; ``guide`` if it has no guide."""
    case, found = generate(seed, enabled), {}
    with settings(case):
        try:
            subject = Subject(case)
        except Exception as error:
            return _told({"guide": _message(error)})
        for name in comparisons:
            try:
                COMPARISONS[name](subject)
            except Exception as error:
                found[name] = _message(error)
    return _told(found)


def _told(found: dict[str, str]) -> dict[str, str]:
    """Leave out what the library rightly refuses."""
    return {name: text for name, text in found.items() if not any(x in text for x in REFUSALS)}


def _message(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)[:300]
    if isinstance(error, AssertionError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {os.path.basename(place.filename)}:{place.lineno}: {text}"


def reduced(seed: int, enabled: Collection[str], comparison: str) -> tuple[str, ...]:
    """Return few features with which a comparison fails: those that cannot be left out."""
    chosen = [] if comparison == "guide" else [comparison]
    kept = list(generate(seed, enabled).features)
    for known in KNOWN.get(comparison, ()):
        rest = frozenset(kept) - set(known)
        if set(known) <= set(kept) and comparison not in failures(seed, rest, chosen):
            return known
    size = len(kept)
    while size:
        for start in reversed(range(0, len(kept), size)):
            rest = kept[:start] + kept[start + size :]
            if comparison in failures(seed, rest, chosen):
                kept = rest
        size //= 2
    found = generate(seed, kept).features
    KNOWN.setdefault(comparison, []).append(found)
    return found


def examine(seed: int, enabled: Collection[str], comparisons: Sequence[str]) -> list[Failure]:
    """Return the failures of a seed, reduced."""
    found = failures(seed, enabled, comparisons)
    all_of_it = [
        Failure(seed, name, reduced(seed, enabled, name), message)
        for name, message in found.items()
    ]
    gc.collect()
    return all_of_it


def table(found: Sequence[Failure]) -> str:
    """Return a line for each comparison and features that fail, the most frequent first."""
    kinds: dict[tuple, list[Failure]] = {}
    for failure in found:
        kinds.setdefault(failure.kind, []).append(failure)
    lines = []
    for (comparison, features), group in sorted(kinds.items(), key=lambda item: -len(item[1])):
        seeds = ", ".join(str(failure.seed) for failure in group[:5])
        lines.append(f"{len(group):4} {comparison:14} {' '.join(features) or '(none)'}")
        lines.append(f"     seeds {seeds}: {group[0].message}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:2000", help="first:stop, or with :step, or one seed")
    parser.add_argument("--features", help="those to draw from, by default all")
    parser.add_argument("--without", default="", help="features that are left out")
    parser.add_argument("--comparisons", default=",".join(COMPARISONS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", type=int, default=20, help="models between lines of progress")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Examine the seeds, and return whether any failed."""
    options = parse(argv)
    first, *others = map(int, options.seeds.split(":"))
    seeds = range(first, *(others or [first + 1]))
    enabled = frozenset(FEATURES if options.features is None else options.features.split(","))
    enabled -= set(options.without.split(","))
    comparisons, found, failed = options.comparisons.split(","), [], set()
    # Not that of concurrent.futures, which waits forever once a process has done its share.
    new_processes = multiprocessing.get_context("spawn")
    with new_processes.Pool(options.workers, prepare, maxtasksperchild=AT_ONCE) as pool:
        examined = pool.imap(partial(examine, enabled=enabled, comparisons=comparisons), seeds)
        for number, (seed, mine) in enumerate(zip(seeds, examined, strict=True), 1):
            found += mine
            failed |= {seed} if mine else set()
            for failure in mine:
                print(f"seed {seed}: {failure.comparison}: {' '.join(failure.features)}")
                print(f"    {failure.message}", flush=True)
            if number % options.every == 0:
                done = f"{number} of {len(seeds)} models, to seed {seed}"
                print(f"{done}, {len(failed)} fail", flush=True)
    print(table(found))
    print(f"{len(failed)} of {len(seeds)} models fail")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
