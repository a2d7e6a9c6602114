"""A module imports only from a lower rank or its own folder; docs/architecture.md draws the ranks."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANKS = {
    "dnnlib": 0,
    "finetune.errors": 0,
    "finetune.config": 0,
    "finetune.recipes": 0,
    "finetune.version": 0,
    "torch_utils": 1,
    "finetune.device": 2,
    "finetune.models": 2,
    "finetune.checkpoint": 3,
    "finetune.data": 3,
    "finetune.sampling": 4,
    "finetune.metrics": 5,
    "finetune.export": 5,
    "finetune.train": 6,
    "finetune.report": 6,
    "finetune.demo": 7,
    "finetune.cli": 8,  # above the demo, whose command it holds
}
# The face of the package and its two doors: they only pass on.
DOORS = {
    "finetune": {"finetune.errors", "finetune.version", "finetune.checkpoint"},
    "finetune.__main__": {"finetune.cli"},
}
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


def is_neighbour(home: str, target: str) -> bool:
    """Two single files of one rank directly in `finetune/`, which is their own folder."""
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
        elif target != home and RANKS[target] >= RANKS[home] and not is_neighbour(home, target):
            found.append(f"{where} (rank {RANKS[target]}) but is itself of rank {RANKS[home]}")
    return found


def test_every_module_has_a_rank():
    assert [name for name in SOURCES if room(name) is None and name not in DOORS] == []
    assert len(SOURCES) > 30


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_downwards_only(module):
    assert broken(module, SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("finetune.data.image_set", "import finetune.checkpoint"),
        ("finetune.data", "from ..checkpoint import fetch"),
        (
            "finetune.models.stylegan2",
            "from finetune.errors import ConfigError\nfrom finetune import sampling",
        ),
        ("finetune.checkpoint.rebuild", "def f():\n    from finetune.train.loop import train"),
        ("torch_utils.misc", "import finetune.device"),
        ("finetune.recipes", "from finetune import load"),
        ("finetune.demo.run", "from finetune.cli.options import parse_seeds"),
        ("finetune", "import finetune.train"),
    ],
)
def test_the_rule_catches(module, line):
    assert len(broken(module, line)) == 1


def test_nothing_outside_the_models_declares_a_persistent_class():
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
