"""Pictures of the results of ``jaxconv compare`` and ``jaxconv bench``."""

import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from jaxconv.bench.compare import Comparison
from jaxconv.bench.measure import TITLES, Result

OTHER, AUTO, CHOSEN = "#c3c8d1", "#d9480f", "#f4a77c"
FASTER, SLOWER = "tab:blue", "tab:red"
LEGEND = """Bars: lax's time over the algorithm's, the two called in turn; median and quartiles.
Above 1 is faster than lax. Orange: auto, as jaxconv runs by default; pale: what it chose, by its
own name. = lax: it is lax's own program."""


def picture(photograph: np.ndarray, caption: str, comparisons: Sequence[Comparison]) -> Figure:
    """The photograph, and for each convolution its output above bars of the ratios to lax."""
    columns = min(4, 1 + len(comparisons))
    rows = -(-(1 + len(comparisons)) // columns)
    # No pyplot: its figures are global state, and it may want a display.
    figure = Figure(figsize=(4.5 * columns, 6.5 * rows), layout="constrained")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=(1, 0.6) * rows)
    above, below = (figure.add_subplot(grid[row, 0]) for row in (0, 1))
    _image(above, photograph, "jaxconv compare", caption)
    below.axis("off")
    below.text(0, 1, textwrap.fill(LEGEND, 48), va="top", linespacing=1.5)
    for i, comparison in enumerate(comparisons, 1):
        row, column = divmod(i, columns)
        above, below = (figure.add_subplot(grid[2 * row + k, column]) for k in (0, 1))
        out = comparison.output[0]
        h, w, channels = out.shape
        title, caption = comparison.convolution.layer.name, f"{h}×{w}, {channels} channels"
        if channels != 3:
            out, caption = np.linalg.norm(out, axis=-1), f"{caption}, their norm"
            out = out / max(float(np.quantile(out, 0.99)), 1e-9)
        _image(above, np.clip(out, 0, 1), title, caption)
        # lax itself has no bar.
        shown = [r for r in comparison.results if r.name != "lax"]
        labels = [" ".join(filter(None, (r.name, r.how, "= lax" * r.is_lax))) for r in shown]
        special = {"auto": AUTO, comparison.plan.algorithm: CHOSEN}
        colours = [special.get(result.name, OTHER) for result in shown]
        _bars(below, labels, [result.quartiles() for result in shown], colours)
    return figure


def _image(axes: Axes, pixels: np.ndarray, title: str, caption: str) -> None:
    axes.imshow(pixels, cmap="magma", interpolation="nearest")
    axes.set_title(title, loc="left", weight="bold")
    caption = "\n".join(textwrap.fill(line, 48) for line in caption.splitlines())
    axes.set_xlabel(caption, loc="left", parse_math=False)  # a file's name may have a $
    axes.set(xticks=[], yticks=[])


def _bars(axes: Axes, labels: Sequence[str], ratios: Sequence[Any], colours: Sequence[str]) -> None:
    """Horizontal bars starting at 1×, the first on top, with the interquartile range as a line."""
    low, median, high = np.reshape(ratios, (-1, 3)).T
    rows = np.arange(len(labels))
    axes.barh(rows, median - 1, left=1, color=colours)
    axes.hlines(rows, low, high, color="black", linewidth=0.8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.grid(axis="x", alpha=0.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(rows, labels, fontsize=8)
    axes.set_ylim(max(1, len(labels)) - 0.5, -0.5)


def problem(path: Path, photograph: Path | None) -> str | None:
    """Why the picture can't be written; None if it can."""
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        return f"the name of a picture ends in one of {', '.join(f'.{kind}' for kind in kinds)}"
    if photograph is not None and path.exists() and path.samefile(photograph):
        return "it is the photograph; name another --output"
    return unwritable(path)


def unwritable(path: Path) -> str | None:
    """Why a file can't be written; None if it can."""
    try:
        if path.exists():
            path.open("r+b").close()
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def ratios(results: Sequence[Result]) -> Figure:
    """A bar for each result and peer: jaxconv's speed over the peer's."""
    peers = [peer for peer in TITLES if any(getattr(r, peer) for r in results)]
    figure = Figure(figsize=(6 + 4 * len(peers), 1.5 + 0.22 * len(results)), layout="constrained")
    panels = figure.subplots(1, len(peers), sharey=True, squeeze=False)[0]
    labels = [r.label if r.direction else f"{r.name}, {r.how}" for r in results]
    for panel, peer in zip(panels, peers, strict=True):
        bars = [r.quartiles(peer) if getattr(r, peer) else (np.nan,) * 3 for r in results]
        _bars(panel, labels, bars, [SLOWER if ratio < 0.95 else FASTER for _, ratio, _ in bars])
        panel.set_title(f"times as fast as {TITLES[peer]}")
    return figure
