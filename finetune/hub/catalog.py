"""Read the catalog of public networks, `checkpoints.json`, which states only what is published about each.

$FINETUNE_CATALOG may name another file in the same format, for networks of your own; its names take
precedence.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from finetune.errors import CheckpointError, ConfigError
from torch_utils.files import expand_home

NAME = "checkpoints.json"
VARIABLE = "FINETUNE_CATALOG"
VERSION = 1
REINSTALL = "Install this package again, or restore the file in the checkout."
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
OPENS = ("stylegan2", "stylegan3-t", "stylegan3-r")  # the architectures that can be loaded


@dataclass(frozen=True, slots=True)
class License:
    """A license as its publisher states it; `remark` names the publisher if it is not the obvious one."""

    name: str
    page: str | None = None
    remark: str | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.page}" if self.page else self.name


@dataclass(frozen=True, slots=True)
class Entry:
    """One network, with the fields of `checkpoints.schema.json`; None if something is not published."""

    id: str
    urls: tuple[str, ...]
    architecture: str
    kind: str = "checkpoint"
    aliases: tuple[str, ...] = ()
    format: str | None = None
    config: str | None = None
    resolution: int | None = None
    classes: int | None = None
    dataset: str | None = None
    licence: License | None = None
    size: int | None = None
    size_about: str | None = None
    sha256: str | None = None
    sha256_from: str | None = None
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inferred: tuple[str, ...] = ()
    notes: str | None = None
    sources: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Entry:
        """Return the entry that `values`, checked JSON, describe."""
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        given["licence"] = License(**given["licence"]) if given.get("licence") else None
        given["published"] = given.get("published") or {}
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Return plain values, in the order of `FIELDS`."""
        values = {name: getattr(self, name) for name in FIELDS}
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        values["published"] = {key: dict(value) for key, value in self.published.items()} or None
        if self.licence is not None:
            stated = dataclasses.asdict(self.licence)
            values["licence"] = {
                key: value for key, value in stated.items() if key != "remark" or value is not None
            }
        return values

    @property
    def file_name(self) -> str:
        """The name of the file at its first URL."""
        return file_name_of(self.urls[0])

    @property
    def short_name(self) -> str:
        """The id or the first alias, whichever is shorter."""
        return min((self.id, *self.aliases[:1]), key=len)


def file_name_of(url: str) -> str:
    """Return the last part of the path of a URL, or of the path that its query names."""
    parts = urlsplit(url)
    named = next((part[5:] for part in parts.query.split("&") if part.startswith("path=")), parts.path)
    return PurePosixPath(unquote(named)).name or parts.netloc


# What a value must be, as a test and in words. `checkpoints.schema.json` states the same for editors.
Check = tuple[Callable[[Any], bool], str]


def _text(pattern: str, words: str) -> Check:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, words


