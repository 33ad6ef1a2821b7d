"""How fast an exported posterior is served over HTTP: latency, and rows per second.

    python benchmarks/serving.py [--seconds 5]

It trains and exports the guide of `examples/serve_digits.py`, starts its server, and asks it over
the loopback interface from 8 clients at once, each with a connection that it keeps, for requests of
1 and of 256 images of 64 pixels, as JSON. A draw is of 8 latents, and a request has 100 of each row
from ``/sample``. "direct" is how many rows per second the same programs make in one thread of this
process, called with arrays, padding and novelty included; so the last column is what HTTP and JSON
leave of it, on as many cores as server and clients share. Of the requests of 1 image one in ten is
wrong, and counts for nothing but that it is answered so.
"""

import argparse
import http.client
import itertools
import json
import os
import pathlib
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "serving")]

from serve_digits import NUM_SAMPLES, digits, serve, train  # noqa: E402
from served import Served, key_of  # noqa: E402

CLIENTS, ROWS, PROGRAMS = 8, (1, 256), ("encode", "sample")
WRONG = [
    (422, json.dumps({"inputs": {"images": [[0] * 63]}})),
    (422, json.dumps({"inputs": {"images": [[float("nan")] * 64]}})),
    (422, json.dumps({"inputs": {"images": [[0, 16] * 32]}})),  # novel
    (400, "no JSON"),
]


def client(address, name, body, wrong, until):
    """Ask until a time, and return how long each answer took, and its status."""
    connection, found = http.client.HTTPConnection(*address, timeout=60), []
    for number in itertools.count(1):
        is_wrong = wrong and number % 10 == 0
        expected, sent = wrong[number // 10 % len(wrong)] if is_wrong else (200, body)
        start = time.perf_counter()
        connection.request("POST", f"/{name}", sent)
        response = connection.getresponse()
        response.read()
        end = time.perf_counter()
        if response.status != expected:
            raise RuntimeError(f"status {response.status}, expected {expected}")
        found.append((end - start, expected))
        if end > until:
            return found


def measure(address, name, images, seconds):
    """Return how long right requests took, their number in a second, and that of wrong ones."""
    body = json.dumps({"inputs": {"images": images.tolist()}, "allow_novel": True})
    wrong, start = WRONG if len(images) == 1 else [], time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        ask = partial(client, address, name, body, wrong, start + seconds)
        found = list(itertools.chain(*pool.map(lambda _: ask(), range(CLIENTS))))
    took = time.perf_counter() - start
    times = np.array([seconds for seconds, status in found if status == 200])
    return times, len(times) / took, len(found) - len(times)


def direct(served, name, images, seconds):
    """Return how many rows per second the programs make without HTTP."""
    keys, numbers = np.tile(key_of(0), (len(images), 1)), np.arange(len(images), dtype=np.int32)
    calls, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        for program in (name, "novelty"):
            served.run(program, {"images": images}, keys, numbers)
        calls += 1
    return calls * len(images) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--smoke", action="store_true", help="a moment of each: does it run?")
    args = parser.parse_args()
    seconds = 0.3 if args.smoke else args.seconds
    images, held_out = digits()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "served"
        posterior = train(images, 1 if args.smoke else 50)
        posterior.export(path, held_out, num_samples=NUM_SAMPLES, platforms=["cpu"])
        served = Served(path)
        served.warm_up()
        print(f"\n{CLIENTS} clients on {os.cpu_count()} cores, {NUM_SAMPLES} draws of a row")
        print(
            f"{'program':10}{'rows':>6}{'p50 ms':>9}{'p99 ms':>9}{'requests/s':>12}{'rows/s':>9}"
            f"{'direct':>9}{'ratio':>7}{'refused':>9}"
        )
        with serve(path) as address:
            for name in PROGRAMS:
                for rows in ROWS:
                    report(address, served, name, held_out[:rows], seconds)


def report(address, served, name, images, seconds):
    measure(address, name, images, seconds / 5)  # warm
    times, rate, refused = measure(address, name, images, seconds)
    alone = direct(served, name, images, seconds)
    p50, p99 = 1e3 * np.quantile(times, [0.5, 0.99])
    rows = rate * len(images)
    print(
        f"{name:10}{len(images):6}{p50:9.1f}{p99:9.1f}{rate:12.0f}{rows:9.0f}{alone:9.0f}"
        f"{rows / alone:7.2f}{refused:9}",
        flush=True,
    )


if __name__ == "__main__":
    main()
