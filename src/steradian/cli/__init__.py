"""The command ``steradian``.

No module of this folder imports torch, ASE or Lightning at load (commands import what they need when they run), so
``steradian --help`` answers at once.
"""

from __future__ import annotations

import codecs
import sys
import unicodedata

import typer

from steradian.cli import attend, config, convert, dataset, demo, evaluate, inspect, md, precision, train
from steradian.config.text import printable

__all__ = ["app", "main"]

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130

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
app.command()(attend.attend)
app.command()(inspect.inspect)
app.command()(precision.precision)
app.command()(convert.convert)
app.command()(demo.demo)
app.add_typer(dataset.app, name="dataset")
app.add_typer(config.app, name="config")


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


PLAIN = {"Å": "A", "→": "->", "±": "+-", "×": "x", "α": "alpha", "σ": "sigma", "−": "-", "…": "...", "·": "."}


def write_in_any_encoding() -> None:
    """What the output's encoding lacks (cp1252, Latin-1, ASCII) is written in letters that it has, never an error."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        letters = error.object[error.start : error.end]
        bare = [unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() for letter in letters]
        return "".join(PLAIN.get(letter, near or "?") for letter, near in zip(letters, bare)), error.end

    codecs.register_error("steradian.plain", plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="steradian.plain")


def main() -> None:
    """Run the command line: mistakes become one clear line and exit code 2, Ctrl-C exit code 130."""
    write_in_any_encoding()
    if "--debug" in sys.argv[1:]:
        app()
        return
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except MemoryError as error:
        print(f"error: not enough memory ({printable(error)}): smaller batches, or a smaller model", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {printable(f'{where}{error.strerror or error}')}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
