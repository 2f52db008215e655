"""The suites of ``jaxconv bench``, and what it prints and writes about them and the machine."""

import dataclasses
import json
import math
import os
import platform
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxconv import tables
from jaxconv.bench import regret
from jaxconv.bench.cases import DIRECTIONS, LAYERS
from jaxconv.bench.measure import ENOUGH, Effort, Result
from jaxconv.bench.programs import (
    LOOPS,
    MODEL_DIRECTIONS,
    MODEL_EFFORT,
    MODELS,
    run_layers,
    run_loops,
    run_models,
)
from jaxconv.planning.measured import processor
from jaxconv.planning.timing import Compiled, alternate

# Below this ratio jaxconv counts as slower than its peer.
SLOWER = 0.95
QUICK = Effort(5, 0.05)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What of a suite is run.

    Attributes:
      case: searched for in the names; None for all.
      direction: one of the suite's; None for all.
      quick: a few cases, a moment each.
      specs: how many random convolutions ``regret`` takes.
    """

    case: re.Pattern[str] | None = None
    direction: str | None = None
    quick: bool = False
    specs: int = regret.COUNT


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of benchmarks.

    Attributes:
      cases: all of them; those that are named by ``str`` have no ``name``.
      few: those that a quick run takes.
      directions: in which a case is measured; none where it has no directions.
      effort: of one case.
      measure: yields the name of what comes, then a result, for cases, directions and an effort.
    """

    cases: Callable[[Selection], Sequence[Any]]
    few: slice
    directions: tuple[str, ...]
    effort: Effort
    measure: Callable[[Sequence[Any], Sequence[str], Effort], Iterator[str | Result]]

    def run(self, selection: Selection) -> Iterator[str | Result]:
        """Measures what is selected: also in a quick run, all cases that are asked for by name."""
        cases = self.cases(selection)
        if selection.case is not None:
            cases = [c for c in cases if selection.case.search(getattr(c, "name", None) or str(c))]
        elif selection.quick:
            cases = cases[self.few]
        wanted = selection.direction
        directions = [d for d in self.directions if wanted in (None, d)]
        if wanted is not None and not directions:
            cases = ()
        return self.measure(cases, directions, QUICK if selection.quick else self.effort)


SUITES = {
    "layers": Suite(lambda _: LAYERS, slice(1, None, 12), DIRECTIONS, ENOUGH, run_layers),
    "loops": Suite(
        lambda _: LOOPS, slice(1, 3), (), ENOUGH, lambda loops, _, effort: run_loops(loops, effort)
    ),
    "models": Suite(lambda _: MODELS, slice(1), MODEL_DIRECTIONS, MODEL_EFFORT, run_models),
    "regret": Suite(
        lambda selection: regret.random_specs(regret.SEED, selection.specs),
        slice(4),
        (),
        regret.ENOUGH,
        lambda specs, _, effort: regret.run(specs, effort),
    ),
}


# The columns of a table; the figures end at the right.
HEADER = ("what", "direction", "how", "GEMMs × m×n×k", "lax", "jaxconv", "PyTorch")
HEADER += ("× lax (quartiles)", "× PyTorch (quartiles)", "best", "regret")
HEADER += ("compile", "workspace", "error")
WORDS = ("what", "direction", "how", "best")


def table(results: Sequence[Result], width: int | None = None, spare: Collection[str] = ()) -> str:
    """A line for each result, without columns in which nothing is known.

    Args:
      width: of a terminal; columns in ``spare`` are left out, the first ones first, until the table
        fits.
    """
    rows = list(map(_cells, results))
    titles = [t for t, column in zip(HEADER, zip(*rows, strict=True), strict=True) if any(column)]
    spare = list(spare)
    while True:
        shown = [HEADER.index(title) for title in titles]
        cells = [titles, *([row[i] or "–" for i in shown] for row in rows)]
        right = [i for i, title in enumerate(titles) if title not in WORDS]
        text = tables.as_text(cells, right)
        if width is None or not spare or max(map(len, text.splitlines())) <= width:
            return text
        least = spare.pop(0)
        titles = [title for title in titles if title != least]


def _cells(result: Result) -> tuple[str, ...]:
    def ratio(peer: str) -> str:
        if not getattr(result, peer):
            return ""
        low, median, high = result.quartiles(peer)
        return f"{median:.3g} ({low:.3g}–{high:.3g})"

    workspace = ("–" if size is None else tables.mebibytes(size) for size in result.workspace)
    if result.wrong:
        error = f"WRONG: {result.wrong}"
    elif result.error_ratio is None:
        error = f"{result.difference:.0e}"
    else:
        error = f"{result.error_ratio:.2g} × lax's"
    return (
        result.name,
        result.direction,
        result.how,
        "" if result.gemm is None else "{} × {}×{}×{}".format(*result.gemm),
        *map(tables.milliseconds, np.median(result.lax, axis=0)),
        tables.milliseconds(np.median(result.torch, axis=0)[0]) if result.torch else "",
        ratio("lax"),
        ratio("torch"),
        result.best,
        "" if result.regret is None else f"{result.regret:.2f}",
        "{:.2f} → {:.2f} s".format(*result.compile_seconds),
        " → ".join(workspace),
        error,
    )


