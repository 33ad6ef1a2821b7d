"""What importing the library adds to importing NumPyro.

python benchmarks/imports.py
"""

import argparse
import statistics
import subprocess
import sys
import time


def seconds(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", module], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    base_module = "import numpyro"
    modules = (
        base_module,
        "import numpyro_vae",
        "from numpyro_vae import *",
        "import numpyro, optax, flax.nnx, numpyro.infer.autoguide",
    )
    found = {module: [] for module in modules}
    for repeat in range(args.repeats + 1):
        for module in modules:
            taken = seconds(module)
            if repeat:  # the first fills the disk cache
                found[module].append(taken)
    print("\nimport, in a fresh process")
    base = statistics.median(found[base_module])
    for module in modules:
        median = statistics.median(found[module])
        print(f"  {module:<60}{median:7.3f} s  {median / base:6.3f}x")


if __name__ == "__main__":
    main()