def _number(minimum: float, *, whole: bool = False) -> Check:
    def is_one(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and value >= minimum and (not whole or float(value).is_integer())

    return is_one, f"a {'whole ' if whole else ''}number of at least {minimum:g}"


def _choice(*values: str) -> Check:
    return lambda value: value in values, f"one of {', '.join(values)}"


def _list(minimum: int, check: Check) -> Check:
    def is_one(value: Any) -> bool:
        return isinstance(value, list) and len(value) >= minimum and all(map(check[0], value))

    return is_one, f"a list{' of at least one item' if minimum else ''}; each item is {check[1]}"


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check[0](value), f"{check[1]}, or null"


ID = _text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "a name of at most 100 letters, digits, '.', '_', '-'")
LINE = _text(r"(?!.{301})\S(.*\S)?", "a string of at most 300 characters without blanks around it")
COUNT, AMOUNT = _number(1, whole=True), _number(0)
SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("gamma", "kimg", "target", "lr", "glr", "dlr", "ema_kimg", "ramp"), AMOUNT),
    **dict.fromkeys(("pl_weight", "style_mixing_prob"), AMOUNT),
    **dict.fromkeys(("batch", "batch_gpu", "mbstd_group"), COUNT),
    "mirror": (lambda value: isinstance(value, bool), "true or false"),
    "aug": _choice("noaug", "ada", "fixed"),
    "start": ID,
}
PUBLISHED = dict.fromkeys(("trained", "finetune", "one_gpu"), SETTINGS)
FORMATS = ("pytorch-pickle", "tensorflow-pickle", "safetensors", "torchscript", "state-dict")
INFERRED = ("alternatives", "architecture", "classes", "config", "published", "resolution", "urls")
FIELDS: dict[str, Any] = {  # name -> a Check, or the fields of an object
    "id": ID,
    "aliases": _list(0, ID),
    "kind": _choice("checkpoint", "metric-network"),
    "urls": _list(1, _text(r"https?://[^\s/?#]+/\S+", "an http or https address")),
    "format": _or_null(_choice(*FORMATS)),
    "architecture": _choice("stylegan1", *OPENS, "inception-v3", "vgg16", "vgg16-lpips", "lpips-linear"),
    "config": _or_null(LINE),
    "resolution": _or_null(COUNT),
    "classes": _or_null(_number(0, whole=True)),
    "dataset": _or_null(LINE),
    "licence": {"name": LINE, "page": _or_null(_text(r"https://\S+", "an https address")), "remark": LINE},
    "size": _or_null(COUNT),
    "size_about": _or_null(LINE),
    "sha256": _or_null(_text(r"[0-9a-f]{64}", "64 hexadecimal digits in lower case")),
    "sha256_from": _or_null(LINE),
    "published": PUBLISHED,
    "inferred": _list(0, _choice(*INFERRED)),
    "notes": _or_null(_text(r"(?s).{0,500}", "a string of at most 500 characters")),
    "sources": _list(1, LINE),
}
CATALOG: dict[str, Any] = {
    "$schema": (lambda value: isinstance(value, str), "a string"),
    "version": (lambda value: value == VERSION and value is not True, str(VERSION)),
    "checkpoints": (lambda value: isinstance(value, list), "a list"),
}
OPTIONAL = {"$schema", "remark", *PUBLISHED, *SETTINGS}


def problems_of(content: Any) -> list[str]:
    """Return what is wrong with the JSON of a catalog, a sentence each."""
    problems = list(_problems(content, CATALOG))
    entries = content.get("checkpoints") if isinstance(content, dict) else None
    for index, entry in enumerate(entries if isinstance(entries, list) else []):
        name = entry.get("id", index) if isinstance(entry, dict) else index
        problems += [f"checkpoints[{name}]: {problem}" for problem in problems_of_entry(entry)]
    return problems


def problems_of_entry(entry: Any) -> list[str]:
    """Return what is wrong with the JSON of one entry, a sentence each."""
    return list(_problems(entry, FIELDS))


def _problems(values: Any, fields: Mapping[str, Any], where: str = "") -> Iterator[str]:
    if not isinstance(values, dict):
        yield f"{where.rstrip('.') or 'it'} is {_shown(values)} and must be an object"
        return
    yield from (f"{where}{name} is missing" for name in fields if name not in {*values, *OPTIONAL})
    for name, value in values.items():
        if name not in fields:
            yield f"{where}{name} is not a field of the catalog"
        elif isinstance(rule := fields[name], dict):
            if value is not None or name in PUBLISHED:
                yield from _problems(value, rule, f"{where}{name}.")
        elif not rule[0](value):
            yield f"{where}{name} is {_shown(value)} and must be {rule[1]}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


@functools.cache
def entries() -> dict[str, Entry]:
    """Return all entries by id, those of $FINETUNE_CATALOG first, since the first entry of a name is found.

    Raises ConfigError if that file is not a catalog, or if the catalog of this package is missing.
    """
    file = os.environ.get(VARIABLE, "").strip()
    own = read_catalog(expand_home(file)) if file else {}
    shipped = read_catalog(shipped_catalog(), check=False)
    return own | {id: entry for id, entry in shipped.items() if id not in own}


def shipped_catalog() -> Path:
    """Return the catalog of this package: in the checkout, or else among the installed files."""
    root = Path(__file__).resolve().parents[2]
    # A checkout, and what `pip install --target` makes.
    places = [root / NAME, root / "share" / "stylegan-finetune" / NAME]
    try:
        installed = importlib.metadata.files("stylegan-finetune") or []
    except importlib.metadata.PackageNotFoundError:
        installed = []
    places += [Path(str(file.locate())) for file in installed if file.name == NAME]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise ConfigError(f"{NAME}, the catalog of this package, is missing ({places[0]}).", hint=REINSTALL)
    return found


