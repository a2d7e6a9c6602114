"""The project's own files agree with each other: environment.yml, pyproject.toml, the README, the scripts."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from finetune.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
SCRIPTS = [
    ".ci/run",
    *(f"scripts/{path.name}" for path in sorted((ROOT / "scripts").iterdir()) if not path.suffix),
]


def wanted_by_pyproject() -> set[str]:
    extras = PROJECT["optional-dependencies"]
    everything = [*PROJECT["dependencies"], *(line for extra in extras.values() for line in extra)]
    return {line for line in everything if not line.startswith(PROJECT["name"])}


def test_environment_yml_matches_pyproject():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    conda, pip = text.split("  - pip:\n")
    assert sorted(line.removeprefix("      - ") for line in pip.splitlines()) == sorted(wanted_by_pyproject())
    assert f"  - python{PROJECT['requires-python']}\n" in conda


def test_dev_extra_includes_other_extras():
    extras = PROJECT["optional-dependencies"]
    match = re.fullmatch(rf"{PROJECT['name']}\[(.*)\]", extras["dev"][0])
    assert match, extras["dev"][0]
    assert set(match[1].split(",")) == set(extras) - {"dev"}


def test_package_files_exist():
    assert PROJECT["scripts"]["finetune"] == "finetune.cli:main"
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "docs/architecture.md"):
        assert (ROOT / name).stat().st_size > 500, name


def test_readme_names_every_command():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"`finetune {name}" in text, name


def test_results_are_short_tables_without_raw_records():
    for path in (ROOT / "benchmarks" / "results").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 100 and "```json" not in text, path.name
        assert text.count("![") <= 1, path.name


def test_security_md_names_existing_tests():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= {path.stem, *re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))}
    named = set(re.findall(r"test_\w+", text))
    assert len(named) > 20 and sorted(named - found) == []


def test_documents_links_exist():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
    assert len(documents) > 6
    broken = []
    for document in documents:
        targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8"))
        for target in targets:
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert broken == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_stop_at_errors(name):
    path = ROOT / name
    assert os.access(path, os.X_OK)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_scripts_name_required_python(tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3").chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "test"],
        env={"PATH": str(tmp_path), "FINETUNE_VENV": str(tmp_path / "venv"), "CI": "true"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "No Python 3.11 or newer on the PATH" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_architecture_page_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[A-Za-z_0-9]+", text))
    modules = [path for top in ("finetune", "torch_utils", "dnnlib") for path in (ROOT / top).rglob("*.py")]
    named = {path.parent.name if path.stem == "__init__" else path.stem for path in modules}
    commands = set(COMMANDS)  # "one file a command"
    assert sorted(named - words - commands) == []


def test_architecture_page_paths_exist():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("## Files\n\n```\n")[1].split("```")[0]
    named, parents = [], [(-1, ROOT)]
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        while parents[-1][0] >= indent:
            parents.pop()
        names = re.split(r" {2,}", line.strip())[0].split()
        named += [parents[-1][1] / name for name in names]
        if names[0].endswith("/"):
            parents.append((indent, named[-1]))
    named += [ROOT / path for path in re.findall(r"`([\w.-]+/[\w./-]*|[\w-]+\.(?:md|py|json))`", text)]
    assert len(named) > 120
    assert [str(path.relative_to(ROOT)) for path in named if not path.exists()] == []


def test_documented_commands_have_their_options():
    known, used = {}, []
    for name in COMMANDS:
        text = (ROOT / "docs" / "help" / f"{name}.txt").read_text(encoding="utf-8")
        known[name] = set(re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", text))
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, rest in re.findall(r"\bfinetune ([a-z]+)([^`#\n|;]*)", text):
            if command in known:
                options = re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", rest)
                used += [(document.name, command, option) for option in options]
    assert len(used) > 60
    assert [(name, command, option) for name, command, option in used if option not in known[command]] == []


def test_readme_stays_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120
    commands = "\n".join(lines).split("```bash\n")[1].splitlines()
    assert [line.split()[0] for line in commands[:2]] == ["scripts/demo", "scripts/test"]
