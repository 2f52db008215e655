"""What the notebooks share: colours, matrices drawn as pictures, lax's convolution, a clock.

Importing it sets the style of the pictures.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#555555"
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")

plt.rcParams.update({"figure.dpi": 90, "font.size": 11, "axes.titlesize": 12})


def lax_conv(
    x: Any, w: Any, strides: int = 1, padding: Any = "VALID", groups: int = 1, **options: Any
) -> jax.Array:
    """lax's convolution of images or volumes, channels last."""
    names = CHANNELS_LAST if w.ndim == 4 else ("NDHWC", "DHWIO", "NDHWC")
    return lax.conv_general_dilated(
        x,
        w,
        (strides,) * (w.ndim - 2),
        padding,
        dimension_numbers=names,
        feature_group_count=groups,
        **options,
    )


def in_turn(functions: Mapping[str, Callable], *operands: Any, rounds: int = 5) -> dict[str, Any]:
    """Seconds of each round for each function: they take turns, so that what else the computer
    does hits all of them. The first call of each, which compiles it, does not count."""
    for function in functions.values():
        jax.block_until_ready(function(*operands))
    seconds = {name: np.zeros(rounds) for name in functions}
    for i in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*operands))
            seconds[name][i] = time.perf_counter() - start
    return seconds


def median_times(
    functions: Mapping[str, Callable], *operands: Any, rounds: int = 5
) -> dict[str, float]:
    times = in_turn(functions, *operands, rounds=rounds)
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


# Pictures of matrices, a cell a number


def canvas(width: float, height: float, middle: float = 0) -> Axes:
    """An empty picture, measured in cells; y = 0 lies at ``middle``, from below."""
    ax = plt.figure(figsize=(0.48 * width, 0.48 * height)).add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(-middle, height - middle), aspect="equal")
    ax.axis("off")
    return ax


def draw(
    ax: Axes,
    values: Any,
    left: float,
    title: str,
    faces: Any = "#eeeeee",
    frames: Iterable[tuple[int, int, int, int, str]] = (),
    middle: float = 0,
) -> None:
    """A matrix. Faces: a colour, or one for each cell. Frames: (row, column, height, width, colour)
    in cells."""
    rows, columns = values.shape
    top = middle + rows / 2
    for (i, j), value in np.ndenumerate(values):
        face = faces if isinstance(faces, str) else faces[i, j]
        ax.add_patch(Rectangle((left + j, top - i - 1), 1, 1, fc=face, ec="white", lw=1.5))
        text = str(value).replace("-", "−")
        ax.text(left + j + 0.5, top - i - 0.54, text, ha="center", va="center")
    for row, column, height, width, colour in frames:
        corner = (left + column, top - row - height)
        ax.add_patch(Rectangle(corner, width, height, fill=False, ec=colour, lw=3))
    ax.text(left + columns / 2, top + 0.3, title, ha="center", va="bottom", fontsize=12)


def sign(ax: Axes, x: float, text: str, y: float = 0) -> None:
    ax.text(x, y, text, ha="center", va="center", fontsize=21)


def picture(ax: Axes, values: Any, title: str = "", **options: Any) -> None:
    """An image without axes."""
    ax.imshow(values, **options)
    ax.set_title(title)
    ax.axis("off")


def tidy(*axes: Axes) -> None:
    """A light grid, no box, and on logarithmic axes plain numbers unless they are small."""
    for ax in axes:
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        for axis in (ax.xaxis, ax.yaxis):
            if axis.get_scale() == "log" and axis.get_view_interval()[0] > 1e-4:
                axis.set_major_formatter("{x:,g}")
