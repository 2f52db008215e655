"""Comparisons as a picture."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from jaxconv.bench.compare.measure import Comparison, Measurement

INK, MUTED, GREY, AUTO, CHOSEN = "#1f2430", "#6b7280", "#c3c8d1", "#d9480f", "#f4a77c"
PANEL, LINE = "#f3f4f6", "#e5e7eb"
# Part of the bars' width that the algorithms' names take, so that bars and images align.
NAMES = 0.37


def picture(photograph: np.ndarray, caption: str, comparisons: Sequence[Comparison]) -> Figure:
    """The photograph, and of each convolution its output over bars of the ratios to lax.

    Args:
      photograph: (h, w, 3) in 0…1.
      caption: what it is and where the measurements were made.
      comparisons: at least one.
    """
    columns = min(3, len(comparisons))
    rows = -(-len(comparisons) // columns)
    # No pyplot: its figures are global state, and it may want a display.
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(4.2 * (1 + columns), 7 * rows), layout=layout)
    side, main = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, columns))[0]
    side.set_facecolor(PANEL)
    panel = side.add_gridspec(2, 1, height_ratios=(1, 1.3 * rows - 0.6))
    side.suptitle("jaxconv compare", x=0.03, ha="left", fontsize=18, weight="bold", color=INK)
    _image(side.add_subplot(panel[0]), photograph, "Photograph", caption)
    _legend(side.add_subplot(panel[1]))
    grid = main.add_gridspec(2 * rows, columns, height_ratios=(1, 0.6) * rows)
    limits = _limits(comparisons)
    slots = max(1, *(sum(map(_is_bar, c.measurements)) for c in comparisons))
    for i, comparison in enumerate(comparisons):
        row, column = divmod(i, columns)
        _output(main.add_subplot(grid[2 * row, column]), comparison)
        _bars(main.add_subplot(grid[2 * row + 1, column]), comparison, limits, slots)
    return figure


def _image(axes: Axes, pixels: np.ndarray, title: str, caption: str) -> None:
    axes.imshow(pixels, cmap="magma", interpolation="nearest")
    axes.set_anchor("NW")
    axes.set_title(title, loc="left", fontsize=12, weight="bold", color=INK)
    caption = "\n".join(textwrap.fill(line, 48) for line in caption.splitlines())
    style: dict[str, Any] = {"fontsize": 9, "color": MUTED, "linespacing": 1.5}
    axes.set_xlabel(caption, loc="left", parse_math=False, **style)  # a file's name may have a $
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _output(axes: Axes, comparison: Comparison) -> None:
    out = comparison.output[0]
    h, w, channels = out.shape
    caption = f"{h}×{w}, {channels} channels"
    if channels == 3:
        pixels = np.clip(out, 0, 1)
    elif channels == 2:
        pixels = _gradient(out)
        caption += ": a hue for each direction"
    else:
        pixels = _mosaic(out)
        caption += ", four of them"
    _image(axes, pixels, comparison.convolution.name, caption)


def _gradient(out: np.ndarray) -> np.ndarray:
    """(h, w, 2) derivatives → (h, w, 3) colours."""
    x, y = out[..., 0], out[..., 1]
    hue = (np.arctan2(y, x) / (2 * np.pi)) % 1
    value = np.hypot(x, y)
    value = np.clip(value / max(np.quantile(value, 0.98), 1e-9), 0, 1) ** 0.7
    return hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.7), value], axis=-1))


def _mosaic(out: np.ndarray) -> np.ndarray:
    """(h, w, o) → (2·h, 2·w): the four channels with the most contrast, each in 0…1."""
    low, high = np.quantile(out, (0.01, 0.99), axis=(0, 1))
    best = np.sort(np.argsort(low - high)[:4])
    tiles = np.clip((out - low) / np.maximum(high - low, 1e-9), 0, 1)[..., best]
    return np.block([[tiles[..., 0], tiles[..., 1]], [tiles[..., 2], tiles[..., 3]]])


def _legend(axes: Axes) -> None:
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    key = (
        (AUTO, "auto, as jaxconv runs by default"),
        (CHOSEN, "what auto chose, by its own name"),
        (GREY, "other algorithms, by their names"),
    )
    handles = [Patch(color=color, label=text) for color, text in key]
    style: dict[str, Any] = {"frameon": False, "handlelength": 1, "handleheight": 1}
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.02, 1), fontsize=10, **style)
    text = (
        "Bars: lax's time over the algorithm's, the\n"
        "two called in turn; median and quartiles.\n"
        "Right of the line is faster than lax, left\n"
        "of it slower. lax: conv_general_dilated\n"
        "under jit, NHWC, float32."
    )
    axes.annotate(
        text,
        (0, 1),
        xytext=(0, -75),
        textcoords="offset points",
        va="top",
        fontsize=10,
        color=MUTED,
        linespacing=1.6,
    )


def _is_bar(row: Measurement) -> bool:
    return bool(row.ratios)


def _limits(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """Ends of the ratios' axis, the same for all, with room for the figures at the bars' ends."""
    ratios = [q for c in comparisons for row in c.measurements if row.ratios for q in row.quartiles]
    low, high = min([*ratios, 0.5]), max([*ratios, 2.0])
    room = (high / low) ** 0.2
    return low / room, high * room


def _bars(axes: Axes, comparison: Comparison, limits: tuple[float, float], slots: int) -> None:
    """Horizontal bars from 1×, the fastest on top; ``slots``: how many there is room for."""
    rows = sorted(filter(_is_bar, comparison.measurements), key=lambda row: -row.ratio)
    colors = {"auto": AUTO, comparison.plan.algorithm: CHOSEN}
    for y, row in enumerate(rows):
        low, high = row.quartiles
        faster = row.ratio >= 1
        axes.barh(y, row.ratio - 1, left=1, height=0.74, color=colors.get(row.name, GREY))
        axes.plot((low, high), (y, y), color=INK, linewidth=0.8)
        axes.annotate(
            f"{row.ratio:.0f}×" if row.ratio >= 9.95 else f"{row.ratio:.2g}×",
            (max(high, 1) if faster else min(low, 1), y),
            xytext=(4 if faster else -4, 0),
            textcoords="offset points",
            ha="left" if faster else "right",
            va="center",
            fontsize=9,
            color=INK,
        )
        axes.text(
            0,
            y,
            ("▸ " if row.name == comparison.plan.algorithm else "") + comparison.label(row.name),
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=10,
            color=AUTO if row.name == "auto" else INK,
            weight="bold" if row.name == "auto" else "normal",
        )
    axes.plot((1, 1), (-0.5, slots - 0.5), color=INK, linewidth=1)
    axes.set_xscale("log")
    low, high = limits
    ticks = [t for t in 10.0 ** np.arange(-4, 5) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}×" for t in ticks], fontsize=9, color=MUTED)
    axes.set_xticks([], minor=True)
    axes.set_xlim(low / (high / low) ** (NAMES / (1 - NAMES)), high)
    axes.set_ylim(slots - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
