"""The shape of the repository: what imports what, what is exported, what is documented."""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

from tests.structure_order import FOLDERS, ORDER, PLUG_INS

# Installed with the library or by an extra, but loaded only by what needs them.
LAZY = ("arviz", "arviz_base", "arviz_plots", "arviz_stats", "matplotlib")
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


def place_of(module: str) -> tuple[str, str]:
    """`numpyro_vae.encoders.mlp` -> `("encoders", "mlp")`; `("encoders", "")` is the folder."""
    _, folder, name, *_ = (*module.split("."), "", "")
    return folder, name


def rank_in(folder: str, name: str) -> int:
    """The place of a module in the order of its folder."""
    order = ORDER[folder]
    return order.index(name if name in order else PLUG_INS)


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
    (here, mine), (there, theirs) = place_of(importer), place_of(imported)
    if not there:
        return "imports the top of the package; import from the module that defines the name"
    if there not in FOLDERS:
        return f"imports {imported}, which is not in FOLDERS"
    if here != there:
        if FOLDERS.index(there) > FOLDERS.index(here):
            return f"imports {imported}, a later folder; a folder imports only those before it"
        return None
    if not mine:  # a folder's __init__ gathers its modules
        return None
    if not theirs:
        return f"imports its own folder {imported}; import from the module that defines the name"
    if rank_in(here, theirs) > rank_in(here, mine):
        return f"imports {imported}, which comes later in ORDER[{here!r}]"
    if rank_in(here, theirs) == rank_in(here, mine):
        return f"imports its sibling {imported}; what siblings share belongs in {here}/base.py"
    return None


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_flow_forward(path):
    module = dotted(path)
    folder, name = place_of(module)
    assert folder in FOLDERS, f"{relative(path)}: give {folder!r} its place in FOLDERS"
    known = ORDER.get(folder, ("",))
    assert not name or name in known or PLUG_INS in known, (
        f"{relative(path)}: give {name!r} its place in ORDER[{folder!r}]"
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
        ("numpyro_vae.guides.base", "numpyro_vae.encoders.base", None),
        ("numpyro_vae.encoders.mlp", "numpyro_vae.encoders.base", None),
        ("numpyro_vae.encoders", "numpyro_vae.encoders.mlp", None),
        ("numpyro_vae.encoders.mlp", "numpyro_vae.layers.convolution", None),
        ("numpyro_vae.checks.run", "numpyro_vae.checks.gap", None),
        ("numpyro_vae.checks.gap", "numpyro_vae.checks.run", "comes later"),
        ("numpyro_vae.checks.gap", "numpyro_vae.checks.collapse", "sibling"),
        ("numpyro_vae.model.sites", "numpyro_vae.model.plan", "comes later"),
        ("numpyro_vae.encoders.convnet", "numpyro_vae.encoders.mlp", "sibling"),
        ("numpyro_vae.encoders.convnet", "numpyro_vae.encoders", "own folder"),
        ("numpyro_vae.encoders.mlp", "numpyro_vae.guides.base", "later folder"),
        ("numpyro_vae.training.fit", "numpyro_vae", "top of the package"),
        ("numpyro_vae.training.fit", "numpyro_vae.helpers", "not in FOLDERS"),
    ],
)
def test_the_rule_for_imports(importer, imported, wrong):
    found = complaint(importer, imported)
    assert found is None if wrong is None else wrong in found


def test_every_folder_is_listed():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | modules == set(FOLDERS)


def public_names() -> list[tuple[str, str]]:
    """(module, name) for each entry of each `__all__`; a module without one serves other stages."""
    pairs = []
    for path in MODULES:
        module = importlib.import_module(dotted(path))
        pairs += [(module.__name__, name) for name in getattr(module, "__all__", ())]
    return pairs


def test_public_names_are_exported_at_the_top_or_by_a_folder():
    paths = (PACKAGE / "__init__.py", *PACKAGE.glob("*/__init__.py"))
    top, *folders = (importlib.import_module(dotted(path)) for path in paths)
    exported = {
        (name, id(getattr(package, name)))
        for package in (top, *folders)
        for name in getattr(package, "__all__", ())
    }
    names = [(x, name, id(getattr(importlib.import_module(x), name))) for x, name in public_names()]
    missing = [f"{module}.{name}" for module, name, value in names if (name, value) not in exported]
    assert not missing, (
        f"neither numpyro_vae/__init__.pyi nor the __init__.py of a folder exports {missing}: "
        "export what users type at the top and the rest in a folder, "
        "or take it out of its module's __all__"
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
    missing = [name for name in LAZY if importlib.util.find_spec(name) is None]
    assert not missing, f"{missing} are not installed, so that nothing could have imported them"


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_scripts_compile(path):
    compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_no_file_is_too_long():
    folders = ("numpyro_vae", "tests", "examples", "benchmarks", "docs")
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    lengths = {relative(x): len(x.read_text(encoding="utf-8").splitlines()) for x in paths}
    long = [f"{name} ({lines})" for name, lines in lengths.items() if lines > MAX_LINES]
    assert not long, f"more than {MAX_LINES} lines; each wants to be two files: {', '.join(long)}"
