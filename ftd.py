"""The command line: every command by its name, and what `ftd --help` shows, in this order.

A command parses, calls and prints; what it does is in `commands/`. Heavy imports happen inside the
commands, so that `--help` is immediate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from ftdpp.commands import about, comparing, datasets, looking, training, using
from ftdpp.commands.shared import guarded

COMMANDS: dict[str, Callable[..., None]] = {
    "train": training.train,
    "eval": using.evaluate,
    "pseudo": using.pseudo,
    "predict": using.predict,
    "convert": using.convert,
    "export": using.export,
    "compare": comparing.compare,
    "table": comparing.table,
    "report": looking.report,
    "show": looking.show,
    "clip": about.clip,
    "recipes": about.recipes,
    "bench": about.bench,
    "doctor": about.doctor,
}
DATA_COMMANDS: dict[str, Callable[..., None]] = {
    "check": datasets.check,
    "prepare": datasets.prepare,
    "synth": datasets.synth,
}

app = typer.Typer(
    name="ftd",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Camera + LiDAR semantic segmentation with few or no labels: FtD++, CrossMatch, CLIP2UDA, "
    "weakly supervised transfer.",
)
data = typer.Typer(
    no_args_is_help=True, help="Look at data sets, prepare them, or make the built-in street world."
)
for name, command in COMMANDS.items():
    app.command(name)(guarded(command))
for name, command in DATA_COMMANDS.items():
    data.command(name)(guarded(command))
app.add_typer(data, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"ftd {version('ftdpp')}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    words = sys.argv[1:]
    if "" in words:  # --out "$UNSET" would mean the current folder
        before = words[max(words.index("") - 1, 0)] or "ftd"
        print(
            f"ftd: the argument after {before} is empty; is a variable of the shell not set?",
            file=sys.stderr,
        )
        sys.exit(2)
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun: while it imports
        sys.exit(130)


if __name__ == "__main__":
    main()
