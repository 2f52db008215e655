"""Comparisons as tables for a terminal."""

from collections.abc import Iterator, Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxconv.bench.compare.measure import Comparison, Measurement

LABEL = len("auto → im2col_tiled")  # the longest label of a row


def tables(comparisons: Sequence[Comparison], width: int) -> Group:
    """A table for each convolution, the fastest algorithm first, for a console of ``width``.

    "▸" marks the algorithm that "auto" chose, by its own name.
    """
    return Group(*(part for comparison in comparisons for part in _table(comparison, width)))


def _table(comparison: Comparison, width: int) -> Iterator[Table | Text]:
    plan = comparison.plan
    groups, m, n, k = plan.spec.gemm
    product = f"{m}×{k} · {k}×{n}" + (f", {groups} times" if groups > 1 else "")
    for line, style in (
        (comparison.convolution.name, "bold"),
        (f"{plan.spec}", "dim"),
        (f"as a GEMM: {product}; {plan.spec.flops / 1e6:,.1f} MFLOP", "dim"),
        (f"auto chose {plan.algorithm}, since {plan.why}", "dim"),
    ):
        yield Text(line, style)

    wide = width >= 100
    gap = 2 if wide else 1
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
    table.add_column("", min_width=1)
    # Fixed, so that the refusals below line up with the rows.
    table.add_column("algorithm", min_width=LABEL, no_wrap=True)
    table.add_column("GEMMs × m×n×k", min_width=19 if wide else 1, justify="right")
    table.add_column("time", min_width=7, justify="right")
    table.add_column("× lax", min_width=5, justify="right")
    if wide:
        table.add_column("quartiles", min_width=9, justify="right")
    table.add_column("pairs", justify="right")
    if wide:
        table.add_column("compile", justify="right")
    table.add_column("workspace", min_width=9, justify="right")
    table.add_column("max error", justify="right")

    run = [row for row in comparison.measurements if row.reason is None]
    for row in sorted(run, key=lambda row: -row.ratio):
        chosen = row.name == plan.algorithm
        cells = [
            "▸" if chosen else "",
            comparison.label(row.name),
            "–" if row.gemm is None else "{} × {}×{}×{}".format(*row.gemm),
            _seconds(row.seconds),
            _ratio(row),
            _quartiles(row) if wide else None,
            f"{len(row.ratios)}" if row.ratios else "–",
            _seconds(row.compile_seconds) if wide else None,
            _bytes(row.workspace),
            f"{row.error:.1e}",
        ]
        style = "bold" if row.name == "auto" else "dim" if row.name == "lax" else ""
        table.add_row(*(cell for cell in cells if cell is not None), style=style)
    yield table
    for row in comparison.measurements:
        if row.reason is not None:
            line = f" {'':{gap}}{row.name:{LABEL}}{'':{gap}}not run: {row.reason}"
            yield Text(line, "dim", no_wrap=True, overflow="ellipsis")
    yield Text("")


def _ratio(row: Measurement) -> Text | str:
    if not row.ratios:
        return "1.00"
    style = "green" if row.ratio > 1.05 else "red" if row.ratio < 0.95 else ""
    return Text(f"{row.ratio:.2f}", style)


def _quartiles(row: Measurement) -> str:
    if len(row.ratios) < 2:
        return "–"
    return "{:.2f}–{:.2f}".format(*row.quartiles)


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"


def _bytes(count: int | None) -> str:
    if count is None:
        return "–"
    for unit, scale in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << scale:
            return f"{count / (1 << scale):.1f} {unit}"
    return f"{count} B"
