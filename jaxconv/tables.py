"""Tables of text: in columns that fit a terminal, in HTML for a notebook."""

import dataclasses
import html
import itertools
import math
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence

# Columns of text are narrowed to the first of these before a column is dropped, then to the second.
NARROW, NARROWEST = 24, 8
GAP, INDENT = "  ", "    "


def terminal_width() -> int:
    """Columns of the terminal, or the variable COLUMNS; 80 in a pipe, a file or a notebook."""
    return shutil.get_terminal_size().columns


@dataclasses.dataclass(frozen=True)
class Table:
    """The contents of a report. Columns without a value are not shown."""

    above: Sequence[str] = ()  # lines of text
    rows: Sequence[Sequence[str]] = ()  # the first is the header; empty for text only
    right: Collection[int] = ()  # the right-aligned columns, those of figures: never broken
    bold: Collection[int] = ()  # the rows in bold in a notebook
    below: Sequence[str] = ()  # lines of text
    spare: Sequence[int] = ()  # columns to drop where there is no room, the least important first
    detail: bool = False  # whether the last column may go below its row, where there is no room
    rest: str = "a wider terminal has all"  # where to see all columns

    @property
    def columns(self) -> dict[int, tuple[str, ...]]:
        """The cells of each column that has a value, or of all where there is only the header."""
        columns = dict(enumerate(zip(*self.rows, strict=True)))
        return {i: c for i, c in columns.items() if {*c[1:]} - {"", "–"}} or columns

    def fitted(self, width: int) -> tuple[dict[int, int], int | None]:
        """The widths of the columns side by side, and the column below them, if any."""
        sizes = {i: max(map(len, column)) for i, column in self.columns.items()}
        last = max(sizes) if self.detail and _total(sizes) > width else None
        if last is not None:
            del sizes[last]
        texts = [i for i in sizes if i not in self.right]
        for i in self.spare:
            if _total(sizes | {j: min(sizes[j], NARROW) for j in texts if j in sizes}) > width:
                sizes.pop(i, None)
        while _total(sizes) > width and (wide := [i for i in texts if sizes.get(i, 0) > NARROWEST]):
            sizes[max(wide, key=lambda i: sizes[i])] -= 1
        return sizes, last

    def text(self, width: int | None = None) -> str:
        """The table in lines of at most ``width``; of any length if None."""
        limit = width or sys.maxsize
        sizes, last = self.fitted(limit)
        lines = list(_wrapped(self.above, limit))
        for row in self.rows:
            cells = [textwrap.wrap(row[i], size) for i, size in sizes.items()]
            for parts in itertools.zip_longest(*cells, fillvalue=""):
                sides = (">" if i in self.right else "<" for i in sizes)
                padded = map("{:{}{}}".format, parts, sides, sizes.values())
                lines.append(GAP.join(padded).rstrip())
            if last is not None:
                lines += textwrap.wrap(
                    row[last], limit, initial_indent=INDENT, subsequent_indent=INDENT
                )
        left_out = [self.rows[0][i] for i in self.columns if i not in (*sizes, last)]
        note = f"Left out to fit {width} columns: {', '.join(left_out)}; {self.rest}."
        below = [*self.below, note] if left_out else self.below
        return "\n".join([*lines, *_wrapped(below, limit)])

    def __str__(self) -> str:
        """The table, no wider than the terminal."""
        return self.text(terminal_width())

    def html(self) -> str:
        """The table with all columns; its header is the first row."""
        above, below = ("<br>".join(map(html.escape, x)) for x in (self.above, self.below))
        body = ""
        for i, row in enumerate(self.rows):
            tag, bold = "td" if i else "th", " style='font-weight: bold'" * (i in self.bold)
            cells = "".join(f"<{tag}>{html.escape(row[c])}</{tag}>" for c in self.columns)
            body += f"<tr{bold}>{cells}</tr>"
        parts = (above, "p"), (body, "table"), (below, "p")
        return "".join(f"<{tag}>{text}</{tag}>" for text, tag in parts if text)


class Report:
    """A value that is displayed as a table, in a terminal or a notebook."""

    def _contents(self) -> Table:
        raise NotImplementedError

    def table(self, width: int | None = None) -> str:
        """The table in lines of at most ``width``; by default all columns, as wide as they are."""
        rest = "a wider terminal has all, or .table()"
        return dataclasses.replace(self._contents(), rest=rest).text(width)

    def __repr__(self) -> str:
        return self.table(terminal_width())

    def _repr_html_(self) -> str:
        return self._contents().html()


def milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:,.3f} ms"


def factor(sigma: float) -> str:
    """A standard deviation of a logarithm as a factor."""
    return f"×/÷ {math.exp(sigma):.1f}"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _total(sizes: dict[int, int]) -> int:
    return sum(sizes.values()) + len(GAP) * (len(sizes) - 1)


def _wrapped(lines: Sequence[str], width: int) -> Iterator[str]:
    """Lines of text, further lines indented. A file's name stays whole, to be copied."""
    for line in lines:
        lead = line[: len(line) - len(line.lstrip())] + GAP
        yield from textwrap.wrap(
            line, width, subsequent_indent=lead, break_long_words=False, break_on_hyphens=False
        ) or [""]
