"""Timing lax, jaxconv and PyTorch in turn, checking their results, and the table of them."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv import tables
from jaxconv.planning.timing import Call, Compiled, alternate, quickest
from jaxconv.spec import ConvSpec, dilate

# Seconds after which threads of another runtime have stopped spinning: 2 taps on 4×199×512 by
# jaxconv took 3.7 ms if run 2 ms after a call of PyTorch, 2.5 ms after 10 ms or more.
SETTLE = 0.015
TITLES = {"lax": "lax", "torch": "PyTorch"}

Pairs = Sequence[tuple[float, ...]]


def write(path: Path, data: bytes) -> None:
    """Writes a file at once: an interrupt leaves the old one."""
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long subjects are timed, see ``timing.alternate``, and whether by PyTorch too."""

    rounds: int = 101
    seconds: float = 1.0
    precision: float = 0.01
    fewest: int = 3
    torch: bool = False

    def times(self, subjects: Sequence[Call], settle: float = 0.0) -> Pairs:
        """Seconds of each subject, called in turn, by rounds."""
        return alternate(subjects, self.rounds, self.seconds, self.precision, settle, self.fewest)


@dataclasses.dataclass(frozen=True)
class Result:
    """One row of a suite."""

    name: str
    direction: str
    how: str  # the algorithms that "auto" chose, or "accelerate"
    lax: Pairs  # seconds of lax and of jaxconv, called in turn
    compile_seconds: tuple[float, float]  # of lax and of jaxconv, tracing and lowering included
    workspace: tuple[int | None, int | None]  # bytes of intermediate arrays of lax and of jaxconv
    difference: float  # the largest from lax's result, over the largest value
    differing: str  # whose result that is: jaxconv's, PyTorch's, or an algorithm's
    tolerance: float  # the upper limit of ``difference``
    torch: Pairs = ()  # seconds of PyTorch and of jaxconv; empty where it was not measured
    flops: float | None = None  # of the convolutions, without inserted zeros
    peak: float | None = None  # FLOP/s of a large float32 matrix product, at the same time
    errors: tuple[float, ...] | None = None  # of lax and of jaxconv against float64, see ``error``
    gemm: tuple[int, int, int, int] | None = None  # (count, m, n, k) of the matrix products
    best: str = ""  # the fastest algorithm
    regret: float | None = None  # the time of "auto" over the best's
    is_lax: bool = False  # jaxconv's program is lax's own: what differs in their times is noise

    def quartiles(self, peer: str = "lax") -> Sequence[float]:
        """First quartile, median and third quartile of the time of ``peer``, "lax" or "torch", over
        jaxconv's: above 1 jaxconv is faster; 1 if both are one program."""
        if self.is_lax and peer == "lax":
            return 1.0, 1.0, 1.0
        other, own = np.transpose(getattr(self, peer))
        return tuple(np.quantile(other / own, (0.25, 0.5, 0.75)).tolist())

    @property
    def rate(self) -> float | None:
        """FLOP/s of jaxconv, by the median of its times next to lax."""
        return None if self.flops is None else self.flops / float(np.median(self.lax, axis=0)[1])

    @property
    def label(self) -> str:
        return f"{self.name}, {self.direction}" if self.direction else self.name

    @property
    def error_ratio(self) -> float | None:
        """jaxconv's error over lax's; 1 where both are exact."""
        if self.errors is None:
            return None
        by_lax, own = self.errors
        return own / by_lax if by_lax else 1.0 if own == 0 else float("inf")

    @property
    def wrong(self) -> str | None:
        """A message if a result disagrees with lax's; None if none does."""
        if self.difference < self.tolerance:
            return None
        return (
            f"{self.label}: {self.differing} is off by {self.difference:.1e} of the largest value,"
            f" more than {self.tolerance:.0e}"
        )

    def as_json(self) -> dict[str, Any]:
        """The fields and the quantities computed from them."""
        ratios = {peer: self.quartiles(peer) for peer in TITLES if getattr(self, peer)}
        computed = {name: getattr(self, name) for name in ("rate", "error_ratio", "wrong")}
        return dataclasses.asdict(self) | computed | {"ratios": ratios}


