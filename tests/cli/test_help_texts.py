"""docs/help holds what `--help` prints. Write it again with: python tests/cli/test_help_texts.py"""

from pathlib import Path

import click
import pytest

from finetune.cli import COMMANDS, cli

FOLDER = Path(__file__).parents[2] / "docs" / "help"


def help_texts() -> dict[str, str]:
    """File name -> help text, 100 columns wide whatever the terminal."""
    texts = {"finetune.txt": text_of(cli, "finetune", None)}
    parent = click.Context(cli, info_name="finetune", **cli.context_settings)
    for name in COMMANDS:
        command = cli.get_command(parent, name)
        texts[f"{name}.txt"] = text_of(command, name, parent)
        if isinstance(command, click.Group):
            inner = click.Context(command, info_name=name, parent=parent)
            for each in command.commands.values():
                texts[f"{name}.txt"] += f"\n{text_of(each, each.name, inner)}"
    return texts


def text_of(command: click.Command, name: str | None, parent: click.Context | None) -> str:
    settings = {**command.context_settings, "terminal_width": 100, "max_content_width": 100}
    return command.get_help(click.Context(command, info_name=name, parent=parent, **settings)) + "\n"


def words(text: str) -> list[str]:
    """What the text says; versions of click differ in how they break lines."""
    return text.split()


@pytest.mark.parametrize("name", help_texts())
def test_help_texts_are_current(name):
    again = "write it again with: python tests/cli/test_help_texts.py"
    assert (FOLDER / name).is_file(), again
    assert words((FOLDER / name).read_text(encoding="utf-8")) == words(help_texts()[name]), again


def test_help_texts_have_commands():
    assert {path.name for path in FOLDER.iterdir()} == set(help_texts())


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in help_texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