def read_catalog(path: Path, *, check: bool = True) -> dict[str, Entry]:
    """Return the entries of a file by id. Raises ConfigError, which lists all problems of the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: the catalog cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise ConfigError(f"{path}: the catalog is not JSON ({error}).") from None
    if check and (problems := problems_of(content)):
        raise ConfigError([f"{path}: {problem}." for problem in problems[:20]])
    found = [Entry.from_json(values) for values in content["checkpoints"]]
    if check and (problems := conflicts(found)):
        raise ConfigError([f"{path}: {problem}." for problem in problems])
    return {entry.id: entry for entry in found}


def conflicts(entries: Iterable[Entry]) -> list[str]:
    """Return the problems that a schema cannot find: names used twice, and plain http without a hash."""
    owners: dict[str, str] = {}
    problems = []
    for entry in entries:
        for name in (entry.id, *entry.aliases):
            if name.lower() in owners:
                problems.append(f"{name} is a name of {owners[name.lower()]} and of {entry.id}")
            owners[name.lower()] = entry.id
        problems += [
            f"{entry.id}: {url} is plain http without a sha256; add one, or use https"
            for url in entry.urls
            if url.startswith("http:") and entry.sha256 is None and urlsplit(url).hostname not in THIS_MACHINE
        ]
    return problems


def to_text(entries: Iterable[Entry]) -> str:
    """Return a catalog as JSON, one value per line."""
    content = ",\n".join(f"    {entry_text(entry.to_json(), indent=4)}" for entry in entries)
    return f'{{\n  "version": {VERSION},\n  "checkpoints": [\n{content}\n  ]\n}}\n'


def entry_text(values: Mapping[str, Any], indent: int = 0) -> str:
    """Return one entry as JSON, one value per line."""
    pad = " " * indent
    lines = (
        f"{pad}  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()
    )
    return "{\n" + ",\n".join(lines) + f"\n{pad}}}"


def find(name: str) -> Entry | None:
    """Return the entry with this id, alias or file name (if only one has that), None if there is none."""
    wanted = name.strip().lower()
    for entry in entries().values():
        if wanted in (entry.id.lower(), *(alias.lower() for alias in entry.aliases)):
            return entry
    same = [entry for entry in entries().values() if entry.file_name.lower() in (wanted, f"{wanted}.pkl")]
    return same[0] if len(same) == 1 else None


def get(name: str) -> Entry:
    """Return the entry that `find` does; raises CheckpointError, with similar names, if there is none."""
    entry = find(name)
    if entry is None:
        raise CheckpointError(f"{name} is not in the catalog", hint=suggestion(name))
    return entry


def find_url(url: str) -> Entry | None:
    """Return the entry whose file is at a URL, None if there is none."""
    return next((entry for entry in entries().values() if url in entry.urls), None)


def close_names(name: str) -> list[str]:
    """Return three names similar to `name` at most, most similar first, one per entry."""
    names: dict[str, str] = {}
    for entry in entries().values():
        names |= {text.lower(): entry.short_name for text in (entry.id, *entry.aliases)}
    wanted = name.strip().lower().removesuffix(".pkl")
    parts = set(wanted.replace("_", "-").split("-"))
    # Shared words count besides the similarity of letters: `stylegan2-ffhq-256` has another order.
    scores = {
        text: difflib.SequenceMatcher(None, wanted, text).ratio() + len(parts & set(text.split("-"))) / 3
        for text in names
    }
    best = [text for text in sorted(scores, key=lambda text: -scores[text]) if scores[text] >= 0.75]
    return list(dict.fromkeys(names[text] for text in best))[:3]


def suggestion(name: str) -> str:
    """Return what to do about a name that is not in the catalog."""
    close = close_names(name)
    ask = "`finetune checkpoints list` shows all names."
    return f"Did you mean {' or '.join(close)}? {ask}" if close else ask


def search(words: Iterable[str]) -> list[Entry]:
    """Return the entries in which every word occurs, or its singular, in any field."""
    wanted = [re.sub(r"(?<=\w{3})s$", "", word.lower()) for word in words]

    def text_of(entry: Entry) -> str:
        # A license may name the code base it was written for, which need not be the architecture.
        license = re.sub(r"stylegan\S*", "", str(entry.licence or "not stated").lower())
        values = (entry.id, *entry.aliases, entry.architecture, entry.config, entry.dataset, license)
        size = "" if entry.resolution is None else f"{entry.resolution} {entry.resolution}px"
        labels = "conditional classes" if entry.classes else ""
        return " ".join([*map(str, values), size, labels, entry.kind]).lower()

    return [entry for entry in entries().values() if all(word in text_of(entry) for word in wanted)]
