"""The suites by name: what each runs, whole and quickly, and the cells of its rows."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxconv import tables
from jaxconv.bench import cases, layers, loops, models, regret, scaling
from jaxconv.bench.measure import ENOUGH, Effort, Result


@dataclasses.dataclass(frozen=True)
class Selection:
    """What of a suite is run.

    Attributes:
      case: searched for in the names; None for all.
      direction: one of ``DIRECTIONS``; None for all.
      quick: a few cases, a moment each.
      specs: how many random convolutions ``regret`` takes.
    """

    case: re.Pattern[str] | None = None
    direction: str | None = None
    quick: bool = False
    specs: int = regret.COUNT

    def of(self, cases: Sequence[Any], name: Callable[[Any], str], few: Sequence[Any]) -> tuple:
        """Those selected, of ``few`` where it must be quick and no name is asked for."""
        if self.case is None:
            return tuple(few if self.quick else cases)
        return tuple(case for case in cases if self.case.search(name(case)))

    def directions(self, directions: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(d for d in directions if self.direction in (None, d))

    def effort(self, whole: Effort) -> Effort:
        return Effort(5, 0.05) if self.quick else whole


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
      header: of its table.
      run: yields the name of what comes, then a result.
      row: the cells of a result.
      summary: lines about all results.
    """

    header: tuple[str, ...]
    run: Callable[[Selection], Iterator[Any]]
    row: Callable[[Any], tuple[str, ...]]
    summary: Callable[[Sequence[Any]], list[str]]


DIRECTIONS = tuple(dict.fromkeys((*layers.DIRECTIONS, *models.DIRECTIONS)))
# Below this ratio jaxconv counts as slower than its peer.
SLOWER = 0.95


