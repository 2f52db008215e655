"""Tables of text: in columns that fit a terminal, in HTML for a notebook."""

import dataclasses
import html
import math
import re
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence

Rows = Sequence[Sequence[str]]
Widths = dict[int, int]

# Columns of text that are too wide are narrowed to this; the details need more beside the others,
# else they go below their rows.
LEAST, ROOM = 24, 40
BETWEEN, INDENT = "  ", "    "
EMPTY = {"", "–"}
# Spaces where it may not: in a tuple, and before a unit.
GLUE = re.compile(r"(?<=\d,) (?=\d)|(?<=\d) (?=ms|MiB|GiB|MFLOP|×/÷)|(?<=÷) (?=\d)")
# Where text may be broken: between words, and in paths and shapes.
WORDS = re.compile(r"\s+|(?<=[,/×])")


def terminal_width() -> int:
    """Columns of the terminal, or the variable COLUMNS; in a pipe, a file or a notebook 80, as of
    ``shutil.get_terminal_size`` and rich."""
    return shutil.get_terminal_size().columns


@dataclasses.dataclass(frozen=True)
class Table:
    """The contents of a report. Columns without a value are not shown.

    Attributes:
      above, below: lines of text.
      rows: the first is the header; empty for text only.
      right: indices of the right-aligned columns, those of figures: they are never broken.
      bold: indices of the rows in bold in a notebook.
      spare: indices of the columns to leave out where there is no room, the least important first.
      detail: whether the last column is long text, which may go below its row.
      rest: where all columns are, for a reader of some.
    """

    above: Sequence[str] = ()
    rows: Rows = ()
    right: Collection[int] = ()
    bold: Collection[int] = ()
    below: Sequence[str] = ()
    spare: Sequence[int] = ()
    detail: bool = False
    rest: str = "a wider terminal has all"

    @property
    def columns(self) -> dict[int, tuple[str, ...]]:
        """The cells of each column that has a value, or of all where there is only the header."""
        columns = dict(enumerate(zip(*self.rows, strict=True)))
        return {i: c for i, c in columns.items() if {*c[1:]} - EMPTY} or columns

    def text(self, width: int | None = None) -> str:
        """The table in lines of at most ``width``; of any length if None."""
        limit = math.inf if width is None else width
        above, below, body = list(self.above), list(self.below), []
        if self.rows:
            widths, beneath = _fitted(self, limit)
            left_out = [self.rows[0][i] for i in self.columns if i not in (*widths, beneath)]
            if left_out:
                missing = ", ".join(left_out)
                below.append(f"Left out to fit {width} columns: {missing}; {self.rest}.")
            for row in self.rows:
                body += _row(row, widths, self.right)
                if beneath is not None:
                    body += [INDENT + line for line in _lines(row[beneath], limit - len(INDENT))]
        above, below = (
            [part for x in text for part in _wrapped(x, limit)] for text in (above, below)
        )
        return "\n".join([*above, *body, *below])

    def html(self) -> str:
        """The table with all columns; its header is the first row."""
        above, below = (
            f"<p>{'<br>'.join(map(html.escape, lines))}</p>" if lines else ""
            for lines in (self.above, self.below)
        )
        lines = []
        for i, row in enumerate(self.rows):
            tag = "td" if i else "th"
            style = " style='font-weight: bold'" if i in self.bold else ""
            cells = "".join(f"<{tag}>{html.escape(row[c])}</{tag}>" for c in self.columns)
            lines.append(f"<tr{style}>{cells}</tr>")
        return above + (f"<table>{''.join(lines)}</table>" if lines else "") + below


class Report:
    """A value that is displayed as a table, in a terminal or a notebook."""

    def _contents(self) -> Table:
        raise NotImplementedError

    def table(self, width: int | None = None) -> str:
        """The table as text, in lines of at most ``width``; by default with all columns, as wide as
        they are. ``print`` fits it to the terminal."""
        rest = "a wider terminal has all, or .table()"
        return dataclasses.replace(self._contents(), rest=rest).text(width)

    def __repr__(self) -> str:
        return self.table(terminal_width())

    def _repr_html_(self) -> str:
        return self._contents().html()


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f} ms"


