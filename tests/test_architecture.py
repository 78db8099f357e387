"""The shape of the house, read from the source by `ast`: who imports whom, sizes, numbers, and what an import costs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME, SEARCH = "diffusers_dssolver", "dssolver_search"
CLASS_LINES, FUNCTION_LINES, SCHEDULER_LINES = 250, 60, 400
HEAVY = {"accelerate", "datasets", "diffusers", "matplotlib", "numpy", "scipy", "torch", "transformers"}

# What each module of the runtime package may import beside the standard library.
MATHS = {
    "solver": set(), "grids": set(), "step": {"torch"}, "paths": {"torch"}, "derive": {"torch", "paths", "solver"},
    "carry": {"torch", "paths", "solver", "step"},
}  # fmt: skip
RUNTIME_ARROWS: dict[str, set[str]] = {
    **MATHS,
    "published": set(),
    "config": {*MATHS},
    "history": {"torch", *MATHS},
    "artefacts": {"config", "solver"},
    "choose": {"torch", *MATHS},
    "card": {"diffusers", "huggingface_hub", "artefacts", "pipelines", "published"},
    "loading": {"diffusers", "artefacts", "card", "config", "published", *MATHS},
    "writing": {"torch", "history", "loading", *MATHS},
    "training": {"torch", "writing", *MATHS},
    "scheduler": {"diffusers", "numpy", "torch", "choose", "config", "history", "training", *MATHS},
    "models": {"diffusers", "torch", "models"},
    "pipelines": {"diffusers", "numpy", "torch", "PIL", "pipelines"},
    "__init__": {"diffusers", "models", "published", "scheduler", "solver"},
}
# What each folder or module of the search may import of the search, and whether the runtime package.
BASE = {"settings", "console"}
SEARCH_ARROWS: dict[str, set[str]] = {
    "settings": {f"{RUNTIME}.solver"},  # numbers alone: the package imports its modules when they are asked for
    "console": set(),
    "storage": BASE,
    "processes": {"storage", *BASE},
    "images": {"storage", *BASE},
    "pipeline": {RUNTIME, "processes", "images", "storage", *BASE},
    "teacher": {RUNTIME, "pipeline", "processes", "images", "storage", *BASE},
    "methods": {RUNTIME, "teacher", "pipeline", "processes", "images", "storage", *BASE},
    "measure": {RUNTIME, "teacher", "pipeline", "processes", "images", "storage", *BASE},
    "artefacts": {RUNTIME, "measure.pictures", "measure.results", "storage", *BASE},
    "checkpoints": {RUNTIME, "storage", *BASE},
    "demo": {RUNTIME, "images", "storage", *BASE},
    "interface": {RUNTIME, "methods", "measure", "artefacts", "pipeline", "processes", "storage", *BASE},
    "cli": BASE,
    "__main__": {"cli"},
    "__init__": {"interface"},
}


def module_name(path: Path) -> str:
    """Dotted name of a file of the checkout; `search/` is imported as `dssolver_search`."""
    first, *parts = path.relative_to(ROOT).with_suffix("").parts
    parts = [SEARCH if first == "search" else first, *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for folder in (RUNTIME, "search") for path in sorted((ROOT / folder).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(tree: ast.AST, name: str, is_package: bool, modules: set[str]) -> set[str]:
    """Absolute names of the modules that a module imports, at the top or inside functions."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *(node.module.split(".") if node.module else [])])
            members = {alias.name: f"{origin}.{alias.name}" for alias in node.names}
            found |= {member if member in modules else origin for member in members.values()}
    return found


IMPORTS = {name: imports(TREES[name], name, FILES[name].name == "__init__.py", set(FILES)) for name in FILES}


def unit(name: str) -> str:
    """The folder or module of its package that a module belongs to: `methods` of `dssolver_search.methods.search`."""
    return [*name.split("."), "__init__"][1]


def members(package: str) -> list[str]:
    return [name for name in FILES if name.split(".")[0] == package]


def violations(package: str, arrows: dict[str, set[str]], imported: dict[str, set[str]]) -> set[str]:
    """'module -> import' of what no arrow allows; an arrow to a folder allows its modules."""
    found = set()
    for name, targets in imported.items():
        if name.split(".")[0] != package:
            continue
        for target in targets - {package}:
            local = target.removeprefix(f"{package}.")
            if target.split(".")[0] in sys.stdlib_module_names or (local != target and unit(target) == unit(name)):
                continue
            if package == SEARCH and local == target and target.split(".")[0] != RUNTIME:
                continue  # other distributions: the search may use what it depends on
            if not any(local == arrow or local.startswith(f"{arrow}.") for arrow in arrows[unit(name)]):
                found.add(f"{name} -> {target}")
    return found