def _run_layers(selection: Selection) -> Iterator[Any]:
    few = cases.LAYERS[1 :: len(cases.LAYERS) // 6]
    chosen = selection.of(cases.LAYERS, lambda layer: layer.name, few)
    return layers.run(chosen, selection.directions(layers.DIRECTIONS), selection.effort(ENOUGH))


def _run_loops(selection: Selection) -> Iterator[Any]:
    chosen = selection.of(loops.PROGRAMS, lambda program: program.name, loops.PROGRAMS[1:3])
    if selection.direction is not None:
        chosen = ()
    return loops.run(chosen, selection.effort(ENOUGH))


def _run_models(selection: Selection) -> Iterator[Any]:
    chosen = selection.of(models.MODELS, lambda model: models.named(*model), models.MODELS[:1])
    directions = selection.directions(models.DIRECTIONS)
    return models.run(chosen, directions, selection.effort(models.ENOUGH))


def _run_scaling(selection: Selection) -> Iterator[Any]:
    few = [dataclasses.replace(scaling.SWEEPS[0], sizes=scaling.SWEEPS[0].sizes[:2])]
    chosen = selection.of(scaling.SWEEPS, lambda sweep: sweep.name, few)
    return scaling.run(chosen, selection.effort(scaling.ENOUGH))


def _run_regret(selection: Selection) -> Iterator[Any]:
    specs = regret.random_specs(regret.SEED, selection.specs)
    chosen = selection.of(specs, str, specs[:4])
    return regret.run(list(chosen), selection.effort(regret.ENOUGH))


TIMES = (
    "what",
    "direction",
    "how",
    "lax",
    "jaxconv",
    "PyTorch",
    "× lax (quartiles)",
    "× PyTorch (quartiles)",
    "lowering + compiling",
    "workspace",
    "error",
)


def _times(result: Result) -> tuple[str, ...]:
    def ratio(peer: str) -> str:
        if not getattr(result, peer):
            return "–"
        low, median, high = result.quartiles(peer)
        return f"{median:.3g} ({low:.3g}–{high:.3g})"

    def compiling(i: int) -> str:
        return f"{1e3 * result.lower_seconds[i]:.0f}+{1e3 * result.xla_seconds[i]:.0f}"

    by_lax, own = np.median(result.lax, axis=0)
    workspace = ["–" if size is None else tables.mebibytes(size) for size in result.workspace]
    return (
        result.name,
        result.direction,
        result.how,
        milliseconds(by_lax),
        milliseconds(own),
        milliseconds(np.median(result.torch, axis=0)[0]) if result.torch else "–",
        ratio("lax"),
        ratio("torch"),
        f"{compiling(0)} → {compiling(1)} ms",
        f"{workspace[0]} → {workspace[1]}",
        _error(result),
    )


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _error(result: Result) -> str:
    if result.wrong:
        return f"WRONG: {result.wrong}"
    if result.error_ratio is None:
        return f"{result.difference:.0e}"
    return f"{result.error_ratio:.2g} × lax's"


def _summary(results: Sequence[Result]) -> list[str]:
    lines = []
    for peer, title in (("lax", "lax"), ("torch", "PyTorch")):
        with_peer = [result for result in results if getattr(result, peer)]
        if not with_peer:
            continue
        ranked = sorted(with_peer, key=lambda result: result.quartiles(peer)[1])
        ratios = [result.quartiles(peer)[1] for result in ranked]
        below = [result for result in ranked if result.quartiles(peer)[1] < SLOWER]
        lines.append(
            f"against {title}: {geometric_mean(ratios):.3g} times as fast in the geometric mean of"
            f" {len(ratios)}, {ratios[0]:.3g} at worst; {len(below)} below {SLOWER}"
        )
        shown = below if peer == "lax" else ranked[:10]
        lines += [
            f"  {result.quartiles(peer)[1]:.3g}: {result.name}, {result.direction} ({result.how})"
            for result in shown
        ]
    judged = [result for result in results if result.error_ratio is not None]
    if judged:
        ratios = np.array([result.error_ratio for result in judged])
        worst = judged[int(np.argmax(ratios))]  # the first NaN, where there is one
        above = np.count_nonzero(~(ratios <= 2))
        lines.append(
            f"errors against float64: {above} of {len(judged)} above 2 × lax's; at worst"
            f" {worst.error_ratio:.2g}: {worst.name}, {worst.direction}"
        )
    return lines


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def _regret(result: regret.Regret) -> tuple[str, ...]:
    return (
        result.spec,
        result.chosen,
        result.best,
        milliseconds(result.seconds["auto"]),
        milliseconds(result.seconds.get(result.best, result.seconds["auto"])),
        f"{result.regret:.2f}",
        f"{result.by_lax:.3g}",
        f"WRONG: {result.wrong}" if result.wrong else "",
    )


def _regret_summary(results: Sequence[regret.Regret]) -> list[str]:
    regrets = [result.regret for result in results]
    worst = sorted(results, key=lambda result: -result.regret)[:10]
    by_lax = [result.by_lax for result in results]
    return [
        f"regret of {len(results)}: {geometric_mean(regrets):.3f} in the geometric mean,"
        f" {np.quantile(regrets, 0.95):.3g} at the 95th percentile, {max(regrets):.3g} at worst",
        *(f"  {r.regret:.2f}: {r.spec}: {r.chosen}, best {r.best}" for r in worst),
        f"against lax: {geometric_mean(by_lax):.3g} times as fast in the geometric mean,"
        f" {min(by_lax):.3g} at worst; {sum(r < SLOWER for r in by_lax)} below {SLOWER}",
    ]


def _curve(curve: scaling.Curve) -> tuple[str, ...]:
    def cell(slope: float | None) -> str:
        return "–" if slope is None else f"{slope:.2f}"

    points = zip(curve.sizes, curve.seconds, strict=True)
    time, workspace = curve.slopes
    times = ", ".join(f"{size}: {milliseconds(seconds)}" for size, seconds in points)
    return curve.sweep, curve.algorithm, cell(time), cell(workspace), times


SUITES = {
    "layers": Suite(TIMES, _run_layers, _times, _summary),
    "loops": Suite(TIMES, _run_loops, _times, _summary),
    "models": Suite(TIMES, _run_models, _times, _summary),
    "scaling": Suite(
        ("size that grows", "algorithm", "power of time", "of workspace", "times"),
        _run_scaling,
        _curve,
        lambda curves: [],
    ),
    "regret": Suite(
        ("convolution", "chosen", "best", "auto", "best", "regret", "× lax", ""),
        _run_regret,
        _regret,
        _regret_summary,
    ),
}