def summary(results: Sequence[Result]) -> list[str]:
    """Lines about all results of a suite: means, and the worst."""
    lines = []
    for peer, title in (("lax", "lax"), ("torch", "PyTorch")):
        ratios = {r: r.quartiles(peer)[1] for r in results if getattr(r, peer)}
        ranked = sorted(ratios, key=lambda result: ratios[result])
        below = [result for result in ranked if ratios[result] < SLOWER]
        if ranked:
            lines.append(
                f"against {title}: {geometric_mean(ratios.values()):.3g} times as fast in the"
                f" geometric mean of {len(ranked)}, {ratios[ranked[0]]:.3g} at worst;"
                f" {len(below)} below {SLOWER}"
            )
        lines += [f"  {ratios[r]:.3g}: {r.label} ({r.how})" for r in below]
    errors = [(r.error_ratio, r.label) for r in results if r.error_ratio is not None]
    if errors:
        worst, label = max(errors, key=lambda pair: (math.isnan(pair[0]), pair[0]))
        above = sum(not ratio <= 2 for ratio, _ in errors)
        lines.append(
            f"errors against float64: {above} of {len(errors)} above 2 × lax's; at worst"
            f" {worst:.2g}: {label}"
        )
    regrets = {r: r.regret for r in results if r.regret is not None}
    if regrets:
        ranked = sorted(regrets, key=lambda result: -regrets[result])
        values = list(regrets.values())
        lines.append(
            f"regret of {len(regrets)}: {geometric_mean(values):.3f} in the geometric mean,"
            f" {np.quantile(values, 0.95):.3g} at the 95th percentile, {max(values):.3g} at worst"
        )
        lines += [f"  {regrets[r]:.2f}: {r.label}: {r.how}, best {r.best}" for r in ranked[:10]]
    return lines


def geometric_mean(values: Collection[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


class Report:
    """Prints a table of each suite, and writes all results to ``file`` after every result.

    Attributes:
      results: by suite.
    """

    def __init__(self, machine: dict[str, Any], file: Path | None) -> None:
        self.machine = machine
        self.file = file
        self.results: dict[str, list[Result]] = {}
        print(
            f"jaxconv {machine['jaxconv']}, JAX {machine['jax']},"
            f" PyTorch {machine['torch'] or '–'}, {machine['cpu']},"
            f" {machine['cores']} cores, {machine['gemm'] / 1e9:.0f} GFLOP/s f32 GEMM"
        )

    def add(self, suite: str, result: Result) -> None:
        """Keeps and writes a result; concurrent readers see the previous file, whole."""
        self.results.setdefault(suite, []).append(result)
        if self.file is None:
            return
        results = {suite: list(map(as_json, found)) for suite, found in self.results.items()}
        document = {"machine": self.machine, "results": results}
        partial = self.file.with_name(f"{self.file.name}.partial")
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, self.file)

    def end(self, suite: str) -> None:
        """Prints the table and the summary of a suite, also of one that was interrupted."""
        results = self.results.get(suite)
        if results:
            lines = "\n".join(summary(results))
            print(f"\n{suite}\n\n{table(results)}\n\n{lines}", flush=True)

    def close(self, written: list[Path], seconds: float) -> None:
        """Prints what disagrees with lax, what was written, and how long it took."""
        files = [str(path) for path in (self.file, *written) if path is not None]
        lines = [f"WRONG: {text}" for text in self.wrong]
        if files:
            lines.append(f"Written: {', '.join(files)}")
        print("\n" + "\n".join([*lines, f"{seconds:.0f} s in all."]))

    @property
    def wrong(self) -> list[str]:
        """Which results disagree with lax's."""
        every = [result for found in self.results.values() for result in found]
        return [result.wrong for result in every if result.wrong is not None]


def as_json(result: Result) -> dict[str, Any]:
    """A result's fields and what is computed from them."""
    peers = [peer for peer in ("lax", "torch") if getattr(result, peer)]
    return dataclasses.asdict(result) | {
        "ratios": {peer: result.quartiles(peer) for peer in peers},
        "error_ratio": result.error_ratio,
        "wrong": result.wrong,
    }


def machine() -> dict[str, Any]:
    """CPU, cores, bytes of memory, versions, peak FLOP/s of an f32 GEMM."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows, macOS
        memory = None
    return {
        "cpu": processor(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "memory": memory,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("jaxconv", "jax", "jaxlib", "numpy", "torch")},
        "gemm": gemm_peak(),
    }


def gemm_peak(size: int = 1024, seconds: float = 1.0) -> float:
    """FLOP/s of an f32 matrix product, the best of several."""
    x = jnp.ones((size, size), jnp.float32)
    times = alternate((Compiled(jnp.dot, x, x),), 10_000, seconds)
    return 2 * size**3 / min(times)[0]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