def circles(graph: dict[str, set[str]]) -> set[str]:
    """Names of modules that import each other, directly or by way of others, joined."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            todo += (new := graph.get(todo.pop(), set()) - seen)
            seen |= new
        reached[start] = seen
    return {" ".join(sorted(b for b in graph if b in reached[a] and a in reached[b])) for a in graph} - {""}


def sizes(tree: ast.AST, *kinds: type) -> Iterator[tuple[str, int]]:
    """Names and lines of definitions, docstrings and comments included."""
    for node in ast.walk(tree):
        if isinstance(node, kinds):
            yield node.name, node.end_lineno - node.lineno + 1


def test_the_readers_of_source():
    source = "import a.b\nfrom .solver import x\nfrom . import paths\nfrom ..up import y\ndef f():\n    from c import d"
    found = imports(ast.parse(source), "p.q.m", False, {"p.q.paths"})
    assert found == {"a.b", "p.q.solver", "p.q.paths", "p.up", "c"}
    assert imports(ast.parse("from .m import x"), "p", True, set()) == {"p.m"}
    imported = {"p.a": {"os", "p.b", "p.c.x"}, "p.c.x": {"p.c.y", "p.b"}, "q": {"p.b"}}
    assert violations("p", {"a": {"c.x"}, "c": set()}, imported) == {"p.a -> p.b", "p.c.x -> p.b"}
    assert circles({"a": {"b"}, "b": {"c", "x"}, "c": {"b"}, "d": {"d"}}) == {"b c", "d"}
    assert list(sizes(ast.parse("@d\ndef f():\n    '''x'''\n\n    return 1"), ast.FunctionDef)) == [("f", 4)]


def test_arrows_of_the_runtime_package():
    assert {unit(name) for name in members(RUNTIME)} == set(RUNTIME_ARROWS)
    assert violations(RUNTIME, RUNTIME_ARROWS, IMPORTS) == set()


def test_arrows_of_the_search():
    assert {unit(name) for name in members(SEARCH)} == set(SEARCH_ARROWS)
    assert violations(SEARCH, SEARCH_ARROWS, IMPORTS) == set()


def test_no_module_imports_itself_by_way_of_others():
    assert circles({name: targets & set(FILES) for name, targets in IMPORTS.items()}) == set()


def test_images_know_no_solver():
    """Metrics see images only, so they cannot favour a sampler."""
    words = ("solver", "scheduler", "sampler")
    for name in members(SEARCH):
        if unit(name) == "images":
            names = {n.id for n in ast.walk(TREES[name]) if isinstance(n, ast.Name)} | IMPORTS[name]
            names |= {n.attr for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)}
            assert not {n for n in names if any(word in n.removeprefix(SEARCH).lower() for word in words)}, name


def test_nothing_is_longer_than_it_may_be():
    long = set()
    for name, tree in TREES.items():
        in_pipelines = name.startswith(f"{RUNTIME}.pipelines.")
        long |= {(name, n) for n, k in sizes(tree, ast.ClassDef) if k > CLASS_LINES and n != "DSSolverScheduler"}
        for n, lines in sizes(tree, ast.FunctionDef, ast.AsyncFunctionDef):
            if lines > FUNCTION_LINES and not (in_pipelines and n == "__call__"):
                long.add((name, n))
    assert long == set()
    assert len(FILES[f"{RUNTIME}.scheduler"].read_text(encoding="utf-8").splitlines()) <= SCHEDULER_LINES


# --- numbers live in hub_cards/ ------------------------------------------------------------------------------------


def significant_digits(number: float) -> int:
    mantissa = repr(abs(number)).split("e")[0].replace(".", "")
    return len(mantissa.strip("0"))


def literal_floats(node: ast.AST) -> list[float]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, float)]


def coefficient_tables(tree: ast.AST) -> list[int]:
    """Lines of lists, tuples, sets and dicts (nested ones together) that hold four or more floats of 3+ digits."""
    displays = (ast.List, ast.Tuple, ast.Set, ast.Dict)
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, displays) and sum(significant_digits(f) >= 3 for f in literal_floats(node)) >= 4
    ]


@pytest.mark.parametrize(
    "source, lines",
    [
        ("x = [0.123, -0.456, 1.25, 0.00789]", [1]),
        ("\nx = ((0.123, 0.456), (1.25, 100.25))", [2]),
        ("x = {5: [0.123, 0.456], 6: [1.25, 2.0625]}", [1]),
        ("x = [0.1, 0.25, 1.0, 0.5, 1e-4, 0.02]", []),
        ("x = [0.123, 0.456, 1.25]", []),
    ],
)
def test_how_tables_are_found(source, lines):
    assert coefficient_tables(ast.parse(source)) == lines


def test_no_coefficients_in_code():
    assert not {name: lines for name, tree in TREES.items() if (lines := coefficient_tables(tree))}


# --- what an import costs ------------------------------------------------------------------------------------------


def modules_after(code: str, tmp_path: Path) -> list[set[str]]:
    """Names in `sys.modules` whenever `code` calls `tell()`, in a process that finds both packages in the checkout."""
    for package, folder in ((RUNTIME, RUNTIME), (SEARCH, "search")):
        (tmp_path / package).symlink_to(ROOT / folder)
    code = f"import sys\ndef tell():\n    print('modules', *sys.modules)\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "80"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return [set(line.split()[1:]) for line in run.stdout.splitlines() if line.startswith("modules ")]


def distributions(modules: set[str]) -> set[str]:
    """Top-level names that are not of the standard library."""
    names = {name.split(".")[0] for name in modules}
    return {name for name in names if name not in sys.stdlib_module_names and not name.startswith("_")}


def test_import_loads_what_every_scheduler_of_diffusers_loads(tmp_path):
    code = "import diffusers.configuration_utils, diffusers.schedulers.scheduling_utils\ntell()"
    before, after = modules_after(f"{code}\nfrom {RUNTIME} import DSSolverScheduler\ntell()", tmp_path)
    assert "torch" in before
    new = {name for name in after - before if name.split(".")[0] not in sys.stdlib_module_names}
    assert new and {name.split(".")[0] for name in new} == {RUNTIME}


def test_help_loads_nothing_heavy(tmp_path):
    """Neither the list of commands nor the keys of one."""
    code = f"""
import runpy
for arguments in (["--help"], ["search", "--help"], ["evaluate", "--help"]):
    sys.argv = ["{SEARCH}", *arguments]
    try:
        runpy.run_module("{SEARCH}", run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
    tell()
"""
    loaded = modules_after(code, tmp_path)
    assert len(loaded) == 3
    for modules in loaded:
        assert SEARCH in distributions(modules)
        assert distributions(modules) & HEAVY == set()
