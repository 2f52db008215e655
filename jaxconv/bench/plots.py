"""Pictures of a benchmark: ratios, a roofline, how costs grow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from jaxconv.bench.measure import Result
from jaxconv.bench.scaling import Curve


def draw(folder: Path, machine: dict[str, Any], results: dict[str, list[Any]]) -> list[Path]:
    """Writes the pictures of all results as PNG files and returns their paths."""
    figures: dict[str, Figure] = {}
    for suite, found in results.items():
        rows = [result for result in found if isinstance(result, Result)]
        if rows:
            figures[f"{suite}.png"] = ratios(rows)
        if any(row.flops for row in rows):
            figures["roofline.png"] = roofline(rows, machine)
        curves = [result for result in found if isinstance(result, Curve)]
        if curves:
            figures["scaling.png"] = scaling(curves)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in figures]


def ratios(results: Sequence[Result]) -> Figure:
    """A bar for each result and peer: how many times as fast as the peer."""
    peers = [peer for peer in ("lax", "torch") if any(getattr(r, peer) for r in results)]
    figure = Figure(figsize=(6 + 4 * len(peers), 1.5 + 0.22 * len(results)), layout="constrained")
    panels = figure.subplots(1, len(peers), sharey=True, squeeze=False)[0]
    rows = np.arange(len(results))
    for panel, peer in zip(panels, peers, strict=True):
        values = [r.quartiles(peer)[1] if getattr(r, peer) else np.nan for r in results]
        colours = ["tab:red" if value < 0.95 else "tab:blue" for value in values]
        panel.barh(rows, np.array(values) - 1, left=1, color=colours)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_title(f"times as fast as {'PyTorch' if peer == 'torch' else peer}")
        panel.grid(axis="x", alpha=0.3)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_yticks(rows, [f"{r.name}, {r.direction or r.how}" for r in results], fontsize=7)
    panels[0].set_ylim(len(results) - 0.5, -0.5)
    return figure


def roofline(results: Sequence[Result], machine: dict[str, Any]) -> Figure:
    """GFLOP/s reached over the operations for each byte of operands and result, below what memory
    and a GEMM allow. Arrays that stay in cache from call to call may be above the first."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    float32 = [r for r in results if r.flops and not r.name.startswith(("bfloat16", "int8"))]
    for direction in dict.fromkeys(r.direction for r in float32):
        rows = [r for r in float32 if r.direction == direction]
        intensity = [r.flops / r.traffic for r in rows]
        axes.scatter(intensity, [r.flops / r.seconds / 1e9 for r in rows], s=14, label=direction)
    x = np.geomspace(0.1, 1e4)
    peak = np.minimum(machine["gemm"], x * machine["bandwidth"]) / 1e9
    axes.plot(x, peak, color="black", label="memory's bandwidth, and a GEMM's peak")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def scaling(curves: Sequence[Curve]) -> Figure:
    """Time, above, and intermediate arrays, below, of each sweep on logarithmic axes."""
    sweeps = list(dict.fromkeys(curve.sweep for curve in curves))
    figure = Figure(figsize=(4.5 * len(sweeps), 8), layout="constrained")
    panels = figure.subplots(2, len(sweeps), squeeze=False)
    for column, sweep in zip(panels.T, sweeps, strict=True):
        for curve in (curve for curve in curves if curve.sweep == sweep):
            style = {"linewidth": 2.5, "color": "black"} if curve.algorithm == "auto" else {}
            slope = curve.slopes[0]
            label = curve.algorithm if slope is None else f"{curve.algorithm} ({slope:.1f})"
            times = 1e3 * np.array(curve.seconds)
            column[0].plot(curve.sizes, times, "o-", markersize=3, label=label, **style)
            sizes = np.array([np.nan if size is None else size for size in curve.workspace])
            column[1].plot(curve.sizes, sizes / 2**20, "o-", markersize=3, **style)
        column[0].set(title=sweep, xscale="log", yscale="log", ylabel="ms")
        column[1].set(xscale="log", yscale="symlog", ylabel="MiB of intermediate arrays")
        column[0].legend(fontsize=7)
        ticks = sorted({size for curve in curves if curve.sweep == sweep for size in curve.sizes})
        for panel in column:
            panel.set_xticks(ticks, list(map(str, ticks)))
            panel.xaxis.set_minor_formatter(NullFormatter())
    return figure
