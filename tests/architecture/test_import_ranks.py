"""A module imports only from a lower rank or its own package, and no imports form a cycle.

docs/architecture.md has the table of ranks.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANKS = {
    "dnnlib": 0,
    "finetune.errors": 0,
    "finetune.options": 0,
    "finetune.config": 0,
    "finetune.version": 0,
    "torch_utils": 1,
    "finetune.recipes": 1,
    "finetune.models": 2,
    "finetune.device": 2,
    "finetune.progress": 2,
    "finetune.run_lock": 2,
    "finetune.distributed": 2,
    "finetune.data": 2,
    "finetune.sniff": 2,
    "finetune.hub": 3,
    "finetune.sampling": 3,
    "finetune.checkpoint": 4,
    "finetune.directions": 4,
    "finetune.resolve": 5,
    "finetune.metrics": 6,
    "finetune.export": 6,
    "finetune.report": 7,
    "finetune.editing": 7,
    "finetune.train": 8,
    "finetune.demo": 9,
    "finetune.api": 9,
    "finetune.cli": 10,
}
# Lower ranks that are out of bounds all the same: opening a file never touches the network.
FORBIDDEN = {("finetune.checkpoint", "finetune.hub")}
# The public API and the entry point of `python -m finetune`: they import nothing but what they export.
DOORS = {
    "finetune": {
        f"finetune.{part}"
        for part in ("errors", "version", "options", "checkpoint", "resolve", "export", "api")
    },
    "finetune.__main__": {"finetune.cli"},
}
# Imports inside functions that do not count as edges of a cycle: (module, imported module): reason.
DEFERRED: dict[tuple[str, str], str] = {}
OURS = ("dnnlib", "torch_utils", "finetune")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for top in OURS for path in sorted((ROOT / top).rglob("*.py"))}


def room(module: str) -> str | None:
    """The entry of RANKS that a module belongs to."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in RANKS), None)


def is_neighbor(home: str, target: str) -> bool:
    """Whether both are single files of one rank directly in `finetune/`, which is their own package."""
    return RANKS[home] == RANKS[target] and all(
        SOURCES[name].name != "__init__.py" for name in (home, target)
    )


def absolute(module: str, name: str, level: int) -> str:
    """The full name of what `from ..name import x` with `level` dots means inside `module`."""
    if level == 0:
        return name
    parts = module.split(".")
    is_package = SOURCES[module].name == "__init__.py"
    return ".".join([*parts[: len(parts) - level + is_package], *([name] if name else [])])


def imports(module: str, source: str):
    """(line, imported module of ours) for every import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node.module or "", node.level)
            # `from package import thing`: thing may be a module of its own
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in SOURCES else base for name in names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in OURS)


def broken(module: str, source: str) -> list[str]:
    """The lines of `source` that break a rule, one sentence each."""
    found = []
    home = room(module)
    for line, name in imports(module, source):
        target = room(name)
        where = f"{module}, line {line}: imports {name}"
        if module in DOORS:
            if target not in DOORS[module]:
                found.append(f"{where}, which the entrance to the package does not pass on")
        elif target is None:
            if name != "finetune":
                found.append(f"{where}, which has no rank in this test")
            elif RANKS[home] < RANKS["finetune.demo"]:
                found.append(f"{where}: the package itself is for users; name the module")
        elif target != home and RANKS[target] >= RANKS[home] and not is_neighbor(home, target):
            found.append(f"{where} (rank {RANKS[target]}) but is itself of rank {RANKS[home]}")
        elif (home, target) in FORBIDDEN:
            found.append(f"{where}, which {home} must never do")
    return found


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or not (Tarjan's algorithm)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in edges.get(module, ()):
            if target not in order:
                visit(target)
            if target in stack:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1 or module in edges.get(module, ()):
                found.append(sorted(group))

    for module in edges:
        if module not in order:
            visit(module)
    return found


def test_import_ranks_cover_all_modules():
    assert [name for name in SOURCES if room(name) is None and name not in DOORS] == []
    assert len(SOURCES) > 30


def test_import_ranks_only_decrease():
    found = {module: broken(module, path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}
    assert {module: lines for module, lines in found.items() if lines} == {}


def test_import_cycles_do_not_exist():
    """Imports inside functions and for type checkers count as well; importing a parent package does not."""
    edges = {
        module: {name for _, name in imports(module, path.read_text(encoding="utf-8")) if name != module}
        for module, path in SOURCES.items()
    }
    for module, name in DEFERRED:
        edges[module].remove(name)  # KeyError: no longer needed in the list
    assert sum(map(len, edges.values())) > 200
    assert cycles(edges) == []


def test_import_cycles_are_detected():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set()}) == [["a", "b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("finetune.data.image_set", "import finetune.checkpoint"),
        ("finetune.data", "from ..hub import download"),
        ("finetune.checkpoint.load", "from finetune.hub import catalog"),
        ("finetune.hub.store", "def f():\n    from finetune.checkpoint.load import load"),
        (
            "finetune.models.stylegan2",
            "from finetune.errors import ConfigError\nfrom finetune import sampling",
        ),
        ("finetune.checkpoint.rebuild", "def f():\n    from finetune.train.steps import train"),
        ("torch_utils.misc", "import finetune.device"),
        ("finetune.recipes", "from finetune import load"),
        ("finetune.demo.run", "from finetune.cli.options import parse_numbers"),
        ("finetune", "import finetune.train"),
    ],
)
def test_import_rules_detect_violations(module, line):
    assert len(broken(module, line)) == 1


def test_persistent_classes_are_in_models_only():
    pattern = re.compile(r"^\s*@.*persistent_class", re.MULTILINE)
    users = {name for name, path in SOURCES.items() if pattern.search(path.read_text(encoding="utf-8"))}
    assert users, "the pattern finds nothing at all"
    assert all(name.startswith("finetune.models.") for name in users), users


def test_models_are_self_contained():
    """What an exported pickle embeds may use nothing of this project but the frozen face."""
    models = [name for name in SOURCES if name.startswith("finetune.models.")]
    assert models
    for name in models:
        used = {target for _, target in imports(name, SOURCES[name].read_text(encoding="utf-8"))}
        assert {target.split(".")[0] for target in used} <= {"dnnlib", "torch_utils"}, name
