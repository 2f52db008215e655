"""How time and intermediate arrays grow with image size, channels, kernel size and batch."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jax import lax

import jaxconv
from jaxconv.algorithms.base import refusal
from jaxconv.bench.cases import Layer
from jaxconv.bench.measure import Effort
from jaxconv.planning.timing import Compiled, alternate


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Layers that differ in one size. ``layer``: from the size to the layer."""

    name: str
    sizes: tuple[int, ...]
    layer: Callable[[int], Layer]


def _dense(batch: int = 1, size: int = 28, channels: int = 64) -> Layer:
    shape = (batch, size, size, channels)
    return Layer("dense", shape, (3, 3, channels, channels), padding=(1, 1))


def _single(kernel: int) -> Layer:
    half = kernel // 2
    return Layer("single", (1, 256, 256, 1), (kernel, kernel, 1, 1), padding=(half, half))


SWEEPS = (
    Sweep("image size, 3×3 of 64 channels", (14, 28, 56, 112), lambda n: _dense(size=n)),
    Sweep("channels, 3×3 at 28×28", (16, 32, 64, 128, 256), lambda n: _dense(channels=n)),
    Sweep("batch, 3×3 of 64 channels at 28×28", (1, 2, 4, 8, 16), lambda n: _dense(batch=n)),
    Sweep("kernel size, one channel at 256×256", (3, 7, 15, 31), _single),
)
# Not the loop that shows what convolution is, and costs as much to measure as all the others.
LEFT_OUT = ("naive",)
ENOUGH = Effort(15, 0.6)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One algorithm along one sweep.

    Attributes:
      sweep: its name.
      algorithm: "lax", "auto", or a name.
      sizes: those at which the algorithm takes the convolution.
      seconds: median time of a call at each.
      workspace: bytes of intermediate arrays at each.
    """

    sweep: str
    algorithm: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    workspace: tuple[int | None, ...]

    @property
    def slopes(self) -> tuple[float | None, float | None]:
        """The powers of the size with which time and intermediate arrays grow."""
        return slope(self.sizes, self.seconds), slope(self.sizes, self.workspace)


def slope(sizes: tuple[int, ...], values: tuple[float | None, ...]) -> float | None:
    """Of the line through the points on logarithmic axes; None with fewer than two above zero."""
    points = [(size, value) for size, value in zip(sizes, values, strict=True) if value]
    if len(points) < 2:
        return None
    x, y = np.log(np.array(points, float)).T
    return float(np.polyfit(x, y, 1)[0])


def run(sweeps: tuple[Sweep, ...] = SWEEPS, effort: Effort = ENOUGH) -> Iterator[str | Curve]:
    """Measures each sweep by lax, "auto" and each algorithm. Yields the name of what comes, then
    the curves of a sweep."""
    for sweep in sweeps:
        points: dict[str, list[tuple[int, float, int | None]]] = {}
        for size in sweep.sizes:
            yield f"{sweep.name}: {size}"
            layer = sweep.layer(size)
            operands = layer.operands()
            subjects = {
                "lax": Compiled(layer.function(lax.conv_general_dilated, "forward"), *operands)
            }
            for name in ("auto", *able(layer)):
                function = layer.function(jaxconv.conv_general_dilated, "forward", algorithm=name)
                subjects[name] = Compiled(function, *operands)
            times = alternate(list(subjects.values()), effort.pairs, effort.seconds)
            for (name, subject), seconds in zip(subjects.items(), np.median(times, 0), strict=True):
                points.setdefault(name, []).append((size, float(seconds), subject.workspace))
        for name, found in points.items():
            sizes, seconds, workspace = zip(*found, strict=True)
            yield Curve(sweep.name, name, sizes, seconds, workspace)


def able(layer: Layer) -> list[str]:
    """The algorithms that take a layer."""
    names = (name for name in jaxconv.ALGORITHMS if name not in LEFT_OUT)
    return [name for name in names if refusal(jaxconv.ALGORITHMS[name], layer.spec) is None]
