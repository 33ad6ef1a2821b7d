"""Runs the tests on the CPU, without a display; with ``--types`` every annotated call is checked.

Nothing here seeds anything: each test makes its own `rng_key`.
"""

import gc
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
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # which no test looks at

# Scripts that tests start in processes of their own, with devices or hosts that are not here.
collect_ignore = ["training/on_devices.py", "training/on_hosts.py"]


def pytest_addoption(parser):
    parser.addoption("--types", action="store_true", help="check types and shapes of all calls")


def pytest_configure(config):
    """Let beartype check what the library annotates, before any test imports it."""
    if config.getoption("--types"):
        from jaxtyping import install_import_hook

        install_import_hook("numpyro_vae", "beartype.beartype")


def pytest_collection_finish():
    """Look for garbage more rarely: tracing makes many objects, and what is imported stays."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
