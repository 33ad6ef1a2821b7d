"""Times alternatives in turn, so that a machine's drift falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping


def seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return seconds by name: each run once to compile, then all of them in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run))
    return seconds


def report(title: str, seconds: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """Print medians and their ratio to the baseline's, and return the ratios."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: median / medians[baseline] for name, median in medians.items()}
    width = max(32, *map(len, seconds))
    print(f"\n{title}")
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"  {name:<{width}}{median:9.3f} s  [{low:.3f}, {high:.3f}]  {ratios[name]:7.3f}x")
    return ratios
