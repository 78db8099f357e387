"""Who may import whom, and where numbers live, read from the source by `ast`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME, SEARCH = "diffusers_dssolver", "dssolver_search"
PIPELINES = f"{RUNTIME}.pipelines"
ISOLATED = ("models", "pipelines")  # what they import of the package is in their own folder
STANDARD = sys.stdlib_module_names

# what each file of the runtime package may import beside the standard library
ALLOWED = {
    "solver": set(),
    "published": set(),
    "step": {"torch"},
    "paths": {"torch"},
    "grids": set(),
    "figures": set(),
    "artefacts": {f"{RUNTIME}.config", f"{RUNTIME}.solver"},
    "choose": {"torch", f"{RUNTIME}.derive", f"{RUNTIME}.grids", f"{RUNTIME}.paths", f"{RUNTIME}.solver"},
    "history": {"torch", f"{RUNTIME}.solver", f"{RUNTIME}.step"},
    "writing": {"torch", f"{RUNTIME}.derive", f"{RUNTIME}.history", f"{RUNTIME}.loading", f"{RUNTIME}.paths"},
    "training": {"torch", f"{RUNTIME}.derive", f"{RUNTIME}.paths", f"{RUNTIME}.writing"},
    "loading": {
        "diffusers",
        f"{RUNTIME}.derive",
        f"{RUNTIME}.paths",
        f"{RUNTIME}.solver",
        f"{RUNTIME}.artefacts",
        f"{RUNTIME}.config",
        f"{RUNTIME}.card",
        f"{RUNTIME}.published",
    },
    "config": {f"{RUNTIME}.derive", f"{RUNTIME}.paths", f"{RUNTIME}.solver"},
    "derive": {"torch", f"{RUNTIME}.paths", f"{RUNTIME}.solver"},
    "card": {
        "diffusers",
        "huggingface_hub",
        PIPELINES,
        f"{RUNTIME}.config",
        f"{RUNTIME}.figures",
        f"{RUNTIME}.published",
        f"{RUNTIME}.scheduler",
    },
}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name of a file of the checkout; `search/` is imported as `dssolver_search`."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "search":
        parts[0] = SEARCH
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, name: str, is_package: bool = False) -> set[str]:
    """Absolute names of all that a module imports, at the top or inside functions; relative ones resolved."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            if (node.level and not node.module) or ".".join(base) == RUNTIME:  # the names may be modules
                found |= {".".join([*base, alias.name]) for alias in node.names}
            else:
                found.add(".".join(base))
    return found


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")


def foreign(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] not in STANDARD}


def inside(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_how_imports_are_read():
    source = "import a.b\nfrom .solver import x\nfrom . import paths\nfrom ..up import y\ndef f():\n    from c import d"
    assert imports(source, "p.q.m") == {"a.b", "p.q.solver", "p.q.paths", "p.up", "c"}
    assert imports("from .m import x", "p", is_package=True) == {"p.m"}
    assert imports(f"from {RUNTIME} import scheduler", "tests.x") == {f"{RUNTIME}.scheduler"}


@pytest.mark.parametrize("name", ALLOWED)
def test_arrows_of_the_runtime_package(name):
    found = foreign(imports_of(ROOT / RUNTIME / f"{name}.py"))
    assert not {n for n in found if not inside(n, ALLOWED[name])}


def test_every_runtime_file_has_its_arrows():
    names = {path.stem for path in (ROOT / RUNTIME).glob("*.py")}
    assert names == {*ALLOWED, "scheduler", "__init__"}


@pytest.mark.parametrize("path", files(RUNTIME), ids=module_name)
def test_runtime_package_needs_only_torch_and_diffusers(path):
    found = {name.split(".")[0] for name in foreign(imports_of(path))}
    # numpy, PIL and huggingface_hub come with diffusers itself
    assert found <= {"torch", "numpy", "PIL", "huggingface_hub", "diffusers", RUNTIME}


@pytest.mark.parametrize("path", [p for f in ISOLATED for p in files(f"{RUNTIME}/{f}")], ids=module_name)
def test_pipelines_and_models_know_no_solver(path):
    own = f"{RUNTIME}.{path.parent.name}"
    assert not {name for name in imports_of(path) if inside(name, {RUNTIME}) and not inside(name, {own})}


@pytest.mark.parametrize("path", files(RUNTIME), ids=module_name)
def test_runtime_package_knows_no_search(path):
    assert not {name for name in imports_of(path) if inside(name, {SEARCH, "search"})}


@pytest.mark.parametrize("name", ["evaluate", "metrics", "extractors", "references"])
def test_evaluation_imports_no_solver(name):
    """Metrics know images only, so they cannot favour one sampler."""
    found = imports_of(ROOT / "search" / f"{name}.py") - {f"{RUNTIME}.figures"}  # names of metrics
    assert not {name for name in found if inside(name, {RUNTIME}) or "schedulers" in name}


# --- numbers live in hub_cards/ ------------------------------------------------------------------------------------


def significant_digits(number: float) -> int:
    mantissa = repr(abs(number)).split("e")[0].replace(".", "")
    return len(mantissa.strip("0"))


def literal_floats(node: ast.AST) -> list[float]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, float)]


def coefficient_tables(source: str) -> list[int]:
    """Lines of lists, tuples, sets and dicts (nested ones together) that hold four or more floats of 3+ digits."""
    displays = (ast.List, ast.Tuple, ast.Set, ast.Dict)
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, displays) and sum(significant_digits(f) >= 3 for f in literal_floats(node)) >= 4
    ]


def test_how_tables_are_found():
    assert coefficient_tables("x = [0.123, -0.456, 1.25, 0.00789]") == [1]
    assert coefficient_tables("\nx = ((0.123, 0.456), (1.25, 100.25))") == [2]
    assert coefficient_tables("x = {5: [0.123, 0.456], 6: [1.25, 2.0625]}") == [1]
    assert not coefficient_tables("x = [0.1, 0.25, 1.0, 0.5, 1e-4, 0.02]")
    assert not coefficient_tables("x = [0.123, 0.456, 1.25]")


@pytest.mark.parametrize("path", [*files(RUNTIME), *files("search")], ids=module_name)
def test_no_coefficients_in_code(path):
    assert not coefficient_tables(path.read_text(encoding="utf-8"))


# --- what an import costs ------------------------------------------------------------------------------------------


def test_import_stays_light():
    """Beside what the two diffusers modules load that every scheduler needs, importing us loads nothing heavy."""
    code = (
        "import sys, diffusers.configuration_utils, diffusers.schedulers.scheduling_utils\n"
        "before = {m.split('.')[0] for m in sys.modules}\n"
        "import diffusers_dssolver\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules} - before))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    new = {name for name in run.stdout.split() if name not in STANDARD and not name.startswith("_")}
    assert new == {RUNTIME}