@cache
def _product(size: int) -> Compiled:
    return Compiled(jnp.dot, *[jnp.ones((size, size), jnp.float32)] * 2)


def gemm_peak(size: int = 1024) -> float:
    """FLOP/s of a float32 matrix product, at best."""
    return 2 * size**3 / quickest(_product(size).call)


def measure(
    effort: Effort,
    baseline: Compiled,
    subject: Compiled,
    torch: Call | None = None,
    exact: Callable[[], np.ndarray] | None = None,
    **facts: Any,
) -> Result:
    """Times and compares: the baseline by lax, the subject by jaxconv; ``exact`` in float64, after
    the timing, which its spinning threads would disturb. ``facts`` are the rest of ``Result``."""
    if "flops" in facts:
        facts["peak"] = gemm_peak()
    facts["lax"] = effort.times((baseline, subject))
    off = {"jaxconv": difference(baseline.output, subject.output)}
    if torch is not None:
        facts["torch"] = effort.times((torch, subject), SETTLE)
        expected = jax.tree.leaves(baseline.output)[0]  # of a training step the loss
        off["PyTorch"] = difference(expected, torch.as_jax(torch.output))
    if exact is not None:
        truth = exact()
        facts["errors"] = error(baseline.output, truth), error(subject.output, truth)
    name = max(off, key=lambda name: (math.isnan(off[name]), off[name]))
    return Result(
        compile_seconds=(baseline.compile_seconds, subject.compile_seconds),
        workspace=(baseline.workspace, subject.workspace),
        difference=off[name],
        differing=name,
        **facts,
    )


def difference(expected: Any, out: Any) -> float:
    """The largest difference over the largest value, of the worst array of two trees; NaN or
    infinite if one of them has non-finite values."""

    def of_array(expected: Any, out: Any) -> float:
        wide = np.asarray(expected, np.float64)
        off = np.max(np.abs(np.asarray(out, np.float64) - wide))
        return float(off / max(np.max(np.abs(wide)), np.finfo(np.float64).tiny))

    return float(np.max(jax.tree.leaves(jax.tree.map(of_array, expected, out))))


def error(output: Any, exact: np.ndarray) -> float:
    """Root mean square error over the root mean square of the exact result."""
    scale = math.sqrt(np.mean(exact**2)) or 1.0
    return math.sqrt(np.mean((np.asarray(output, np.float64) - exact) ** 2)) / scale