def factor(sigma: float) -> str:
    """A standard deviation of a logarithm as a factor."""
    return f"×/÷ {math.exp(sigma):.1f}"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _fitted(table: Table, limit: float) -> tuple[Widths, int | None]:
    """The widths of the columns that are shown side by side, and the column below them, if any."""
    columns = table.columns
    widths = {i: max(map(len, column)) for i, column in columns.items()}
    if _total(widths) <= limit:
        return widths, None
    least = {i: _least(column, i in table.right) for i, column in columns.items()}
    last = len(table.rows[0]) - 1 if table.detail else None
    if last in columns:
        beside = _narrowed(widths, least | {last: ROOM}, limit)
        if beside is not None:
            return beside, None
        del widths[last]
    shown = {i: size for i, size in widths.items() if i not in table.spare}
    for spare in reversed(table.spare):
        if spare in widths:
            more = {i: widths[i] for i in sorted((*shown, spare))}
            shown = more if _narrowed(more, least, limit) else shown
    broken = {i: size if i in table.right else 1 for i, size in least.items()}
    return _narrowed(shown, least, limit) or _narrowed(shown, broken, limit) or shown, last


def _least(column: Sequence[str], figures: bool) -> int:
    """The width that a column may be narrowed to: of figures, only the title is broken."""
    title, *cells = column
    if figures:
        return max(map(len, [*title.split(), *cells]))
    return max(map(len, [" " * LEAST, *(word for cell in column for word in WORDS.split(cell))]))


def _narrowed(widths: Widths, least: Mapping[int, int], limit: float) -> Widths | None:
    """``widths`` with the widest narrowed, down to ``least``, until all fit; None if they don't."""
    widths = dict(widths)
    while _total(widths) > limit:
        narrowable = [i for i, size in widths.items() if size > least[i]]
        if not narrowable:
            return None
        widths[max(narrowable, key=lambda i: widths[i])] -= 1
    return widths


def _total(widths: Widths) -> int:
    return sum(widths.values()) + len(BETWEEN) * (len(widths) - 1)


def _row(row: Sequence[str], widths: Widths, right: Collection[int]) -> list[str]:
    """The lines of a row: as many as its longest cell takes."""
    cells = {i: _lines(row[i], width) for i, width in widths.items()}
    lines = []
    for at in range(max(map(len, cells.values()))):
        parts = ((i, lines[at] if at < len(lines) else "") for i, lines in cells.items())
        padded = (x.rjust(widths[i]) if i in right else x.ljust(widths[i]) for i, x in parts)
        lines.append(BETWEEN.join(padded).rstrip())
    return lines


class _Words(textwrap.TextWrapper):
    """Breaks a word: paths and shapes where ``WORDS`` says, others anywhere."""

    wordsep_re = re.compile(f"({WORDS.pattern})")


def _between_words(text: str, width: float) -> list[str]:
    """``text`` in lines of ``width``, but for longer words, which stay whole."""
    words = textwrap.TextWrapper(max(int(width), 1), break_long_words=False, break_on_hyphens=False)
    glued = words.wrap(GLUE.sub("\N{NO-BREAK SPACE}", text))
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in glued]


def _lines(text: str, width: float) -> list[str]:
    """The lines of a cell; none where it is empty."""
    if len(text) <= width:
        return [text] if text else []
    within = _Words(max(int(width), 1))
    return [
        part
        for line in _between_words(text, width)
        for part in (within.wrap(line) if len(line) > width else [line])
    ]


def _wrapped(line: str, width: float) -> list[str]:
    """The lines of a line of text: all but the first are indented further. A file's name, as any
    word, stays whole, to be copied."""
    if len(line) <= width:
        return [line]
    lead = line[: len(line) - len(line.lstrip())]
    first, *rest = _between_words(line.strip(), width - len(lead) - len(BETWEEN))
    return [lead + first, *(lead + BETWEEN + more for more in rest)]
