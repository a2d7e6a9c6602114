"""The files of finetune/models, embedded in exported pickles: they follow the rules of models/README.md."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest
import torch

import finetune.models
from torch_utils import persistence

FOLDER = Path(finetune.models.__file__).parent
FILES = sorted(path.name for path in FOLDER.glob("*.py") if path.name != "__init__.py")

# What every code base of the family has (a module of ours -> its names); None: every public name.
SURFACE = {
    "torch": None,
    "numpy": None,
    "dnnlib": {"EasyDict", "util"},
    "torch_utils.misc": {"assert_shape", "constant", "suppress_tracer_warnings", "profiled_function"},
    "torch_utils.persistence": {"persistent_class"},
    "torch_utils.ops.upfirdn2d": {"setup_filter", "upfirdn2d", "upsample2d", "downsample2d", "filter2d"},
    "torch_utils.ops.bias_act": {"bias_act", "activation_funcs"},
    "torch_utils.ops.conv2d_gradfix": {"conv2d"},
    "torch_utils.ops.conv2d_resample": {"conv2d_resample"},
    "torch_utils.ops.fma": {"fma"},
    "torch_utils.ops.grid_sample_gradfix": {"grid_sample"},
    "torch_utils.ops.filtered_lrelu": {"filtered_lrelu"},
}


def parse(name: str) -> ast.Module:
    """Parse as Python 3.8 does, which refuses younger syntax."""
    return ast.parse((FOLDER / name).read_text(encoding="utf-8"), feature_version=(3, 8))


def imports(tree: ast.Module) -> dict[str, str]:
    """Local name -> dotted module or object that it stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b` binds a; `import a.b as c` binds a.b
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return found


@pytest.mark.parametrize("name", FILES)
def test_sources_imports(name):
    for target in imports(parse(name)).values():
        top = target.split(".")[0]
        known = target in SURFACE or top in ("torch", "numpy") or top in sys.stdlib_module_names
        module, _, leaf = target.rpartition(".")
        assert known or leaf in (SURFACE.get(module) or ()), f"{name} imports {target}"


@pytest.mark.parametrize("name", FILES)
def test_sources_names_used_of_shared_modules(name):
    """Only what other code bases have is used, and never the keyword `impl`."""
    tree = parse(name)
    bound = imports(tree)
    used = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            allowed = SURFACE.get(bound.get(node.value.id, ""))
            if allowed is not None:
                used += 1
                assert node.attr in allowed, f"{name}:{node.lineno}: {node.value.id}.{node.attr}"
        if isinstance(node, ast.Call):
            assert all(keyword.arg != "impl" for keyword in node.keywords), f"{name}:{node.lineno}: impl="
    assert used > 0


@pytest.mark.parametrize("name", FILES)
def test_sources_every_module_is_persistent(name):
    module = __import__("finetune.models." + name[:-3], fromlist=["*"])
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, torch.nn.Module)
        and value.__module__ == module.__name__
    ]
    assert classes
    for cls in classes:
        assert persistence.is_persistent(cls), f"{name}: {cls.__name__} is not a persistent class"
