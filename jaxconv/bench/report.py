"""The suites of ``jaxconv bench``, and its reports on them and the machine."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import jax
import numpy as np

from jaxconv import tables
from jaxconv.bench import programs, regret, sharding
from jaxconv.bench.cases import FIELD, LAYERS
from jaxconv.bench.measure import ENOUGH, PEERS, TITLES, Effort, Result, gemm_peak
from jaxconv.bench.programs import LOOPS, MODELS, PROGRAMS
from jaxconv.bench.regret import SEED, measure_regret, random_specs, relatives
from jaxconv.planning.machine import processor, version

# Below this ratio jaxconv counts as slower than its peer.
SLOWER = 0.95
QUICK = Effort(5, 0.05, precision=0.0)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The part of a suite to run.

    Attributes:
      case: a regular expression to search for in the names; None for all.
      direction: one of the suite's; None for all.
      quick: only a few cases, each timed briefly.
      specs: the number of random convolutions for ``regret`` and ``relatives``.
      against: names of ``PEERS``.
    """

    case: re.Pattern[str] | None = None
    direction: str | None = None
    quick: bool = False
    specs: int = regret.COUNT
    against: tuple[str, ...] = ()


def contents(results: Sequence[Result]) -> tables.Table:
    """The table and the summary of a suite's results."""
    return dataclasses.replace(table(results), below=["", *summary(results)])


# What is measured, as progress shows it; its case and direction.
Selected = tuple[str, Any, str]


