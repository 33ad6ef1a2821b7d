"""The shape of the repository: what imports what, what is exported, what is documented."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

# A stage imports only stages before it. A new module takes its place here.
STAGES = (
    "convolution",
    "parameterization",
    "distributions",
    "inputs",
    "encoders",
    "families",
    "sites",
    "structure",
    "plates",
    "runs",
    "blocks",
    "network",
    "encoding",
    "emission",
    "arguments",
    "amortized",
    "guide",
    "objectives",
    "batches",
    "finite",
    "training",
    "sources",
    "fitting",
    "enumeration",
    "densities",
    "divergences",
    "views",
    "rows",
    "rowwise",
    "datatree",
    "refinement",
    "checks",
    "report",
    "battery",
    "proposals",
    "nuts",
    "rungs",
    "repair",
    "ladder",
    "posterior",
    "plots",
    "pages",
)
# Installed with the library or by an extra, but loaded only by what needs them.
LAZY = ("arviz", "arviz_base", "arviz_plots", "arviz_stats", "matplotlib", "orbax")
MAX_LINES = 400

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "numpyro_vae"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SCRIPTS = sorted((*(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")))


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def stage_of(module: str) -> str:
    """`numpyro_vae.encoders.conv` -> `encoders`; the top of the package has no stage."""
    return module.split(".")[1] if "." in module else ""


def imported_from(node: ast.ImportFrom, path: pathlib.Path) -> list[str]:
    """The modules an import statement names: `from . import base` and `from .base import X`."""
    package = path.parent.relative_to(ROOT).parts
    base = package[: len(package) + 1 - node.level] if node.level else ()
    source = ".".join((*base, *(node.module.split(".") if node.module else ())))
    below = ROOT.joinpath(*source.split("."))
    return [
        f"{source}.{alias.name}"
        if (below / alias.name).is_dir() or (below / f"{alias.name}.py").is_file()
        else source
        for alias in node.names
    ]


def internal_imports(path: pathlib.Path) -> list[tuple[int, str]]:
    """Line and module of each import from the package, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = imported_from(node, path)
        else:
            continue
        found += [(node.lineno, name) for name in names if name.split(".")[0] == PACKAGE.name]
    return found


def complaint(importer: str, imported: str) -> str | None:
    """What is wrong with one import, if anything; `importer` is a dotted module name."""
    here, there = stage_of(importer), stage_of(imported)
    if not there:
        return "imports the top of the package; import from the module that defines the name"
    if there not in STAGES:
        return f"imports {imported}, which is not in STAGES"
    if here == there:
        is_package = importer.count(".") == 1
        if is_package or imported == f"numpyro_vae.{here}.base":
            return None
        return f"imports its sibling {imported}; what siblings share belongs in {here}/base.py"
    if STAGES.index(there) > STAGES.index(here):
        return f"imports {imported}, a later stage; a stage imports only those before it"
    return None


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_flow_forward(path):
    module = dotted(path)
    assert stage_of(module) in STAGES, (
        f"{relative(path)} is no known stage: give {stage_of(module)!r} its place in STAGES"
    )
    complaints = [
        f"{relative(path)}:{line} {wrong}"
        for line, imported in internal_imports(path)
        if (wrong := complaint(module, imported))
    ]
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("numpyro_vae.guide", "numpyro_vae.encoders.base", None),
        ("numpyro_vae.encoders.conv", "numpyro_vae.encoders.base", None),
        ("numpyro_vae.encoders", "numpyro_vae.encoders.conv", None),
        ("numpyro_vae.encoders.conv", "numpyro_vae.convolution", None),
        ("numpyro_vae.encoders.conv", "numpyro_vae.encoders.mlp", "sibling"),
        ("numpyro_vae.encoders.conv", "numpyro_vae.encoders", "sibling"),
        ("numpyro_vae.encoders.conv", "numpyro_vae.guide", "later stage"),
        ("numpyro_vae.fitting", "numpyro_vae", "top of the package"),
        ("numpyro_vae.fitting", "numpyro_vae.helpers", "not in STAGES"),
    ],
)
def test_the_rule_for_imports(importer, imported, wrong):
    found = complaint(importer, imported)
    assert found is None if wrong is None else wrong in found


def public_names() -> list[tuple[str, str]]:
    """(module, name) for each entry of each `__all__`; a module without one serves other stages."""
    pairs = []
    for path in MODULES:
        module = importlib.import_module(dotted(path))
        pairs += [(module.__name__, name) for name in getattr(module, "__all__", ())]
    return pairs


def test_public_names_are_exported_at_the_top():
    top = importlib.import_module("numpyro_vae")
    missing = []
    for module, name in public_names():
        value = getattr(importlib.import_module(module), name)
        if name not in top.__all__ or getattr(top, name, None) is not value:
            missing.append(f"{module}.{name}")
    assert not missing, (
        f"numpyro_vae/__init__.py does not export {missing}: "
        "export them there, or take them out of their module's __all__"
    )
    extra = set(top.__all__).difference(name for _, name in public_names())
    assert not extra, f"numpyro_vae.__all__ has what no module's __all__ has: {sorted(extra)}"


def undocumented(name: str, value: object) -> list[str]:
    """`name`, and for a class `name.method`, of whatever has no docstring."""
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        return []
    doc = value.__doc__ or ""
    # A dataclass without a docstring is given its signature.
    found = [name] if not doc or doc.startswith(f"{value.__name__}(") else []
    if inspect.isclass(value):
        for attribute, member in vars(value).items():
            is_method = isinstance(member, property | staticmethod | classmethod)
            is_method = (is_method or inspect.isroutine(member)) and not attribute.startswith("_")
            # An override may inherit the docstring of the method it overrides.
            if is_method and not inspect.getdoc(getattr(value, attribute)):
                found.append(f"{name}.{attribute}")
    return found


def test_public_names_have_docstrings():
    found = []
    for module, name in public_names():
        found += undocumented(f"{module}.{name}", getattr(importlib.import_module(module), name))
    undocumented_modules = [
        relative(path) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not found + undocumented_modules, "no docstring: " + ", ".join(
        found + undocumented_modules
    )


def test_public_names_are_in_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    whole = set(re.findall(r"automodule:: ([\w.]+)", page))
    single = {
        entry.rsplit(".", 1)[-1]
        for entry in re.findall(r"auto(?:class|function|data|exception):: ([\w.]+)", page)
    }
    covered = single.union(
        *(importlib.import_module(module).__all__ for module in whole),
    )
    missing = [f"{module}.{name}" for module, name in public_names() if name not in covered]
    assert not missing, f"docs/api.md lacks {missing}: add an automodule line"


def test_importing_the_library_leaves_heavy_packages_alone():
    code = (
        "import sys; from numpyro_vae import *;"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded.intersection(LAZY), "importing all that is public should not import these"


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_scripts_compile(path):
    compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_no_file_is_too_long():
    folders = ("numpyro_vae", "tests", "examples", "benchmarks", "docs")
    long = []
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            long.append(f"{relative(path)} ({lines})")
    assert not long, f"more than {MAX_LINES} lines; each wants to be two files: {', '.join(long)}"
