"""What importing the library adds to importing NumPyro.

python benchmarks/imports.py
"""

import argparse
import subprocess
import sys
from functools import partial

from timing import interleave, report

BASE = "import numpyro"
ALL = "from numpyro_vae import *"
DEPENDENCIES = "import numpyro, optax, flax.nnx, numpyro.infer.autoguide"


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="two imports: does it run?")
    args = parser.parse_args()
    codes = (BASE, ALL) if args.smoke else (BASE, "import numpyro_vae", ALL, DEPENDENCIES)
    runs = {code: partial(run, code) for code in codes}
    # The first run of each, which interleave does not count, fills the disk cache.
    seconds = interleave(runs, 1 if args.smoke else args.repeats)
    report("import, in a fresh process", seconds, BASE)


if __name__ == "__main__":
    main()