def name_of(case: Any) -> str:
    """The name that a case is selected by."""
    return getattr(case, "name", None) or str(case)


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of benchmarks.

    Attributes:
      measure: measures a case in a direction: a ``Result`` or, of sharding, ``Moved``.
      cases: all of them, with directions; see ``name_of``.
      few: those of a quick run.
      effort: of one case.
      contents: the report on the results.
    """

    measure: Callable[[Any, str, Effort], Any]
    cases: Callable[[Selection], Sequence[Any]]
    few: slice
    effort: Effort
    contents: Callable[[Sequence[Any]], tables.Table] = contents

    def run(self, cases: Sequence[Selected], selection: Selection) -> Iterator[Any]:
        """Measures selected cases. Yields the name of each, then its result."""
        effort = QUICK if selection.quick else self.effort
        effort = dataclasses.replace(effort, against=selection.against)
        for name, case, direction in cases:
            yield name
            yield self.measure(case, direction, effort)

    def profiles(self, cases: Sequence[Selected]) -> Iterator[Any]:
        """Profiles selected cases. Yields the name of each, then its profile."""
        for name, case, direction in cases:
            yield name
            yield programs.profile_of(case, direction)

    def selected(self, selection: Selection) -> Iterator[Selected]:
        """The cases of a selection; those selected by name also in a quick run."""
        cases = self.cases(selection)
        for case in cases[self.few] if selection.quick and selection.case is None else cases:
            name = name_of(case)
            if selection.case is not None and not selection.case.search(name):
                continue
            for direction in getattr(case, "directions", ("",)):
                if selection.direction in (None, direction):
                    yield f"{name}, {direction}" if direction else name, case, direction


# It runs by itself: where a host is many devices, other programs take other times.
SHARDING = "sharding"
SUITES = {
    "layers": Suite(programs.measure_layer, lambda _: LAYERS, slice(1, None, 12), ENOUGH),
    "loops": Suite(programs.measure_loop, lambda _: LOOPS, slice(1, 3), ENOUGH),
    "programs": Suite(
        programs.measure_program,
        lambda _: PROGRAMS,
        slice(1, None, 11),
        Effort(seconds=0.5, fewest=5),
    ),
    "models": Suite(programs.measure_model, lambda _: MODELS, slice(1), programs.MODEL_EFFORT),
    "regret": Suite(measure_regret, lambda s: random_specs(SEED, s.specs), slice(4), regret.ENOUGH),
    "relatives": Suite(
        measure_regret,
        lambda s: relatives(programs.convolutions_of(FIELD), SEED, s.specs),
        slice(4),
        regret.ENOUGH,
    ),
    SHARDING: Suite(
        sharding.measure, lambda _: sharding.CASES, slice(3, 120, 40), ENOUGH, sharding.contents
    ),
}
# Those of whole programs, whose operations can be timed.
PROFILED = ("models", "programs")
DIRECTIONS = tuple(
    dict.fromkeys(d for case in (*LAYERS, *LOOPS, *PROGRAMS, *MODELS) for d in case.directions)
)


# Beside jaxconv, each with the columns "name" and "× name"; lax is always there.
BESIDE = {name: title.removeprefix("the same ") for name, title in TITLES.items() if name != "lax"}
# The columns of a table; figures are right-aligned.
HEADER = ("what", "direction", "how", "GEMMs × m×n×k", "lax", "jaxconv", "× lax (quartiles)")
HEADER += ("GFLOP/s", "of peak")
HEADER += tuple(column for title in BESIDE.values() for column in (title, f"× {title} (quartiles)"))
HEADER += ("best", "regret", "compile", "workspace", "error")
WORDS = ("what", "direction", "how", "best")
# Columns left out in a narrow terminal, the least important first.
SPARE = ("compile", "workspace", "GEMMs × m×n×k", "GFLOP/s", *BESIDE.values(), "of peak", "lax")
SPARE += ("error", "jaxconv", "best", "how")
SPARE += tuple(f"× {title} (quartiles)" for title in reversed(BESIDE.values()))


def table(results: Sequence[Result]) -> tables.Table:
    """A line for each result."""
    rows = [HEADER, *map(_cells, results)]
    figures = [i for i, title in enumerate(HEADER) if title not in WORDS]
    return tables.Table(rows=rows, right=figures, spare=list(map(HEADER.index, SPARE)))


def _cells(result: Result) -> tuple[str, ...]:
    def ratio(peer: str) -> str:
        if result.is_lax and peer == "lax":
            return "= lax"
        low, median, high = result.quartiles(peer)
        return f"{median:.3g} ({low:.3g}–{high:.3g})"

    def beside(peer: str) -> tuple[str, str]:
        if peer not in result.peers:
            return "–", "–"
        return tables.milliseconds(np.median(result.peers[peer], axis=0)[0]), ratio(peer)

    workspace = ("–" if size is None else tables.mebibytes(size) for size in result.workspace)
    if result.wrong:
        error = "WRONG"
    elif result.error_ratio is None:
        error = f"{result.difference:.0e}"
    else:
        error = f"{result.error_ratio:.2g} × lax's"
    rate = result.rate
    return (
        result.name,
        result.direction,
        result.how,
        "–" if result.gemm is None else "{} × {}×{}×{}".format(*result.gemm),
        *map(tables.milliseconds, np.median(result.lax, axis=0)),
        ratio("lax"),
        "–" if rate is None else f"{rate / 1e9:.3g}",
        "–" if rate is None or result.peak is None else f"{rate / result.peak:.0%}",
        *(cell for peer in BESIDE for cell in beside(peer)),
        result.best,
        "–" if result.regret is None else f"{result.regret:.2f}",
        "{:.2f} → {:.2f} s".format(*result.compile_seconds),
        " → ".join(workspace),
        error,
    )


def summary(results: Sequence[Result]) -> list[str]:
    """Lines that summarise the results of a suite: means, and the worst."""
    lines = []
    for peer, title in TITLES.items():
        ratios = {r: r.quartiles(peer)[1] for r in results if peer in ("lax", *r.peers)}
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


def print_table(table: tables.Table) -> None:
    """Prints it at once, no wider than the terminal."""
    print(table.text(tables.terminal_width()), flush=True)


class Report:
    """Prints a table of each suite, and writes all results to ``file`` after every result.

    Attributes:
      results: by suite.
    """

    def __init__(self, machine: dict[str, Any], file: Path | None) -> None:
        self.machine = machine
        self.file = file
        self.results: dict[str, list[Any]] = {}
        peers = (f"{TITLES[name]} {number}, " for name, number in machine["peers"].items())
        line = f"jaxconv {machine['jaxconv']}, JAX {machine['jax']}, {''.join(peers)}"
        line += f"{machine['cpu']}, {machine['cores']} cores, float32 GEMM"
        print_table(tables.Table([f"{line} {machine['gemm'] / 1e9:.0f} GFLOP/s"]))

    def add(self, suite: str, result: Any) -> None:
        """Keeps a result and rewrites the file atomically, for concurrent readers."""
        self.results.setdefault(suite, []).append(result)
        if self.file is None:
            return
        results = {suite: list(map(as_json, rows)) for suite, rows in self.results.items()}
        document = {"machine": self.machine, "results": results}
        partial = self.file.with_name(f"{self.file.name}.partial")
        partial.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(partial, self.file)

    def end(self, suite: str) -> None:
        """Prints the table and the summary of a suite, also of one that was interrupted."""
        if results := self.results.get(suite):
            table = SUITES[suite].contents(results)
            above, rest = ["", suite, "", *table.above], "a wider terminal has all, or --json"
            print_table(dataclasses.replace(table, above=above, rest=rest))

    def close(self, written: list[Path], seconds: float) -> None:
        """Prints disagreements with lax, the files written, and the time taken."""
        files = [str(path) for path in (self.file, *written) if path is not None]
        lines = [f"WRONG: {text}" for text in self.wrong]
        if files:
            lines.append(f"Written: {', '.join(files)}")
        print_table(tables.Table(["", *lines, f"{seconds:.0f} s in all."]))

    @property
    def wrong(self) -> list[str]:
        """Which results disagree with lax's."""
        return [result.wrong for rows in self.results.values() for result in rows if result.wrong]


def as_json(result: Any) -> dict[str, Any]:
    """A result's fields and the quantities computed from them."""
    if isinstance(result, sharding.Moved):
        return dataclasses.asdict(result) | {"wrong": result.wrong}
    return dataclasses.asdict(result) | {
        "ratios": {peer: result.quartiles(peer) for peer in ("lax", *result.peers)},
        "rate": result.rate,
        "error_ratio": result.error_ratio,
        "wrong": result.wrong,
    }


def machine(against: Sequence[str] = ()) -> dict[str, Any]:
    """What results depend on: CPU, cores, FLOP/s of its matrix products, versions."""
    return {
        "cpu": processor(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "gemm": gemm_peak(),
        "jaxconv": version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "peers": {name: PEERS[name].version for name in against},
    }
