"""`finetune checkpoints`: public checkpoints by name, and the folder of downloads."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import LocalPath, license_option, network_file, offline_option
from finetune.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from finetune.hub.catalog import Entry

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.group("checkpoints", short_help="Find, download and verify public checkpoints by name.")
def command() -> None:
    """Find, download and verify public checkpoints by name.

    Every command that takes a network accepts these names and URLs. The catalog lists published facts about
    each checkpoint; $FINETUNE_CATALOG adds a catalog of your own. Files are kept in the cache folder, which
    $FINETUNE_CACHE sets. Each checkpoint has its own license.
    """


def show_entries(entries: list[Entry], as_json: bool) -> None:
    from finetune.cli import checkpoint_tables as tables

    if as_json:
        click.echo(json.dumps([tables.as_values(entry) for entry in entries], indent=2, ensure_ascii=False))
    elif entries:
        tables.print_table(entries)


@command.command("list", short_help="List the checkpoints that can be opened.")
@click.option("--all", "everything", is_flag=True, help="Also list unsupported and metric networks.")
@click.option("--here", is_flag=True, help="Only list files on this machine.")
@json_option
def list_command(everything: bool, here: bool, as_json: bool) -> None:
    """List the checkpoints of the catalog: resolution, architecture, images, license, size, and whether
    they are on this machine."""
    from finetune.hub import catalog, store

    entries = [
        entry
        for entry in catalog.entries().values()
        if (everything or entry.architecture in catalog.OPENS)
        and (not here or store.place_of(entry).is_file())
    ]
    show_entries(entries, as_json)
    if not as_json:
        kept = sum(store.place_of(entry).is_file() for entry in entries)
        click.echo(f"\n{len(entries)} checkpoints, {kept} of them in {store.folder()}")


@command.command("search", short_help="Search the catalog by words.")
@click.argument("words", nargs=-1, required=True)
@json_option
def search_command(words: tuple[str, ...], as_json: bool) -> None:
    """List the entries that contain every word in name, architecture, resolution, images or license, like
    `search ffhq 256 stylegan3`."""
    from finetune.hub import catalog

    entries = catalog.search(words)
    show_entries(entries, as_json)
    if not entries and not as_json:
        click.echo(f"No entry matches {' and '.join(words)}. {catalog.suggestion('-'.join(words))}")


@command.command("show", short_help="Show everything known about one checkpoint.")
@click.argument("name")
@json_option
def show_command(name: str, as_json: bool) -> None:
    """Show everything that is published about a checkpoint, with sources."""
    from finetune.cli import checkpoint_tables as tables
    from finetune.hub import catalog

    entry = catalog.get(name)
    if as_json:
        click.echo(json.dumps(tables.as_values(entry), indent=2, ensure_ascii=False))
    else:
        click.echo(tables.as_text(entry))


@command.command("fetch", short_help="Download and verify checkpoints.")
@click.argument("names", nargs=-1, required=True, metavar="NAME|URL...")
@offline_option()
def fetch_command(names: tuple[str, ...]) -> None:
    """Download missing checkpoints and print their paths.

    An interrupted download is resumed, also by the next call. Size and hash are compared with the
    catalog; if it has none, the hash of the first download is recorded and must stay the same.
    """
    from finetune.hub import catalog, store
    from finetune.progress import download_bar
    from finetune.resolve import as_url

    wanted = [as_url(name) or catalog.get(name) for name in names]  # all names are known before the first
    for item in wanted:
        fetch: Any = store.fetch_url if isinstance(item, str) else store.fetch_entry
        with download_bar() as (on_message, progress):
            path = fetch(item, on_message=on_message, progress=progress)
        click.echo(path)


@command.command("verify", short_help="Verify the hashes of downloaded files.")
@click.argument("names", nargs=-1, metavar="[NAME|URL]...")
@json_option
def verify_command(names: tuple[str, ...], as_json: bool) -> None:
    """Hash all downloaded files, or those named, and compare them with the catalog and the first download."""
    from finetune.hub import store

    verdicts = [store.verify(path) for path in ([place(name) for name in names] or store.kept_files())]
    if as_json:
        values = [{**vars(verdict), "path": str(verdict.path)} for verdict in verdicts]
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        for verdict in verdicts:
            click.echo(f"{verdict.state:<9}{verdict.name}: {verdict.why}")
        if not verdicts:
            click.echo(f"{store.folder()} has no checkpoints.")
    bad = [verdict for verdict in verdicts if verdict.state != "ok"]
    if bad:
        raise CheckpointError(
            f"{len(bad)} of {len(verdicts)} files are changed or missing: "
            + ", ".join(str(verdict.path) for verdict in bad),
            hint="`finetune checkpoints fetch` downloads missing files."
            if all(verdict.state == "missing" for verdict in bad)
            else "Delete changed files; `finetune checkpoints fetch` downloads them again.",
        )


def place(name: str) -> Path:
    """Return the path of a name or URL, whether the file exists or not."""
    from finetune.hub import catalog, store
    from finetune.resolve import as_url

    if url := as_url(name):
        entry = catalog.find_url(url)
        return store.place_of(entry) if entry else store.place_of_url(url)
    return store.place_of(catalog.get(name))


@command.command("where", short_help="Print the path of a file or of the folder.")
@click.argument("name", required=False, metavar="[NAME|URL]")
def where_command(name: str | None) -> None:
    """Print the path of a downloaded checkpoint, or of the folder of all, for use in scripts."""
    from finetune.hub import store

    if name is None:
        click.echo(store.folder())
        return
    path = place(name)
    if not path.is_file():
        hint = f"To get it: finetune checkpoints fetch {shlex.quote(name)}"
        raise CheckpointError(f"{name} is not on this machine.", hint=hint)
    click.echo(path)


@command.command("add-file", short_help="Add a file that you downloaded yourself.")
@click.argument("file", type=LocalPath(path_type=Path))
@click.option("--name", metavar="NAME", help="Its name, if neither hash nor file name identifies it.")
@license_option(help="Its license, if the catalog states none.")
def add_file_command(file: Path, name: str | None, license: str | None) -> None:
    """Copy FILE, a checkpoint of the catalog that you downloaded yourself, into the cache folder.

    Its size, hash, architecture, resolution and classes must match the catalog, if it states them.
    """
    from finetune.hub import catalog, contribute, download, identify, store
    from finetune.resolve import facts_of

    if not file.is_file():
        raise CheckpointError(f"{file} is not a file", hint="Pass the checkpoint that you downloaded.")
    if name is not None:
        entry = catalog.get(name)
    else:
        digest, size = download.identity(file)
        of_name = identify.entries_of_name(file.name, size)
        found = identify.entry_of_hash(digest) or (of_name[0] if len(of_name) == 1 else None)
        if found is None:
            several = (
                f"may be {' or '.join(entry.id for entry in of_name)}" if of_name else "is not recognized"
            )
            raise CheckpointError(
                f"{file} {several}", hint=f"Name it with --name. {catalog.suggestion(file.stem)}"
            )
        entry = found
    if license and entry.licence is not None:
        known = f"{entry.id} already has a license ({entry.licence})"
        raise ConfigError(f"--license {license}: {known}. Omit the option.")
    if entry.kind == "checkpoint":
        contribute.check_fits(file, entry, facts_of(file))
    click.echo(f"{entry.id}: {store.add_file(file, entry, license=license)}")
    if not license:
        click.echo(store.license_line(entry))


@command.command("add", short_help="Create a catalog entry from a URL.")
@click.argument("url")
@click.option(
    "--into",
    type=LocalPath(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Catalog to write the entry to.  [default: print it]",
)
@click.option("--name", "id", metavar="NAME", help="Its name.  [default: that of the file]")
@click.option("--alias", "aliases", multiple=True, metavar="NAME", help="A shorter name; may be repeated.")
@click.option("--data", "dataset", metavar="TEXT", help="Images that it was trained on.")
@license_option(help="Its license, as the publisher states it.")
@license_option("--license-page", metavar="URL", help="Page that states the license.")
@click.option("--source", "sources", multiple=True, metavar="TEXT", help="Source of these facts.")
@click.option("--config", metavar="TEXT", help="Name of its published configuration.")
@click.option("--gamma", type=click.FloatRange(min=0), help="R1 weight of its training.")
@click.option("--batch", type=click.IntRange(min=1), help="Batch size of its training.")
@click.option("--kimg", type=click.FloatRange(min=0), help="Length of its training in thousands of images.")
@click.option("--notes", metavar="TEXT", help="Notes.")
@offline_option()
def add_command(url: str, into: Path | None, **given: Any) -> None:
    """Download the checkpoint at URL, open it safely, and print its entry for checkpoints.json.

    Architecture, resolution, classes, size and hash come from the file, the rest from the options;
    everything else stays empty. For a URL of the catalog, its entry is completed.
    """
    from finetune.hub import catalog, contribute
    from finetune.resolve import as_url, facts_of

    address = as_url(url)
    if address is None:
        raise ConfigError(f"{url}: not a URL. Pass one that begins with https://.")
    if given["license_page"] and not given["license"]:
        raise ConfigError("--license-page: the license itself is missing. Set it with --license.")
    trained = {name: value for name in ("gamma", "batch", "kimg") if (value := given.pop(name)) is not None}
    page, license = given.pop("license_page"), given.pop("license")
    given["licence"] = catalog.License(license, page) if license else None
    given["published"] = {"trained": trained} if trained else None
    entry = contribute.new_entry(address, facts_of(network_file(address)), **given)
    if into is None:
        click.echo(catalog.entry_text(entry.to_json()))
        return
    contribute.write_into(into, entry)
    click.echo(f"{entry.id}: {entry.architecture}, {entry.resolution} px, written into {into}")
