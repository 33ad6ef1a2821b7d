"""Checks every annotated call into the library at run time, on the CPU, without a display.

Nothing here seeds anything: each test makes its own `rng_key`.
"""

import os
import pathlib

# Before JAX and matplotlib are imported; a value that the caller has set is kept.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Most of a test is compiling, and hardly any of it running what was compiled; the next run takes
# from a cache what has not changed.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from jaxtyping import install_import_hook

# Before any test imports the library: the types and shapes of public calls are checked by beartype.
install_import_hook("numpyro_vae", "beartype.beartype")

# Scripts that tests start in processes of their own, with devices or hosts that are not here.
collect_ignore = ["training/on_devices.py", "training/on_hosts.py"]
