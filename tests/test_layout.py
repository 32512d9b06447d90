"""Folders of the package import only from those before them, without circles."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tova_mlx"
FLOORS = (
    *("errors", "files", "tables", "progress", "policies", "storage", "eviction"),
    *("attention", "hooks", "caches", "models", "evaluation", "inspection"),
    *("benchmark", "cli"),
)
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE)


def imports(file):
    """The modules of the package that a file imports, with dots below the package."""
    here = file.relative_to(PACKAGE).parts
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = [
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    ]
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        above = list(here[: len(here) - node.level])
        parts = [*above, *(node.module or "").split(".")]
        base = [p for p in parts if p]
        for name in node.names:
            yield ".".join([*base, name.name])


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_a_folder_imports_from_those_before_it(file):
    floor = FLOORS.index(file.relative_to(PACKAGE).parts[0])
    for name in imports(file):
        first = name.partition(".")[0]
        if first == "__version__":
            continue
        assert FLOORS.index(first) <= floor, name


def test_no_module_imports_itself_by_way_of_others():
    def module(file):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    files = {module(f): f for f in FILES}

    def known(name):
        while name and name not in files:
            name = name.rpartition(".")[0]
        return name

    graph = {m: {known(n) for n in imports(f)} - {m, ""} for m, f in files.items()}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            # A package's own list of what is in it is no circle.
            if not name.startswith(f"{other}."):
                visit(other)
        path.pop()
        done.add(name)

    for name in files:
        visit(name)
