"""Tables of text: in columns for a terminal, in HTML for a notebook."""

import dataclasses
import html
import math
from collections.abc import Collection, Sequence

Rows = Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Table:
    """The contents of a report.

    Attributes:
      above, below: lines of text.
      rows: the first is the header; empty for text only.
      right: indices of the right-aligned columns, those of figures.
      bold: indices of the rows in bold in a notebook.
    """

    above: Sequence[str]
    rows: Rows
    right: Collection[int] = ()
    bold: Collection[int] = ()
    below: Sequence[str] = ()


class Report:
    """A value that is displayed as a table, in a terminal or a notebook."""

    def _table(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        table = self._table()
        rows = [as_text(table.rows, table.right)] if table.rows else []
        return "\n".join([*table.above, *rows, *table.below])

    def _repr_html_(self) -> str:
        table = self._table()
        above, below = (
            f"<p>{'<br>'.join(map(html.escape, lines))}</p>" if lines else ""
            for lines in (table.above, table.below)
        )
        return above + (as_html(table.rows, table.bold) if table.rows else "") + below


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"


def factor(sigma: float) -> str:
    """A standard deviation of a logarithm as a factor."""
    return f"×/÷ {math.exp(sigma):.1f}"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def as_text(rows: Rows, right: Collection[int]) -> str:
    """A line for each row; the columns with indices in ``right`` are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def as_html(rows: Rows, bold: Collection[int]) -> str:
    """An HTML table; the first row is its header, rows with indices in ``bold`` are bold."""
    lines = []
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        style = " style='font-weight: bold'" if i in bold else ""
        cells = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr{style}>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"
