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
from jaxconv.bench.profile import Profile
from jaxconv.bench.programs import LOOPS, MODELS, PROGRAMS
from jaxconv.bench.regret import SEED, measure_regret, random_specs, relatives
from jaxconv.planning.measured import processor, version

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


def text(results: Sequence[Result]) -> str:
    """The table and the summary of a suite's results."""
    return "\n".join([table(results), "", *summary(results)])


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite of benchmarks.

    Attributes:
      measure: measures a case in a direction: a ``Result`` or, of sharding, ``Moved``.
      cases: all of them, with names and directions; those without a name are named by ``str``.
      few: those of a quick run.
      effort: of one case.
      text: the report on the results.
    """

    measure: Callable[[Any, str, Effort], Any]
    cases: Callable[[Selection], Sequence[Any]]
    few: slice
    effort: Effort
    text: Callable[[Sequence[Any]], str] = text

    def run(self, selection: Selection) -> Iterator[Any]:
        """Measures the selected cases. Yields the name of each, then its result."""
        effort = QUICK if selection.quick else self.effort
        effort = dataclasses.replace(effort, against=selection.against)
        for name, case, direction in self.selected(selection):
            yield name
            yield self.measure(case, direction, effort)

    def profiles(self, selection: Selection) -> Iterator[str | Profile]:
        """Profiles the selected cases. Yields the name of each, then its profile."""
        for name, case, direction in self.selected(selection):
            yield name
            yield programs.profile_of(case, direction)

    def selected(self, selection: Selection) -> Iterator[tuple[str, Any, str]]:
        """(name, case, direction) of each; those selected by name also in a quick run."""
        cases = self.cases(selection)
        for case in cases[self.few] if selection.quick and selection.case is None else cases:
            name = getattr(case, "name", None) or str(case)
            if selection.case is not None and not selection.case.search(name):
                continue
            for direction in getattr(case, "directions", ("",)):
                if selection.direction in (None, direction):
                    yield f"{name}, {direction}", case, direction


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
        sharding.measure, lambda _: sharding.CASES, slice(3, 120, 40), ENOUGH, sharding.text
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
# Columns dropped for a narrow terminal, the least important first.
SPARE = ("compile", "workspace", "GEMMs × m×n×k", "lax", "GFLOP/s", "error")


def table(results: Sequence[Result], width: float = math.inf) -> str:
    """A line for each result, without empty columns, and without those in ``SPARE`` that do not fit
    a terminal of ``width``."""
    rows = list(map(_cells, results))
    titles = [t for t, column in zip(HEADER, zip(*rows, strict=True), strict=True) if any(column)]
    text = ""
    for spared in (None, *SPARE):
        titles = [title for title in titles if title != spared]
        shown = [HEADER.index(title) for title in titles]
        cells = [titles, *([row[i] or "–" for i in shown] for row in rows)]
        text = tables.as_text(cells, [i for i, t in enumerate(titles) if t not in WORDS])
        if max(map(len, text.splitlines())) <= width:
            break
    return text


def _cells(result: Result) -> tuple[str, ...]:
    def ratio(peer: str) -> str:
        low, median, high = result.quartiles(peer)
        return f"{median:.3g} ({low:.3g}–{high:.3g})"

    def beside(peer: str) -> tuple[str, str]:
        if peer not in result.peers:
            return "", ""
        return tables.milliseconds(np.median(result.peers[peer], axis=0)[0]), ratio(peer)

    workspace = ("–" if size is None else tables.mebibytes(size) for size in result.workspace)
    if result.wrong:
        error = f"WRONG: {result.wrong}"
    elif result.error_ratio is None:
        error = f"{result.difference:.0e}"
    else:
        error = f"{result.error_ratio:.2g} × lax's"
    rate = result.rate
    return (
        result.name,
        result.direction,
        result.how,
        "" if result.gemm is None else "{} × {}×{}×{}".format(*result.gemm),
        *map(tables.milliseconds, np.median(result.lax, axis=0)),
        ratio("lax"),
        "" if rate is None else f"{rate / 1e9:.3g}",
        "" if rate is None or result.peak is None else f"{rate / result.peak:.0%}",
        *(cell for peer in BESIDE for cell in beside(peer)),
        result.best,
        "" if result.regret is None else f"{result.regret:.2f}",
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


class Report:
    """Prints a table of each suite, and writes all results to ``file`` after every result.

    Attributes:
      results: by suite.
    """

    def __init__(self, machine: dict[str, Any], file: Path | None) -> None:
        self.machine = machine
        self.file = file
        self.results: dict[str, list[Any]] = {}
        print(
            f"jaxconv {machine['jaxconv']}, JAX {machine['jax']}, "
            + "".join(f"{TITLES[name]} {number}, " for name, number in machine["peers"].items())
            + f"{machine['cpu']}, {machine['cores']} cores,"
            f" float32 GEMM {machine['gemm'] / 1e9:.0f} GFLOP/s"
        )

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
            print(f"\n{suite}\n\n{SUITES[suite].text(results)}", flush=True)

    def close(self, written: list[Path], seconds: float) -> None:
        """Prints disagreements with lax, the files written, and the time taken."""
        files = [str(path) for path in (self.file, *written) if path is not None]
        lines = [f"WRONG: {text}" for text in self.wrong]
        if files:
            lines.append(f"Written: {', '.join(files)}")
        print("\n" + "\n".join([*lines, f"{seconds:.0f} s in all."]))

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
