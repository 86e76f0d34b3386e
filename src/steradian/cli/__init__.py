"""The command ``steradian``.

No module of this folder imports torch, NumPy or ASE at load (commands import what they need when they run), so
``steradian --help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys

import typer

from steradian.cli import attend, config, convert, dataset, demo, evaluate, inspect, lammps, md, modes, precision, train
from steradian.cli.common import Stopped, plain, speak_any_encoding, stop_on_signals

__all__ = ["app", "main"]

EXIT_MISTAKE = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Machine-learned force fields with geometric attention.",
    epilog="Start with: steradian demo, or: steradian train --data my.xyz",
)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(evaluate.compare)
app.command()(md.md)
app.command()(modes.modes)
app.command()(attend.attend)
app.command()(inspect.inspect)
app.command()(precision.precision)
app.command()(convert.convert)
app.command()(demo.demo)
app.add_typer(dataset.app, name="dataset")
app.add_typer(config.app, name="config")
app.add_typer(lammps.app, name="lammps")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"steradian {version('steradian')}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_print_version, is_eager=True),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Machine-learned force fields with geometric attention."""


def main() -> None:
    """Run the command line: mistakes become one clear line and exit code 2, Ctrl-C and signals 128 + their number."""
    speak_any_encoding()
    stop_on_signals()
    if "--debug" in sys.argv[1:]:
        app()
        return
    try:
        app()
    except (KeyboardInterrupt, SystemExit):
        if Stopped.last is None:
            raise
        print(f"stopped by {signal.Signals(Stopped.last).name}", file=sys.stderr)
        sys.exit(128 + Stopped.last)
    except BrokenPipeError:  # whoever read the output has gone (steradian ... | head); nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except (ValueError, ImportError) as error:
        print(f"error: {plain(str(error))}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {plain(f'{where}{error.strerror or error}')}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
