"""Everything that pyproject.toml asks users to install is imported by something."""

import ast
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_WORK_ON_THE_LIBRARY = {"benchmarks", "docs", "lint", "tests"}  # extras that users do not need
IMPORTED_AS = {"orbax_checkpoint": "orbax", "scikit_learn": "sklearn"}
# Not imported here, but by another package when it is asked for something.
INDIRECT = {
    "flatbuffers": "jax.export",
    "funsor": "NumPyro's TraceEnum_ELBO",
    "h5netcdf": "xarray's to_netcdf",
    "h5py": "h5netcdf",
}


def required() -> set[str]:
    """The packages that users install, under the names by which they are imported."""
    lines = [*PROJECT["dependencies"]]
    for extra, needs in PROJECT["optional-dependencies"].items():
        if extra not in FOR_WORK_ON_THE_LIBRARY:
            lines += needs
    names = {re.split(r"[<>=~\[; ]", line)[0].replace("-", "_") for line in lines}
    return {IMPORTED_AS.get(name, name) for name in names - {"numpyro_vae"}}


def imported() -> set[str]:
    """The packages that the library and its examples import, inside functions too."""
    found = set()
    for folder in ("numpyro_vae", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module.split(".")[0])
    return found


def test_every_requirement_is_imported():
    unused = required() - imported() - {*INDIRECT}
    assert not unused, f"pyproject.toml requires {sorted(unused)}, which nothing imports"