def reference(spec: ConvSpec, lhs: Any, rhs: Any) -> np.ndarray:
    """A forward convolution in float64 by NumPy, one matrix product for each tap of its kernel. Not
    by lax, whose float64 convolutions are scalar loops on CPU and need JAX's 64-bit mode."""
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    padded = np.zeros((len(lhs), *spec.padded_spatial, lhs.shape[-1]))
    axes = zip(spec.padding, spec.padded_spatial, spec.lhs_dilation, strict=True)
    padded[:, *(slice(low, size - high, up) for (low, high), size, up in axes)] = lhs

    def split(x: np.ndarray) -> np.ndarray:
        """(…, channels) → (groups, positions, channels of a group)."""
        return x.reshape(-1, spec.groups, x.shape[-1] // spec.groups).swapaxes(0, 1)

    out = split(np.zeros(spec.out_shape))
    for tap in np.ndindex(*spec.kernel_shape):
        starts = np.multiply(tap, spec.rhs_dilation)
        axes = zip(starts, spec.out_spatial, spec.window_strides, strict=True)
        at = (slice(i, i + dilate(size, stride), stride) for i, size, stride in axes)
        out += split(padded[:, *at]) @ split(rhs[tap])
    return out.swapaxes(0, 1).reshape(spec.out_shape)


# The table of results

SLOWER = 0.95  # the ratio below which jaxconv counts as slower than its peer
HEADER = ("what", "direction", "how", "GEMMs × m×n×k", "lax", "jaxconv", "× lax (quartiles)")
HEADER += ("GFLOP/s", "of peak", "PyTorch", "× PyTorch (quartiles)")
HEADER += ("best", "regret", "compile", "workspace", "error")
WORDS = ("what", "direction", "how", "best")  # the other columns are figures
# Columns left out in a narrow terminal, the least important first.
SPARE = ("compile", "workspace", "GEMMs × m×n×k", "GFLOP/s", "PyTorch", "of peak", "lax")
SPARE += ("error", "jaxconv", "best", "how", "× PyTorch (quartiles)")


def table(results: Sequence[Result]) -> tables.Table:
    """A line for each result."""
    cells = map(_cells, results)
    rows = [HEADER, *([row.get(title, "–") for title in HEADER] for row in cells)]
    figures = [i for i, title in enumerate(HEADER) if title not in WORDS]
    return tables.Table(rows=rows, right=figures, spare=list(map(HEADER.index, SPARE)))


def _cells(result: Result) -> dict[str, str]:
    """What is known of it, by the titles of the columns."""
    cells = {"what": result.name, "direction": result.direction, "how": result.how}
    cells["best"] = result.best
    for peer, title in TITLES.items():
        if pairs := getattr(result, peer):
            cells[title] = tables.milliseconds(np.median(pairs, 0)[0])
            figures = "{1:.3g} ({0:.3g}–{2:.3g})".format(*result.quartiles(peer))
            same = result.is_lax and peer == "lax"
            cells[f"× {title} (quartiles)"] = "= lax" if same else figures
    cells["jaxconv"] = tables.milliseconds(np.median(result.lax, 0)[1])
    cells["compile"] = "{:.2f} → {:.2f} s".format(*result.compile_seconds)
    sizes = ("–" if size is None else tables.mebibytes(size) for size in result.workspace)
    cells["workspace"] = " → ".join(sizes)
    cells["error"] = f"{result.difference:.0e}"
    if result.wrong:
        cells["error"] = "WRONG"
    elif result.error_ratio is not None:
        cells["error"] = f"{result.error_ratio:.2g} × lax's"
    if result.gemm is not None:
        cells["GEMMs × m×n×k"] = "{} × {}×{}×{}".format(*result.gemm)
    if result.rate is not None:
        cells["GFLOP/s"] = f"{result.rate / 1e9:.3g}"
        cells["of peak"] = "–" if result.peak is None else f"{result.rate / result.peak:.0%}"
    if result.regret is not None:
        cells["regret"] = f"{result.regret:.2f}"
    return cells


def summary(results: Sequence[Result]) -> list[str]:
    """Lines that summarise the results of a suite: means, and the worst."""
    lines = []
    for peer, title in TITLES.items():
        ratios = [(r.quartiles(peer)[1], r) for r in results if getattr(r, peer)]
        ratios.sort(key=lambda pair: pair[0])
        below = [f"  {ratio:.3g}: {r.label} ({r.how})" for ratio, r in ratios if ratio < SLOWER]
        if ratios:
            lines.append(
                f"against {title}: {geometric_mean(ratio for ratio, _ in ratios):.3g} times as fast"
                f" in the geometric mean of {len(ratios)}, {ratios[0][0]:.3g} at worst;"
                f" {len(below)} below {SLOWER}"
            )
        lines += below
    errors = [(r.error_ratio, r.label) for r in results if r.error_ratio is not None]
    if errors:
        worst, label = max(errors, key=lambda pair: (math.isnan(pair[0]), pair[0]))
        above = sum(not ratio <= 2 for ratio, _ in errors)
        lines.append(
            f"errors against float64: {above} of {len(errors)} above 2 × lax's; at worst"
            f" {worst:.2g}: {label}"
        )
    regrets = [(r.regret, r) for r in results if r.regret is not None]
    if regrets:
        regrets.sort(key=lambda pair: -pair[0])
        values = [value for value, _ in regrets]
        lines.append(
            f"regret of {len(regrets)}: {geometric_mean(values):.3f} in the geometric mean,"
            f" {np.quantile(values, 0.95):.3g} at the 95th percentile, {values[0]:.3g} at worst"
        )
        lines += [f"  {value:.2f}: {r.label}: {r.how}, best {r.best}" for value, r in regrets[:10]]
    return lines


def contents(results: Sequence[Result]) -> tables.Table:
    """The table and the summary of a suite's results."""
    rest = "a wider terminal has all, or --json"
    return dataclasses.replace(table(results), below=["", *summary(results)], rest=rest)
