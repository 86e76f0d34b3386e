"""One table, shown in a terminal, as plain text or in an HTML page."""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

import rich.box
import rich.table
import rich.text

__all__ = ["Table", "format_number", "format_percent", "plain"]


def plain(text: str) -> str:
    """Text from files and command lines with its control characters spelled out: no terminal obeys them."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def format_number(value: float, digits: int = 3) -> str:
    """A number with this many significant digits, without an exponent between 1e-4 and 1e6; "–" for NaN."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -5 < exponent < 6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:.{max(0, digits - 1 - exponent)}f}".replace("-", "−")


def format_percent(fraction: float) -> str:
    """A signed percentage with one decimal; "–" for NaN."""
    if not math.isfinite(fraction):
        return "–"
    return f"{100 * fraction:+.1f} %".replace("-", "−")


@dataclass(frozen=True)
class Table:
    """Text cells under column heads; the first ``num_labels`` columns are left-aligned, the others right-aligned.

    Attributes:
        title: one line above the table.
        columns: heads.
        rows: cells, as many as there are columns.
        num_labels: leading columns that hold words.
        heads: indices of rows that name what the rows below belong to.
        faint: indices of rows that are printed less strongly (intervals).
        note: a line below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_labels: int = 1
    heads: frozenset[int] = field(default_factory=frozenset)
    faint: frozenset[int] = field(default_factory=frozenset)
    note: str = ""

    def rich(self) -> rich.table.Table:
        """For ``rich.print``."""
        table = rich.table.Table(
            title=rich.text.Text(plain(self.title)),
            title_justify="left",
            title_style="bold",
            box=rich.box.SIMPLE_HEAD,
            caption=rich.text.Text(plain(self.note)) if self.note else None,
            caption_justify="left",
            pad_edge=False,
        )
        for index, column in enumerate(self.columns):
            words = index < self.num_labels
            # A narrow terminal wraps cells, it never cuts one.
            table.add_column(rich.text.Text(column), justify="left" if words else "right", overflow="fold")
        for index, row in enumerate(self.rows):
            cells = [rich.text.Text(plain(cell)) for cell in row]  # Text: brackets in labels are no markup
            table.add_row(*cells, style={"head": "bold", "faint": "dim"}.get(self._kind(index)))
        return table

    def _kind(self, index: int) -> str:
        return "head" if index in self.heads else ("faint" if index in self.faint else "")

    def text(self) -> str:
        """Aligned plain text, ending with a line break."""
        lines = [list(self.columns), *[[plain(cell) for cell in row] for row in self.rows]]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]

        def aligned(line: list[str]) -> str:
            cells = [
                cell.ljust(width) if column < self.num_labels else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths))
            ]
            return "  ".join(cells).rstrip()

        ruler = "  ".join("-" * width for width in widths)
        body = [plain(self.title), "", aligned(lines[0]), ruler, *map(aligned, lines[1:])]
        note = textwrap.wrap(plain(self.note), max(len(ruler), 60))
        return "\n".join([*body, *(["", *note] if note else [])]) + "\n"

    def html(self) -> str:
        """A ``<figure>`` with the table and its caption."""

        def cells(tag: str, values: Sequence[str]) -> str:
            kinds = ["" if column < self.num_labels else ' class="n"' for column in range(len(values))]
            return "".join(f"<{tag}{kind}>{html.escape(value.strip())}</{tag}>" for kind, value in zip(kinds, values))

        rows = [
            f'<tr class="{kind}">{cells("td", row)}</tr>' if kind else f"<tr>{cells('td', row)}</tr>"
            for kind, row in ((self._kind(index), row) for index, row in enumerate(self.rows))
        ]
        note = f'<p class="note">{html.escape(self.note)}</p>' if self.note else ""
        return (
            f'<figure class="table"><figcaption>{html.escape(self.title)}</figcaption>'
            f"<table><thead><tr>{cells('th', self.columns)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
            f"{note}</figure>"
        )
