"""Checks the catalogue against `checkpoints.schema.json`, and says in words what is wrong.

Understands the part of JSON Schema that this schema uses, so that a program at work needs no library for it;
the tests hold it against the library `jsonschema`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KINDS = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


@functools.cache
def schema() -> dict[str, Any]:
    """The schema of the catalogue."""
    path = Path(__file__).with_name("checkpoints.schema.json")
    return json.loads(path.read_text(encoding="utf-8"))


def problems_of(catalogue: Any) -> list[str]:
    """What is wrong with a whole catalogue, a sentence each."""
    return list(_problems(catalogue, schema(), ""))


def problems_of_entry(entry: Any) -> list[str]:
    """What is wrong with one entry, a sentence each."""
    return list(_problems(entry, schema()["$defs"]["checkpoint"], ""))


def _problems(value: Any, rule: dict[str, Any], where: str) -> Iterator[str]:
    if "$ref" in rule:
        rule = schema()["$defs"][rule["$ref"].rpartition("/")[2]]
    if "const" in rule and value != rule["const"]:
        yield f"{_place(where)} is {_shown(value)} and must be {rule['const']}"
    if "enum" in rule and value not in rule["enum"]:
        yield f"{_place(where)} is {_shown(value)}, and is one of {', '.join(map(_shown, rule['enum']))}"
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_a(value, kind) for kind in kinds):
        yield f"{_place(where)} is {_shown(value)}, and must be {' or '.join(kinds)}"
    elif isinstance(value, dict):
        yield from _problems_of_object(value, rule, where)
    elif isinstance(value, list):
        if len(value) < rule.get("minItems", 0):
            yield f"{_place(where)} has {len(value)} items, and needs {rule['minItems']}"
        for index, item in enumerate(value):
            yield from _problems(item, rule.get("items", {}), f"{where}[{_name_of(item, index)}]")
    elif isinstance(value, str):
        if len(value) > rule.get("maxLength", len(value)):
            yield f"{_place(where)} has {len(value)} letters, and may have {rule['maxLength']}"
        if not re.search(rule.get("pattern", ""), value):
            yield f"{_place(where)} is {_shown(value)}, which does not look like {rule['pattern']}"
    elif _is_a(value, "number") and value < rule.get("minimum", value):
        yield f"{_place(where)} is {value}, and is at least {rule['minimum']}"


def _problems_of_object(value: dict[Any, Any], rule: dict[str, Any], where: str) -> Iterator[str]:
    known = rule.get("properties", {})
    if missing := [name for name in rule.get("required", ()) if name not in value]:
        yield f"{_place(where)} lacks {', '.join(missing)}"
    for name, item in value.items():
        inside = f"{where}.{name}" if where else str(name)
        if name in known:
            yield from _problems(item, known[name], inside)
        elif rule.get("additionalProperties") is False:
            yield f"{_place(inside)} has no meaning here"


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, KINDS[kind])  # type: ignore[arg-type]


def _name_of(item: Any, index: int) -> str:
    """An entry is called by its id, anything else by its place."""
    name = item.get("id") if isinstance(item, dict) else None
    return name if isinstance(name, str) else str(index)


def _place(where: str) -> str:
    return where or "it"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
